# SPDX-License-Identifier: BSD-3-Clause
"""What Python registers with PyTorch's dispatcher, once in a process.

The package may be imported again, as notebooks and test runners do who purge ``sys.modules``, and
one of its modules alone may be reloaded. A registration then takes the place of the older one; what
came of the older import calls the operators by name and finds the new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def replaced(*what: str) -> torch.library.Library:
    """A library for the registration ``what``; the one before it, of an older import, ends."""
    libraries: dict[tuple[str, ...], torch.library.Library]
    libraries = vars(torch.ops.aspp_ext).setdefault("_libraries", {})  # outlives our modules
    if what in libraries:
        libraries.pop(what)._destroy()
    libraries[what] = torch.library.Library("aspp_ext", "FRAGMENT")
    return libraries[what]


def name_of(op: Any) -> str:
    """Without the namespace."""
    return op._schema.name.split("::")[1]


def implement(name: str, key: str, kernel: Callable[..., Any], **how: Any) -> None:
    """``kernel`` runs the operator of that name at that dispatch key."""
    replaced(name, key).impl(name, kernel, key, **how)


def define(name: str, schema: str, tags: Any) -> None:
    """The operator ``name`` with the schema that begins at its bracket. It is never taken away:
    graphs may hold it."""
    if not hasattr(torch.ops.aspp_ext, name):
        replaced(name, "schema").define(f"{name}{schema}", tags=tags)
