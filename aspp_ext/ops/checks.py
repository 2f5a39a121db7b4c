# SPDX-License-Identifier: BSD-3-Clause
"""Refusals: one sentence with the rule, what was expected and what came, before any work.

The public functions, the fakes and the reference backend all pass through here; the sentences of
the native kernels (csrc/checks.h) are the same words.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Rate = int | tuple[int, int]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_RATE = 2**31 - 1


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return f"[{', '.join(str(s) for s in t.shape)}]"


def shown(value: Any) -> str:
    """What came, in a sentence: a short value itself, of others the type."""
    plain = value if isinstance(value, (list, tuple)) else [value]
    if all(isinstance(v, (str, int, float, type(None))) for v in plain):
        text = repr(value)
        if len(text) <= 60:
            return text
    return type(value).__name__


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be a strided tensor, got a {kind} one")


def check_int(op: str, name: str, value: Any) -> int:
    """From 1 to 2^31 - 1, and an int or what counts as one, as NumPy's do; a bool does not."""
    try:
        number = None if isinstance(value, (bool, Tensor)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{op}: {name} must be an int, got {shown(value)}")
    if not 1 <= number <= MAX_RATE:
        limit = "at least 1" if number < 1 else f"at most {MAX_RATE}"
        raise ValueError(f"{op}: {name} must be {limit}, got {number}")
    return number


def check_number(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {shown(value)}")


def check_module(op: str, value: Any) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(value).__name__}")


def is_none(t: Tensor) -> bool:
    """What stands for None in the operators' lists: a tensor of shape [0]."""
    return t.dim() == 1 and t.size(0) == 0


def check_list(op: str, name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"{op}: {name} must be a list with one entry per branch, got {type(value).__name__}"
        )


def check_dtype(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {dtype_name(t.dtype)}"
        )


def check_image(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be [N, C, H, W], got shape {_shape(x)}")
    check_dtype(op, name, x)
    if x.size(1) < 1 or x.size(2) < 1 or x.size(3) < 1:
        raise ValueError(
            f"{op}: {name} needs at least one channel, row and column, got shape {_shape(x)}"
        )


def as_rows(op: str, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """One dimension as images of a row: x ``[N, C, L]`` and weights ``[O, C, k]``; others as is."""
    if x.dim() != 3:
        return x, weights
    for b, w in enumerate(weights):
        if w.dim() == 4:  # an image without a batch, most likely
            raise ValueError(
                f"{op}: x must be [N, C, H, W] for weights[{b}] of shape {_shape(w)}, "
                f"got shape {_shape(x)}"
            )
    return x.unsqueeze(2), [w.unsqueeze(2) if w.dim() == 3 else w for w in weights]


def check_like(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise TypeError(
            f"{op}: {name} must have x's dtype {dtype_name(x.dtype)}, got {dtype_name(t.dtype)}"
        )
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {t.device}")


def check_odd(op: str, name: str, kh: int, kw: int) -> None:
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"{op}: {name} must have odd kernel sizes, got {kh}x{kw}")


def check_kernel(op: str, name: str, w: Tensor) -> None:
    if w.dim() != 4:
        raise ValueError(f"{op}: {name} must be [O, C, kh, kw], got shape {_shape(w)}")
    check_odd(op, name, w.size(2), w.size(3))
    if w.size(0) < 1:
        raise ValueError(f"{op}: {name} needs at least one output channel, got shape {_shape(w)}")


def check_polyphase(op: str, polyphase: int) -> None:
    if polyphase not in (0, 1, 2):
        raise ValueError(
            f"{op}: polyphase must be 0 (never), 1 (where it costs less) or 2 (wherever it can), "
            f"got {polyphase}"
        )


def check_rates(op: str, rates: Sequence[int], branches: int) -> None:
    """``rates``: (rate_h, rate_w) of every branch, flat."""
    if branches < 1:
        raise ValueError(f"{op}: weights must hold at least one branch, got an empty list")
    if len(rates) != 2 * branches:
        raise ValueError(
            f"{op}: atrous_rates must have one rate per branch, got {len(rates) // 2} for "
            f"{branches} branches"
        )
    for i, rate in enumerate(rates):
        if rate < 1:
            raise ValueError(f"{op}: atrous_rates[{i // 2}] must be >= 1, got {rate}")
        if rate > MAX_RATE:
            raise ValueError(f"{op}: atrous_rates[{i // 2}] must be <= {MAX_RATE}, got {rate}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def flat_rates(op: str, atrous_rates: Sequence[Rate]) -> list[int]:
    """One ``rate`` or ``(rate_h, rate_w)`` per branch -> the operators' flat list."""
    check_list(op, "atrous_rates", atrous_rates)
    flat: list[int] = []
    for i, rate in enumerate(atrous_rates):
        pair = (rate, rate) if not isinstance(rate, (list, tuple)) else tuple(rate)
        if not (len(pair) == 2 and all(_is_rate(r) for r in pair)):
            raise TypeError(
                f"{op}: atrous_rates[{i}] must be an int or a pair of ints, got {shown(rate)}"
            )
        flat.extend(pair)
    return flat


def check_vector(
    op: str, name: str, v: Tensor | None, x: Tensor, channels: int, per_sample: bool = False
) -> None:
    if v is None:
        return
    check_tensor(op, name, v)
    check_like(op, name, v, x)
    whole = v.dim() == 1 and v.size(0) == channels
    rows = per_sample and v.dim() == 2 and v.size(0) == x.size(0) and v.size(1) == channels
    if not whole and not rows:
        raise ValueError(
            f"{op}: {name} must have one value per output channel ({channels}), got shape "
            f"{_shape(v)}"
        )


def check_dense(op: str, x: Tensor, weights: Sequence[Tensor], rates: Sequence[int]) -> int:
    """Checks a dense pyramid; returns its number of output channels."""
    check_image(op, "x", x)
    check_rates(op, rates, len(weights))
    total = 0
    for b, w in enumerate(weights):
        name = f"weights[{b}]"
        check_kernel(op, name, w)
        check_like(op, name, w, x)
        if w.size(1) != x.size(1):
            raise ValueError(f"{op}: {name} has {w.size(1)} input channels but x has {x.size(1)}")
        total += w.size(0)
    return total


def check_separable(
    op: str,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    rates: Sequence[int],
) -> int:
    """Checks a separable pyramid (an empty depthwise tensor means none); returns sum O."""
    check_image(op, "x", x)
    if not pointwise:
        raise ValueError(
            f"{op}: pointwise_weights must hold at least one branch, got an empty list"
        )
    if len(depthwise) != len(pointwise):
        raise ValueError(
            f"{op}: depthwise_weights must have one entry per branch, got {len(depthwise)} for "
            f"{len(pointwise)} branches"
        )
    check_rates(op, rates, len(pointwise))
    total = 0
    for b, (d, p) in enumerate(zip(depthwise, pointwise, strict=True)):
        name = f"pointwise_weights[{b}]"
        check_kernel(op, name, p)
        check_like(op, name, p, x)
        if p.size(2) != 1 or p.size(3) != 1:
            raise ValueError(f"{op}: {name} must be [O, C, 1, 1], got shape {_shape(p)}")
        if p.size(1) != x.size(1):
            raise ValueError(f"{op}: {name} has {p.size(1)} input channels but x has {x.size(1)}")
        total += p.size(0)
        if not is_none(d):
            _check_depthwise_weight(op, f"depthwise_weights[{b}]", d, x)
    return total


def _check_depthwise_weight(op: str, name: str, d: Tensor, x: Tensor) -> None:
    check_kernel(op, name, d)
    check_like(op, name, d, x)
    if d.size(0) != x.size(1) or d.size(1) != 1:
        raise ValueError(f"{op}: {name} must be [{x.size(1)}, 1, kh, kw], got shape {_shape(d)}")


def check_depthwise(op: str, x: Tensor, depthwise: Sequence[Tensor], rates: Sequence[int]) -> None:
    """Checks the depthwise convolutions alone, of a batch that has statistics."""
    check_image(op, "x", x)
    if not depthwise:
        raise ValueError(
            f"{op}: depthwise_weights must hold at least one branch, got an empty list"
        )
    check_rates(op, rates, len(depthwise))
    for b, d in enumerate(depthwise):
        if not is_none(d):
            _check_depthwise_weight(op, f"depthwise_weights[{b}]", d, x)
    if x.size(0) == 0:
        raise ValueError(f"{op}: statistics need at least one sample, got a batch of 0")


def check_channel_vector(
    op: str, name: str, v: Tensor, x: Tensor, branches: int, wide: torch.dtype
) -> None:
    """``[branches * C]`` in ``wide``, the dtype of sums."""
    if v.dtype != wide:
        raise TypeError(
            f"{op}: {name} must have the dtype of x's sums {dtype_name(wide)}, got "
            f"{dtype_name(v.dtype)}"
        )
    if v.device != x.device:
        raise ValueError(f"{op}: {name} must be on x's device {x.device}, got {v.device}")
    values = branches * x.size(1)
    if v.dim() != 1 or v.size(0) != values:
        raise ValueError(
            f"{op}: {name} must have one value per branch and channel ({values}), got shape "
            f"{_shape(v)}"
        )


def check_stored(op: str, stored: Sequence[Tensor], x: Tensor, depthwise: Sequence[Tensor]) -> None:
    branches = sum(not is_none(d) for d in depthwise)
    if len(stored) not in (0, branches):
        raise ValueError(
            f"{op}: stored must be empty or have one entry per branch with a depthwise weight, got "
            f"{len(stored)} for {branches} branches"
        )
    for i, t in enumerate(stored):
        check_like(op, f"stored[{i}]", t, x)
        if t.shape != x.shape:
            raise ValueError(
                f"{op}: stored[{i}] must have x's shape {_shape(x)}, got shape {_shape(t)}"
            )


def check_between(
    op: str,
    x: Tensor,
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    depthwise: Sequence[Tensor],
) -> None:
    if not (len(scale) == len(shift) and len(scale) in (0, len(depthwise))):
        raise ValueError(
            f"{op}: between must have one entry per branch, got {len(scale)} for {len(depthwise)} "
            "branches"
        )
    for b, pair in enumerate(zip(scale, shift, strict=True)):
        if is_none(pair[0]) and is_none(pair[1]):
            continue
        name = f"between[{b}]"
        if is_none(depthwise[b]):
            raise ValueError(
                f"{op}: {name} must be None where the branch has no depthwise weight, got tensors"
            )
        for t in pair:
            check_like(op, name, t, x)
            if t.dim() != 1 or t.size(0) != x.size(1):
                raise ValueError(
                    f"{op}: {name} must have one value per channel ({x.size(1)}), got shape "
                    f"{_shape(t)}"
                )


def check_grad(op: str, grad: Tensor, x: Tensor, out_channels: int) -> None:
    check_image(op, "grad", grad)
    check_like(op, "grad", grad, x)
    expected = [x.size(0), out_channels, x.size(2), x.size(3)]
    if list(grad.shape) != expected:
        raise ValueError(f"{op}: grad must have the output's shape {expected}, got {_shape(grad)}")


def check_sizes(op: str, kernels: Sequence[int], out_channels: Sequence[int]) -> None:
    """``kernels``: (kh, kw) of every branch, flat."""
    if len(kernels) != 2 * len(out_channels):
        raise ValueError(
            f"{op}: kernels must have two sizes per branch, got {len(kernels)} for "
            f"{len(out_channels)} branches"
        )
    for b, outs in enumerate(out_channels):
        kh, kw = kernels[2 * b], kernels[2 * b + 1]
        if outs < 1 or kh < 1 or kw < 1:
            raise ValueError(
                f"{op}: kernel sizes and out_channels must be >= 1, got {kh}x{kw} and {outs}"
            )


def check_flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")


def check_activation(op: str, name: str, activation: str | None) -> None:
    if activation is not None and not (isinstance(activation, str) and activation == "relu"):
        raise ValueError(f"{op}: {name} must be None or 'relu', got {shown(activation)}")
