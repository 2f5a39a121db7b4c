# SPDX-License-Identifier: BSD-3-Clause
"""What the operators' docstrings say, once more in plain PyTorch, and how far off one may be.

Nothing of ``aspp_ext`` is called here. In float64 these functions are the oracle, in a problem's
own dtype the yardstick, and on absolute values they bound what rounding can do to a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

OVERFLOW = 1 / 16
"""Of a dtype's largest number: beyond, a sum on the way may be infinite where the result is not."""


def convolution(x: Tensor, weight: Tensor, rate: Any, groups: int = 1) -> Tensor:
    axes = x.dim() - 2
    rates = (rate,) * axes if isinstance(rate, int) else rate[:axes]
    padding = [r * (k // 2) for r, k in zip(rates, weight.shape[2:], strict=True)]
    convolve = F.conv2d if axes == 2 else F.conv1d
    return convolve(x, weight, padding=padding, dilation=rates, groups=groups)


def of_channels(t: Tensor, like: Tensor) -> Tensor:
    """[O] or [N, O] beside [N, O, ...]."""
    return t.reshape(*t.shape, *[1] * (like.dim() - 2))


def finished(
    y: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
) -> Tensor:
    y = y if bias is None else y + of_channels(bias, y)
    y = y if scale is None else y * of_channels(scale, y)
    y = y if shift is None else y + of_channels(shift, y)
    return y.relu() if activation == "relu" else y


def pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    rates: Sequence[Any],
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    branches = [convolution(x, w, r) for w, r in zip(weights, rates, strict=True)]
    return finished(torch.cat(branches, 1), bias, scale, shift, activation)


def separable_pyramid(
    x: Tensor,
    depthwise: Sequence[Tensor | None],
    pointwise: Sequence[Tensor],
    rates: Sequence[Any],
    between: Sequence[Any],
    between_activation: str | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    branches = []
    for d, p, rate, affine in zip(depthwise, pointwise, rates, between, strict=True):
        t = x if d is None else convolution(x, d, rate, groups=x.size(1))
        if affine is not None:
            t = finished(t, None, *affine, between_activation)
        branches.append(convolution(t, p, 1))
    return finished(torch.cat(branches, 1), bias, scale, shift, activation)


def head(
    x: Tensor,
    depthwise: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rates: Sequence[Any],
    shift: Tensor,
    pool_weight: Tensor | None,
    pool_shift: Tensor | None,
    project_weight: Tensor | None,
    project_shift: Tensor | None,
    activation: str | None = "relu",
    project_activation: str | None = "relu",
) -> Tensor:
    branches = []
    for d, w, rate in zip(depthwise, weights, rates, strict=True):
        t = x if d is None else convolution(x, d, rate, groups=x.size(1))
        branches.append(convolution(t, w, rate if d is None else 1))
    joined = finished(torch.cat(branches, 1), None, None, shift, activation)
    if project_weight is None:
        return joined
    if pool_weight is not None:
        pooled = F.linear(x.mean((2, 3)), pool_weight, pool_shift)
        pooled = pooled.relu() if activation else pooled
        spread = pooled[:, :, None, None].expand(-1, -1, *x.shape[2:])
        joined = torch.cat([joined, spread], 1)
    y = F.conv2d(joined, project_weight[:, :, None, None])
    return finished(y, None, None, project_shift, project_activation)


def wide(arguments: Any, dtype: torch.dtype | None = None) -> Any:
    """In float64, after they were rounded to ``dtype``; of leaves the values alone."""
    return tree_map_only(Tensor, lambda t: t.detach().to(dtype or t.dtype).double(), arguments)


def sizes(arguments: Any) -> Any:
    return tree_map_only(Tensor, Tensor.abs, wide(arguments))


def _per_pixel(t: Tensor) -> Tensor:
    """The norm over channels."""
    return t.norm(dim=1) if t.dim() > 1 else t.abs()


def why_wrong(
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    factor: float = 2.0,
    roundings: float = 1.0,
    as_a_whole: bool = False,
) -> str | None:
    """The error law at every pixel: over its channels an error of at most ``factor`` times that of
    ``eager``, plus ``roundings`` of the products' ``magnitude``. Values that are independent and of
    one size are also judged ``as_a_whole``, where chance evens out: plus one of the result's.

    Where what is computed from is not finite, so is the result, and nowhere else.
    """
    info = torch.finfo(got.dtype)
    ours, theirs = (t.detach().double() for t in (got, eager))
    hit = ~magnitude.isfinite()
    settled = hit & ((theirs == exact) | (theirs.isnan() & exact.isnan()))
    wrong = settled & (ours != exact) & ~(ours.isnan() & exact.isnan())
    if wrong.any():
        return _at(wrong, "not what PyTorch has where values are not finite", ours, exact)
    counted = (magnitude < info.max * OVERFLOW) & theirs.isfinite()
    if (wrong := counted & ~ours.isfinite()).any():
        return _at(wrong, "not finite", ours, exact)
    off = torch.where(counted, ours - exact, 0)
    allowed = torch.where(counted, theirs - exact, 0) * factor
    slack = torch.where(counted, magnitude, 0) * (info.eps * roundings)
    error, limit = _per_pixel(off), _per_pixel(allowed) + _per_pixel(slack)
    if (wrong := error > limit).any():
        times = (error / limit).nan_to_num(0).max()
        return _at(wrong, f"pixels have up to {times:.3g} times the error allowed", error, limit)
    if as_a_whole and got.numel() >= 500:
        all_off, most, size = (t.norm().item() for t in (off, allowed, exact))
        if all_off > most + info.eps * size:
            return f"an error of {all_off:.3g}, allowed are {most:.3g} and a rounding of {size:.3g}"
    return None


def _at(wrong: Tensor, why: str, got: Tensor, wanted: Tensor) -> str:
    place = tuple(wrong.nonzero()[0].tolist())
    found = f"{got[place]} for {wanted[place]}"
    return f"{int(wrong.sum())} of {wrong.numel()} {why}, at {place}: {found}"
