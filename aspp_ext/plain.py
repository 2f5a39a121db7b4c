# SPDX-License-Identifier: BSD-3-Clause
"""Our operators in PyTorch's own: for programs that leave the process, and for who counts work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native, dispatch
from .ops.family import FAMILIES, NATIVE

_DENSE = "atrous_pyramid"


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What an exported program's operators of ours are in PyTorch's, which other tools know.

    ``torch.export.export(model, (x,)).run_decompositions(aspp_ext.decompositions())`` is a program
    without them: it runs where this package is not, and ONNX and OpenVINO convert it. Add PyTorch's
    own table (``torch.export.default_decompositions()``) for programs of Core ATen alone.

    Returns:
        ``{overload: function}`` of the operators that a forward pass has; gradients are not among
        them. Empty where the native library is missing, as no program has these operators then.
    """
    if _native.cpu_missing is not None:
        return {}
    found = {}
    for name, function in {**dispatch.REFERENCE, f"{_DENSE}_statistics": _statistics}.items():
        for family in FAMILIES if name != "aspp_inference" else (NATIVE,):
            op = family.op(name).default
            found[op] = _decomposition(op, function)
    return found


def _statistics(x: Tensor, weights: Any, rates: Any, tf32: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = dispatch.REFERENCE[_DENSE](x, weights, rates, None, None, False)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    mean = wide.mean((0, 2, 3))
    return y, mean, (wide - mean[:, None, None]).square().sum((0, 2, 3))


def _decomposition(op: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    arguments = op._schema.arguments

    def decomposed(*positional: Any, **named: Any) -> Any:
        left_out = arguments[len(positional) :]
        rest = [named.get(a.name, a.default_value) for a in left_out]
        return function(*positional, *rest)

    return decomposed
