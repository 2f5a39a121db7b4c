# SPDX-License-Identifier: BSD-3-Clause
"""The gate: nothing is timed before its results are close enough to a float64 oracle.

Close enough is relative to PyTorch itself: at most twice the error of eager PyTorch in the same
dtype plus one unit in the last place of the largest value, both in the largest and in the
99.9th-percentile element; see `factor_of` for the exception.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers import eager_call
from benchmarks.problems import Problem

FACTOR = 2.0
DEEP_FACTOR = 4.0
PERCENTILE = 0.999
Results = Sequence[Tensor]


@dataclass(frozen=True)
class Errors:
    """Absolute errors of one result: the largest and the 99.9th percentile."""

    largest: float
    percentile: float


def errors(result: Tensor, truth: Tensor) -> Errors:
    difference = (result.detach().double() - truth).abs().flatten()
    if difference.numel() == 0:
        return Errors(0.0, 0.0)
    if not torch.isfinite(difference).all():
        return Errors(float("inf"), float("inf"))
    place = max(1, round(PERCENTILE * difference.numel()))
    if difference.is_cuda:  # kthvalue runs in a single block there
        percentile = difference.sort().values[place - 1]
    else:
        percentile = difference.kthvalue(place).values
    return Errors(difference.max().item(), percentile.item())


def oracle(module: nn.Module, example: Tensor) -> Results:
    """The plain module's results computed in float64 from the very same (rounded) numbers."""
    return eager_call(copy.deepcopy(module).double(), example.double())()


def factor_of(problem: Problem) -> float:
    """How many times PyTorch's own error is right.

    A whole module's training step in 16 bits rounds every layer's result: how far two right
    gradients of a few numbers are apart is luck, and was up to 3.4 times in 160 draws.
    """
    deep = problem.level == "module" and problem.mode == "training"
    return DEEP_FACTOR if deep and problem.torch_dtype.itemsize == 2 else FACTOR


class Gate:
    """Knows the truth and PyTorch's own errors; says what is wrong with other results."""

    def __init__(
        self,
        truth: Results,
        baselines: Sequence[Results],
        dtype: torch.dtype,
        factor: float = FACTOR,
    ) -> None:
        self.truth = [tensor.double() for tensor in truth]
        self.bounds = []
        for place, tensor in enumerate(self.truth):
            own = [errors(results[place], tensor) for results in baselines]
            size = tensor.abs().max().item() if tensor.numel() else 0.0
            rounding = torch.finfo(dtype).eps * size
            self.bounds.append(
                Errors(
                    factor * max(error.largest for error in own) + rounding,
                    factor * max(error.percentile for error in own) + rounding,
                )
            )

    def why_wrong(self, results: Results) -> str | None:
        """One sentence about the first result that is out of bounds, or None."""
        if len(results) != len(self.truth):
            return f"wrong: expected {len(self.truth)} results, got {len(results)}"
        triples = zip(results, self.truth, self.bounds, strict=True)
        for place, (result, truth, bound) in enumerate(triples):
            if result.shape != truth.shape:
                want, got = tuple(truth.shape), tuple(result.shape)
                return f"wrong: result {place} must have shape {want}, got {got}"
            error = errors(result, truth)
            for what in ("largest", "percentile"):
                got, most = getattr(error, what), getattr(bound, what)
                if not got <= most:
                    return (
                        f"wrong: result {place} may be off by {most:.3g} "
                        f"({what} error), got {got:.3g}"
                    )
        return None
