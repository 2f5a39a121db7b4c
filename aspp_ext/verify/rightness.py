# SPDX-License-Identifier: BSD-3-Clause
"""Whether an implementation computes an operator right, in a precision, for inference or training.

Small integers bit for bit, on every problem and layout of the tables and at real sizes; normal
values under the error law; where a NaN and an Inf reach; the same bits three times. What a training
step computes besides, the statistics of batch norms, is part of training.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from .. import _native, _triton
from ..evidence.entry import Cell
from ..ops.family import NATIVE, TRITON
from ..ops.precision import switches
from ..ops.separable_choice import separable_way
from ..testing import OPS, PROBLEMS, Branch, Op, Problem, checks
from ..testing.batch_norm import check_gradients
from ..testing.law import of_eleven_bits
from .failure import examine
from .isolation import COMPILING, PYTORCH, Beat

T = TypeVar("T")
NAMES = {
    ("atrous_pyramid", "inference"): ("pyramid", "pyramid_epilogue"),
    ("atrous_pyramid", "training"): ("pyramid", "pyramid_grad_input", "pyramid_grad_weight"),
    ("atrous_separable_pyramid", "inference"): ("separable", "separable_between_epilogue"),
    ("atrous_separable_pyramid", "training"): (
        *("separable", "separable_between_epilogue"),
        *("separable_backward", "separable_backward_between"),
    ),
    ("aspp_inference", "inference"): (
        *("head", "head_separable", "head_without_pool"),
        *("head_no_projection", "head_linear"),
    ),
}
"""Operator and mode -> the rows of ``OPS`` that have to be right."""

INTERPRETED = (
    *("aspp", "prime_sizes", "one_pixel", "empty_batch", "channels_not_of_8", "kernel_1x3_3x1"),
    *("x_offset", "in_place_channel_slice"),
)
"""The problems for Triton's interpreter, which takes seconds for each; its tests have all."""
REACHED = (
    *("prime_sizes", "rate_above_the_map", "row_windows", "kernel_5x5", "outputs_not_of_16"),
    *("aspp", "in_place_channel_slice"),  # whose channels are whole 16 bytes
)
"""Problems on which NaN and Inf are followed."""


def _aspp(
    name: str, shape: tuple[int, int, int, int], outs: int, *rates: int, last: bool = False
) -> Problem:
    branches = (Branch(outs, (1, 1)), *(Branch(outs, (3, 3), (rate, rate)) for rate in rates))
    return Problem(name, shape, branches, *["channels_last" if last else "contiguous"] * 2)


REAL = {
    "cuda": (
        _aspp("real 2048 channels, 33x33", (1, 2048, 33, 33), 256, 6, 12, 18),
        _aspp("real 512 channels, 64x128", (2, 512, 64, 128), 256, 6, 12, 18),
        _aspp("real odd, 97x97", (1, 203, 97, 97), 256, 12, 24, 36),
        _aspp("real channels_last, 65x65", (2, 2048, 65, 65), 256, 12, 24, 36, last=True),
    ),
    "cpu": (
        _aspp("real 320 channels, 33x33", (1, 320, 33, 33), 48, 6, 12, 18),
        _aspp("real channels_last, 17x65", (2, 128, 17, 65), 32, 6, 12, last=True),
        _aspp("real 2048 channels, 9x13", (1, 2048, 9, 13), 40, 6),
    ),
}
SLOW = (_aspp("40 channels, 11x11", (1, 40, 11, 11), 24, 3, 6),)
"""As real as emulated and interpreted kernels can compute in seconds."""
NORMED = replace(PROBLEMS["aspp"], name="aspp 24x24", shape=(2, 16, 24, 24))
"""With pixels enough for statistics."""


@dataclass(frozen=True)
class Subject:
    """What is judged: a cell on a device."""

    cell: Cell
    device: str
    beat: Beat = lambda doing="", patience=1: None
    called: set[str] = field(
        default_factory=set, compare=False
    )  # operators, whose kernels are compiled by now

    @property
    def dtype(self) -> torch.dtype:
        name = self.cell.precision
        return torch.float32 if name == "tf32" else getattr(torch, name)

    @property
    def tf32(self) -> bool:
        return self.cell.precision == "tf32"

    @property
    def implementation(self) -> str:
        return self.cell.implementation.split()[0]

    @property
    def is_slow(self) -> bool:
        return self.is_interpreted or _native.emulated

    @property
    def is_interpreted(self) -> bool:
        return self.implementation == "triton" and _triton.interpreted

    @property
    def problems(self) -> Sequence[Problem]:
        """Of the table."""
        names = INTERPRETED if self.is_interpreted else PROBLEMS
        return [PROBLEMS[name] for name in names]

    @property
    def real(self) -> tuple[Problem, ...]:
        return SLOW if self.is_slow else REAL[torch.device(self.device).type]

    def call(self, op: Op) -> Callable[..., Any]:
        """An operator of the table as the implementation computes it, done when it returns."""
        kind = torch.device(self.device).type
        operator = op.operator(TRITON) if self.implementation == "triton" else op.native

        def call(*arguments: Any) -> Any:
            if op.name == "aspp_inference":
                return op.implementations(kind)[self.implementation](*arguments)
            return operator(*arguments, self.tf32)

        return lambda *arguments: self.watched(lambda: call(*arguments), op.name)

    def watched(self, call: Callable[[], T], name: str) -> T:
        """What is ours, done when it returns, which takes longer only the first time."""
        jit = self.implementation == "triton"  # whose kernels are made for dtypes and alignments
        self.beat(patience=1 if name in self.called and not jit else COMPILING)
        self.called.add(name)
        result = call()
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.beat(patience=PYTORCH)
        return result

    def rounded(self, arguments: Any) -> Any:
        """What PyTorch gets as a yardstick: cuDNN may choose not to multiply in TF32 where it may,
        but operands of eleven bits are as inexact either way."""
        return of_eleven_bits(arguments) if self.tf32 else arguments

    @property
    def ways(self) -> tuple[str, ...]:
        """Through which a separable forward may go: "" is its own choice."""
        own = self.implementation == "cuda" or (self.implementation == "cpu" and _native.emulated)
        return ("", "fused", "stored") if own else ("",)


@contextlib.contextmanager
def precision_of(subject: Subject) -> Iterator[None]:
    """PyTorch's switches as the cell has them; its own convolutions obey them, too."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = "tf32" if subject.tf32 else "ieee"
    try:
        if subject.tf32 != switches.convolution:
            raise RuntimeError("PyTorch does not take its switch for TF32")
        yield
    finally:
        conv.fp32_precision = before


def judge(subject: Subject) -> float:
    """Returns the largest error as a multiple of PyTorch's.

    Raises:
        Failure: with what is wrong.
    """
    with precision_of(subject):
        names = NAMES[subject.cell.operator, subject.cell.mode]
        for name in names:
            _check_integers(subject, name)
        for name in names:
            _check_reach(subject, name)
            _check_repeats(subject, name)
        multiple = max(_check_errors(subject, name) for name in names)
        if subject.cell.mode == "training":
            multiple = max(multiple, _check_training(subject))
        return multiple


def _check_integers(subject: Subject, name: str) -> None:
    op, call = OPS[name], subject.call(OPS[name])
    ways = subject.ways if op.name == "atrous_separable_pyramid" else ("",)

    def check(problem: Problem) -> None:
        arguments = op.make(problem, subject.dtype, integer=True, device=subject.device)
        checks.check_integers(call, op, arguments)

    real = () if _rounds_twice(subject, name) else subject.real
    for problem, way in itertools.product((*subject.problems, *real), ways):
        if op.exact(problem) and not (subject.is_slow and problem.name == "kernel_63x63"):
            with separable_way(way), _allowing_no_kernel(way), _threads_for(problem):
                examine(subject, name, problem, check, way)


def _rounds_twice(subject: Subject, name: str) -> bool:
    """On the CPU oneDNN computes gradients in 16 bits, one branch after the other, and each is
    rounded before it is added, as PyTorch adds them: exact while each is a small integer."""
    on_cpu = subject.implementation == "cpu" and not _native.emulated
    return on_cpu and name == "pyramid_grad_input" and subject.dtype.itemsize == 2


@contextlib.contextmanager
def _threads_for(problem: Problem) -> Iterator[None]:
    """PyTorch's threads where there is work for them; to wake them takes longer than the others."""
    before = torch.get_num_threads()
    n, c, h, w = problem.shape
    if n * c * h * w < 2**16:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _allowing_no_kernel(way: str) -> Iterator[None]:
    """A way that is asked for may have none for a shape, which it says; the others are tried."""
    try:
        yield
    except RuntimeError as error:
        if not (way and "the fused kernel cannot run" in str(error)):
            raise


def _reach(subject: Subject, name: str) -> tuple[bool, bool]:
    """(merged, at_least) of ``checks.check_reach``."""
    if subject.implementation == "cpu" and not _native.emulated:
        return False, "pyramid_grad" in name
    if subject.implementation == "triton":
        return name != "pyramid_grad_weight", name.startswith("separable_backward")
    return not (name == "pyramid_grad_weight" or name.startswith("separable")), False


def _check_reach(subject: Subject, name: str) -> None:
    op, call = OPS[name], subject.call(OPS[name])
    reach = _reach(subject, name)
    rectified = "between" in name or "epilogue" in name or "head" in name
    rectified = rectified and name != "head_linear"  # of -Inf a ReLU makes 0
    values = (torch.nan, torch.inf, *([] if rectified else [-torch.inf]))

    def check(problem: Problem) -> None:
        where = (problem, subject.dtype, subject.device)
        checks.check_reach(call, op, *where, *reach, values)

    for each in REACHED[: 1 if subject.is_interpreted else None]:
        with _threads_for(PROBLEMS[each]):
            examine(subject, name, PROBLEMS[each], check)


def _check_repeats(subject: Subject, name: str) -> None:
    op, call = OPS[name], subject.call(OPS[name])

    def check(problem: Problem) -> None:
        checks.check_repeats(call, op.make(problem, subject.dtype, device=subject.device))

    for problem in subject.real:
        examine(subject, name, problem, check)


def _check_errors(subject: Subject, name: str) -> float:
    op, call = OPS[name], subject.call(OPS[name])
    small = PROBLEMS["aspp"]

    def check(problem: Problem) -> float:
        if subject.dtype == torch.float64:
            checks.check_float64(call, op, problem, subject.device)
            return 0.0
        draws = 5 if problem is small and checks.is_gradient(op) else 1
        there = (subject.dtype, subject.device)
        return checks.check_error_law(call, op, problem, *there, draws, subject.rounded)

    return max(examine(subject, name, problem, check) for problem in (small, *subject.real))


def _check_training(subject: Subject) -> float:
    """What a batch norm in training needs of the pyramid."""
    on_cpu = subject.implementation == "cpu" and not _native.emulated
    if subject.cell.operator == "atrous_separable_pyramid":

        def check_norm(problem: Problem) -> float:
            there = (subject.dtype, subject.device, subject.implementation)
            around: Any = {"rounded": subject.rounded, "ours": subject.watched}
            return check_gradients(problem, *there, **around)

        return examine(subject, "separable_batch_norm", NORMED, check_norm)
    if on_cpu:
        return 0.0  # PyTorch computes the statistics
    op = OPS["pyramid"]
    family = TRITON if subject.implementation == "triton" else NATIVE

    def check_statistics(problem: Problem) -> None:
        arguments = op.make(problem, subject.dtype, device=subject.device)
        statistics = family.op("atrous_pyramid_statistics")
        made = (*arguments[:3], subject.tf32)
        y, mean, squares = subject.watched(lambda: statistics(*made), "statistics")
        if not torch.equal(y, subject.call(op)(*arguments)):
            raise checks.Wrong("result 0: other bits than without statistics")
        checks.assert_statistics(y, mean, squares)

    for problem in (PROBLEMS["aspp"], PROBLEMS["prime_sizes"], *subject.real):
        examine(subject, "pyramid_statistics", problem, check_statistics)
    return 0.0
