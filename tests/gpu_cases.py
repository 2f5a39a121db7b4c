# SPDX-License-Identifier: BSD-3-Clause
"""What each implementation has on CUDA: the rows of the tables in test_gpu*.py.

``pytest -m "gpu and triton"`` are the tests of Triton's kernels: ``selection.py`` gives that marker
to every test with a parameter that is Triton's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from table import LOW, PYRAMIDS, SEPARABLE, dtype_id, has_dtype
from torch import Tensor

from aspp_ext.ops.family import NATIVE, TRITON, Family
from aspp_ext.testing import OPS, Branch, Problem, outputs

DEVICE = "cuda"
# dtype, and whether float32 products may be TF32
PRECISIONS = [(d, False) for d in (torch.float32, torch.float64, *LOW)] + [(torch.float32, True)]


@dataclass(frozen=True)
class Kernels:
    """An implementation and the names of what it computes, as in ``OPS``."""

    backend: str
    family: Family
    operators: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.operators, *self.heads)

    @property
    def widest(self) -> torch.dtype:
        return torch.float64 if has_dtype(self.backend, torch.float64) else torch.float32

    def precisions(self, name: str) -> list[tuple[torch.dtype, bool]]:
        """Those of an operator or a head."""
        return [each for each in PRECISIONS if has_dtype(self.backend, each[0])]

    def call(self, name: str, tf32: bool = False) -> Callable[..., Any]:
        """The operator on DEVICE; the switch is set for PyTorch's own convolutions, too."""
        torch.backends.cudnn.allow_tf32 = tf32
        op = OPS[name]
        if name in self.heads:
            return op.implementations(DEVICE)[self.backend]
        operator = self.family.op(op.name)
        return lambda *arguments: operator(*arguments, tf32)

    def results(self, name: str) -> Callable[..., list[Tensor]]:
        """The same without TF32, as a list."""
        operator = self.family.op(OPS[name].name)
        return lambda *arguments: outputs(operator(*arguments))

    def __str__(self) -> str:
        return self.backend


OPERATORS = (*PYRAMIDS, *SEPARABLE)
HEADS = tuple(name for name in OPS if name.startswith("head"))
BY_CUDA = Kernels("cuda", NATIVE, OPERATORS, HEADS)
BY_TRITON = Kernels("triton", TRITON, OPERATORS, HEADS)
IMPLEMENTATIONS = (BY_CUDA, BY_TRITON)
each_implementation = pytest.mark.parametrize("by", IMPLEMENTATIONS, ids=str)


class Run(NamedTuple):
    """One operator of an implementation in a precision."""

    by: Kernels
    name: str
    dtype: torch.dtype
    tf32: bool

    def __call__(self, *arguments: Any) -> Any:
        return self.by.call(self.name, self.tf32)(*arguments)

    def __str__(self) -> str:
        return f"{self.by}-{self.name}-{dtype_id(self.dtype)}{'-tf32' * self.tf32}"


RUNS = [Run(by, n, *p) for by in IMPLEMENTATIONS for n in by.names for p in by.precisions(n)]


def each_run(runs: Iterable[Run]) -> Any:
    return pytest.mark.parametrize("run", list(runs), ids=str)


def each_case(keep: Callable[[Run, Problem], bool], problems: Iterable[Problem]) -> Any:
    """Parametrises run and problem."""
    listed = list(problems)
    cases = [
        pytest.param(run, problem, id=f"{run}-{problem.name}")
        for run in RUNS
        for problem in listed
        if keep(run, problem)
    ]
    return pytest.mark.parametrize(("run", "problem"), cases)


def each_operator(implementations: Iterable[Kernels] = IMPLEMENTATIONS) -> Any:
    """Parametrises by and name: every operator that is not composed of others."""
    cases = [
        pytest.param(by, name, id=f"{by}-{name}") for by in implementations for name in by.operators
    ]
    return pytest.mark.parametrize(("by", "name"), cases)


REAL = {
    "2048 channels, 33x33": ((1, 2048, 33, 33), (6, 12, 18)),
    "2048 channels, 65x65": ((2, 2048, 65, 65), (12, 24, 36)),
    "512 channels, 64x128": ((2, 512, 64, 128), (6, 12, 18)),
    "odd, 97x97": ((1, 203, 97, 97), (12, 24, 36)),
}


def real(name: str) -> Problem:
    shape, rates = REAL[name]
    branches = (Branch(256, (1, 1)), *(Branch(256, (3, 3), (r, r)) for r in rates))
    return Problem(f"real {shape}", shape, branches)
