# SPDX-License-Identifier: BSD-3-Clause
"""The gate: nothing is timed before its results are close enough to a float64 oracle.

Close enough is relative to PyTorch itself: at most twice the error of eager PyTorch in the same
dtype plus one unit in the last place of the largest value, both in the largest and in the
99.9th-percentile element.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.peers import eager_call

FACTOR = 2.0
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
    return Errors(difference.max().item(), difference.kthvalue(place).values.item())


def oracle(module: nn.Module, example: Tensor) -> Results:
    """The plain module's results computed in float64 from the very same (rounded) numbers."""
    return eager_call(copy.deepcopy(module).double(), example.double())()


class Gate:
    """Knows the truth and PyTorch's own errors; says what is wrong with other results."""

    def __init__(self, truth: Results, baselines: Sequence[Results], dtype: torch.dtype) -> None:
        self.truth = [tensor.double() for tensor in truth]
        self.bounds = []
        for place, tensor in enumerate(self.truth):
            own = [errors(results[place], tensor) for results in baselines]
            size = tensor.abs().max().item() if tensor.numel() else 0.0
            rounding = torch.finfo(dtype).eps * size
            self.bounds.append(
                Errors(
                    FACTOR * max(error.largest for error in own) + rounding,
                    FACTOR * max(error.percentile for error in own) + rounding,
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
