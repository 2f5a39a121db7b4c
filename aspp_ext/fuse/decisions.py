# SPDX-License-Identifier: BSD-3-Clause
"""Whether a module's own Python decides by the sizes of its maps, while it is exported.

Operators do so, too: that a window fits into a map, for instance, which says nothing of the module.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch

from .apart import replaced


@contextlib.contextmanager
def decisions_by_size() -> Iterator[list[str]]:
    """The modules whose Python has asked for the truth of something that depends on sizes, such
    that an export holds only for maps of which the same is true; of this thread."""
    noted: list[str] = []
    plain, here = torch.SymBool.__bool__, threading.get_ident()

    def noting(condition: torch.SymBool) -> bool:
        guards = getattr(getattr(condition.node, "shape_env", None), "guards", ())
        before = len(guards)
        truth = plain(condition)
        if threading.get_ident() == here and len(guards) > before:
            home = _asking(sys._getframe(1))
            if not home.startswith("torch."):
                noted.append(home)
        return truth

    with replaced(torch.SymBool, "__bool__", noting):
        yield noted


def _asking(frame: FrameType | None) -> str:
    """The module of whose code it is: ``torch`` itself has the numbers' own methods."""
    while frame is not None and frame.f_globals.get("__name__") in ("torch", __name__):
        frame = frame.f_back
    return "torch." if frame is None else str(frame.f_globals.get("__name__"))
