# SPDX-License-Identifier: BSD-3-Clause
"""Calls of ``atrous_separable_pyramid_batch_norm``, and their gradients under the error law."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import atrous_separable_pyramid_batch_norm
from .checks import check_law_of_draws
from .operators import OPS
from .oracle import ShiftedProducts
from .problems import Problem

SEPARABLE = OPS["separable"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of sums and statistics."""
    return torch.promote_types(dtype, torch.float32)


@dataclass
class Call:
    """Arguments of the function; what a plain branch has not is None."""

    x: Tensor
    depthwise: list[Tensor | None]
    pointwise: list[Tensor]
    rates: list[tuple[int, int]]
    norms: list[tuple[Tensor | None, Tensor | None] | None]

    def __call__(self, **keywords: Any) -> tuple[Tensor, Tensor, Tensor]:
        return atrous_separable_pyramid_batch_norm(
            self.x, self.depthwise, self.pointwise, self.rates, self.norms, **keywords
        )

    @property
    def leaves(self) -> list[Tensor]:
        affine = [t for pair in self.norms for t in pair or ()]
        return [t for t in (self.x, *self.depthwise, *self.pointwise, *affine) if t is not None]

    def map(self, change: Any) -> Call:
        def each(tensors: Any) -> Any:
            return [None if t is None else change(t) for t in tensors]

        norms = [None if pair is None else tuple(each(pair)) for pair in self.norms]
        return Call(change(self.x), each(self.depthwise), each(self.pointwise), self.rates, norms)

    def gradients(self, grad: Tensor, **keywords: Any) -> list[Tensor]:
        """y, mean, squares, and y's gradients."""
        call = self.map(lambda t: t.detach().requires_grad_())
        results = call(**keywords)
        return [*results, *torch.autograd.grad(results[0], call.leaves, grad)]


def made(
    problem: Problem,
    dtype: torch.dtype,
    device: str | torch.device,
    draw: int = 0,
    norm: Any = None,
) -> Call:
    """Norms with and without weight and bias, in ``norm``, by default in dtype."""
    x, depthwise, pointwise, rates = SEPARABLE.make(problem, dtype, draw=draw, device=device)[:4]
    values = torch.Generator().manual_seed(draw)
    given = itertools.cycle([(True, True), (True, False), (False, True), (False, False)])
    norms: list[Any] = []
    for d in depthwise:
        pair = None
        if d.numel():
            drawn = torch.randn(2, x.size(1), generator=values).to(dtype) * 0.5
            drawn[0] += 1
            pair = tuple(
                t.to(device, norm or dtype) if there else None
                for t, there in zip(drawn, next(given), strict=True)
            )
        norms.append(pair)
    pairs = list(zip(rates[::2], rates[1::2], strict=True))
    return Call(x, [d if d.numel() else None for d in depthwise], pointwise, pairs, norms)


def check_gradients(
    problem: Problem,
    dtype: torch.dtype,
    device: str | torch.device,
    backend: str | None = None,
    draws: int = 5,
    rounded: Callable[[Any], Any] = lambda arguments: arguments,
    ours: Callable[[Callable[[], Any], str], Any] = lambda call, name: call(),
) -> float:
    """y and its gradients by the error law; weights of norms in float32, as under autocast.

    Args:
        rounded: what PyTorch gets, where its products are of a lower precision.
        ours: calls what is under test, which it is told the name of.

    Returns:
        the largest error as a multiple of PyTorch's, or of one rounding if that is more.
    """
    drawn = []
    norm = wide(dtype)
    for draw in range(draws):
        call = made(problem, dtype, device, draw, norm)
        shape = (problem.shape[0], problem.out_channels, *problem.shape[2:])
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(draw)).to(device, dtype)
        with ShiftedProducts():
            exact = call.map(lambda t: t.double()).gradients(grad.double(), backend="reference")
        torchs = call.map(rounded).gradients(rounded(grad), backend="reference")
        got = ours(functools.partial(call.gradients, grad, backend=backend), "batch_norm")
        drawn.append(list(zip(got, torchs, exact, strict=True)))
    judged = [drawn_of for i, drawn_of in enumerate(zip(*drawn, strict=True)) if i not in (1, 2)]
    return check_law_of_draws(judged, factor=3)  # but statistics, which are of what was rounded
