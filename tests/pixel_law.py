# SPDX-License-Identifier: BSD-3-Clause
"""The error law pixel by pixel: an error counts by what its own sum adds up, and not by the largest
value of the map. Cases in which pixels and taps are very unlike each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aspp_ext import reference

Case = Callable[[Tensor, Tensor], None]
"""Changes x and the weight of a branch in place."""


def _pixels(change: Callable[[Tensor], None]) -> Case:
    return lambda x, _: change(x)


def _left(x: Tensor) -> Tensor:
    return x[..., : x.size(3) // 2]


def _right(x: Tensor) -> Tensor:
    return x[..., x.size(3) // 2 :]


def _pad_one_sample(x: Tensor) -> None:
    x[-1, ..., x.size(2) // 2 :, :] = 0
    x[-1, ..., x.size(3) // 3 :] = 0


def _in_turn(size: int, step: int) -> Tensor:
    return 1e4 ** ((torch.arange(size) // step) % 2).float()


CASES: dict[str, Case] = {
    "one huge channel": _pixels(lambda x: x[-1, 3, -1, 1].fill_(1e20)),
    "one huge pixel": _pixels(lambda x: x[-1, :, x.size(2) // 2, 2].mul_(1e20)),
    "filled": _pixels(lambda x: _right(x).fill_(1e20)),
    "filled with the lowest": _pixels(lambda x: _right(x).fill_(torch.finfo(x.dtype).min)),
    "a half scaled down": _pixels(lambda x: _left(x).mul_(1e-3)),
    "a half of zeros": _pixels(lambda x: _left(x).zero_()),
    "a padded sample": _pixels(_pad_one_sample),
    "rows in turn": _pixels(lambda x: x.mul_(_in_turn(x.size(2), 3)[:, None])),
    "columns in turn": _pixels(lambda x: x.mul_(_in_turn(x.size(3), 5))),
    "large outer taps": lambda _, w: w[..., 0].mul_(1e3),
    "pruned taps": lambda _, w: w[..., 1:, :].zero_(),
    "both": lambda x, w: (w[..., 2, :].mul_(1e3), _left(x).mul_(1e-4)),
}


def summed(x: Tensor, weight: Tensor, rate: int) -> Tensor:
    """Per pixel, [N, H, W]: sqrt(sum over live taps of |w|^2 |x|^2). Where 0 so is
    the output."""
    energies = x.double().square().sum(1, keepdim=True), weight.double().square().sum((0, 1))
    return reference.atrous_pyramid(energies[0], [energies[1][None, None]], [rate])[:, 0].sqrt()


def why_pixels_are_worse(
    actual: Tensor, baseline: Tensor, exact: Tensor, scale: Tensor
) -> str | None:
    """None, or what is wrong with ``actual`` beside PyTorch's ``baseline``.

    Zeros are zeros, what is not finite is where PyTorch's is (of sums that overflow, their order
    makes infinities or NaN; of sums of which a part may overflow, it makes them finite or not), and
    of errors as multiples of their ``scale`` (norms over the channels) the largest is at most twice
    PyTorch's, plus one rounding.
    """
    most = torch.finfo(actual.dtype).max
    by_order = (scale > most / 1e3)[:, None] & (exact.abs() <= most)
    if ((actual.isfinite() != baseline.isfinite()) & ~by_order).any():
        return "something is not finite where PyTorch's is, or the reverse"
    size = actual.double().norm(dim=1)
    finite = size.isfinite() & baseline.double().norm(dim=1).isfinite()
    if not (finite & (scale > 0)).any():
        return None
    if (size[finite & (scale == 0)] != 0).any():
        return "what PyTorch gives as zeros is not zero"
    seen = finite & (scale > 0)

    def largest(values: Tensor) -> float:
        return (values.norm(dim=1) / scale)[seen].amax().item()

    ours, theirs = (largest(result.double() - exact) for result in (actual, baseline))
    rounding = torch.finfo(actual.dtype).eps / 2 * largest(exact)
    return None if ours <= 2 * theirs + rounding else f"error {ours:.3g}, PyTorch's {theirs:.3g}"
