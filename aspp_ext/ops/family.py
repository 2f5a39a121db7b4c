# SPDX-License-Identifier: BSD-3-Clause
"""Two families of operators that compute the same: the native ones, and Triton's beside them.

A Triton operator has the schema of the native one and its name with a suffix. Everything else, from
the fake to the gradients, is written once for both, and what is recorded in one family is
differentiated in that family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """The operators of ``torch.ops.aspp_ext`` whose names end in ``suffix``."""

    suffix: str

    def op(self, name: str) -> Any:
        """This family's operator, by the native one's name."""
        return getattr(torch.ops.aspp_ext, name + self.suffix)


NATIVE = Family("")
TRITON = Family("_triton")
FAMILIES = (NATIVE, TRITON)


def family_of(ctx: Any) -> Family:
    """That of the operator whose call ``ctx`` has recorded; :mod:`aspp_ext.autograd` is native."""
    return getattr(ctx, "family", NATIVE)
