# SPDX-License-Identifier: BSD-3-Clause
"""Triton's operators: schemas after the native ones, kernels that load Triton when they run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _triton
from .._registrations import define, implement
from .family import NATIVE, TRITON


def define_sibling(name: str, check: Callable[..., Any]) -> None:
    """Defines the Triton operator beside the native ``name``, with its kernel on CUDA and the CPU.

    Args:
        check: ``(*op_arguments)``, refuses in the native kernel's words what that refuses.
    """
    native = NATIVE.op(name).default
    own = name + TRITON.suffix
    define(own, str(native._schema)[len(native._schema.name) :], native.tags)
    rates = [a.name for a in native._schema.arguments].index("rates")

    def kernel(first: Tensor, *rest: Any) -> Any:
        check(first, *rest)
        # The first is x or the gradient of the result: as many pixels, of the same dtype.
        if (reason := _triton.refusal(first, len(rest[rates - 1]) // 2)) is not None:
            raise RuntimeError(f"{name}: {reason}")
        operators = importlib.import_module("aspp_ext.triton.operators")
        return getattr(operators, name)(first, *rest)

    for key in ("CPU", "CUDA"):
        implement(own, key, kernel)
