# SPDX-License-Identifier: BSD-3-Clause
"""What only Triton's kernels have to satisfy, run by its interpreter.

Statistics, sums that are cut into slices, real tiles, and faults that the tests have to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import statistics_checks as checks
import torch
from interpreting import overflow_refused, strange_memory_refused
from marks import on_interpreted
from table import CUT, call_of

from aspp_ext import _triton
from aspp_ext.ops.family import TRITON
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem, outputs
from aspp_ext.testing.checks import check_integers

if _triton.missing is not None:
    pytest.skip(_triton.missing, allow_module_level=True)

from triton.runtime import interpreter
from triton_shapes import kernels

from aspp_ext.triton import configurations, separable_configurations, target, work

pytestmark = on_interpreted
DENSE = ("pyramid", "pyramid_grad_input", "pyramid_grad_weight")
EVERY = (*DENSE, "pyramid_epilogue", "separable", "separable_backward_between")


@pytest.mark.quick(when=lambda name, dtype: name == "prime_sizes" and dtype != torch.float16)
@pytest.mark.parametrize(
    "name",
    ["prime_sizes", "one_pixel", "outputs_not_of_16", "x_sliced", "in_place_channel_slice"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_statistics(name, dtype) -> None:
    with strange_memory_refused():
        checks.check_statistics(PROBLEMS[name], dtype, False, "cpu")


def test_statistics_of_cut_sums() -> None:
    checks.check_statistics(CUT["pyramid"], torch.float32, True, "cpu")


@pytest.mark.prove
def test_statistics_otherwise() -> None:
    checks.check_large_mean(torch.float32, "cpu")
    checks.check_autocast("cpu")
    checks.check_batching("cpu")
    checks.check_refusals("cpu")


@pytest.mark.quick(when=lambda name: name == "one_pixel")
@pytest.mark.parametrize("name", ["one_branch", "weights_channels_last", "one_pixel"])
def test_statistics_operator(name) -> None:
    checks.check_operator(name, torch.bfloat16, "cpu")
    checks.check_operator(name, torch.float32, "cpu", grad=True)


@pytest.mark.quick(when=lambda name: name in ("pyramid", "separable"))
@pytest.mark.parametrize("name", EVERY)
def test_the_same_bits_every_time(name) -> None:
    op = OPS[name]
    for problem in (CUT[name], PROBLEMS["prime_sizes"]):
        arguments = op.make(problem, torch.float32)
        first, second = (outputs(call_of(op)(*arguments)) for _ in range(2))
        assert all(map(torch.equal, first, second))


@pytest.fixture
def found(monkeypatch) -> list[tuple[str, work.Work]]:
    """The pass and the work list of every launch from now on."""
    seen: list[tuple[str, work.Work]] = []
    find = work.find

    def spy(target: Any, pass_: str, *rest: Any) -> work.Work:
        seen.append((pass_, find(target, pass_, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(work, "find", spy)
    return seen


PASSES = ("forward", "grad_input", "grad_weight")


def test_the_table_has_cut_sums(monkeypatch, found) -> None:
    """In every dense pass, beside whole ones; CUT has those of the separable passes, too."""
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)
    for name, pass_ in zip(DENSE, PASSES, strict=True):
        found.clear()
        for problem in PROBLEMS.values():
            call_of(OPS[name])(*OPS[name].make(problem, torch.float32))
        cut = [w for p, w in found if p == pass_ and w.cut_count > 0]
        assert 3 <= len(cut) < len(found), f"{pass_}: {len(cut)} of {len(found)}"
    for name, problem in CUT.items():
        found.clear()
        call_of(OPS[name])(*OPS[name].make(problem, torch.float32))
        assert found[0][1].cut_count > 0, name


def test_the_table_launches_every_kernel(monkeypatch) -> None:
    """One that no call reaches would be proven by nothing."""
    launched = set()

    def launch(self: Any, *_: Any, **__: Any) -> None:
        launched.add(self.fn.__name__)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    for name, op in OPS.items():
        for problem in (PROBLEMS["prime_sizes"], *([CUT[name]] if name in CUT else [])):
            call_of(op)(*op.make(problem, torch.float32))
    statistics = TRITON.op("atrous_pyramid_statistics")
    statistics(*OPS["pyramid"].make(PROBLEMS["prime_sizes"], torch.float32)[:3])
    assert launched == kernels()


@pytest.mark.quick(when=lambda dtype: dtype == torch.float32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CUT)
def test_cut_sums_are_exact(name, dtype) -> None:
    op = OPS[name]
    with strange_memory_refused():
        check_integers(call_of(op), op, op.make(CUT[name], dtype, integer=True))


@pytest.mark.prove
def test_no_number_outgrows_its_type() -> None:
    for name in EVERY:
        arguments = OPS[name].make(PROBLEMS["kernel_7x1_3x5"], torch.float32)
        with overflow_refused():
            call_of(OPS[name])(*arguments)


@pytest.fixture
def told(monkeypatch) -> Callable[..., None]:
    """Gives kernels that take such an argument another one; a kernel that is named runs never."""
    call = interpreter.GridExecutor.__call__

    def tell(without: str = "", **changed: Callable[[dict[str, Any]], Any]) -> None:
        def spoilt(self: Any, *arguments: Any, **named: Any) -> None:
            new = {k: change(named) for k, change in changed.items() if k in named}
            if self.fn.__name__ != without:
                call(self, *arguments, **(named | new))

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", spoilt)

    return tell


def test_an_overflow_would_be_noticed(told) -> None:
    told(height=lambda named: 2**31 - 1)
    arguments = OPS["pyramid"].make(PROBLEMS["prime_sizes"], torch.float32)
    with overflow_refused(), pytest.raises(interpreter.InterpreterError, match="overflow"):
        call_of(OPS["pyramid"])(*arguments)


STRANGE = {
    "as many channels as there are from pixel to pixel": ("pyramid_grad_weight", "no element",
        {"channel_chunks": lambda named: named["b_chunks"]}),
    "a row more": ("pyramid", "no element", {"height": lambda named: named["height"] + 1}),
    "results further apart": ("pyramid_grad_input", "no element",
        {"out_chunks": lambda named: named["out_chunks"] + 1}),
    "no weights": ("separable", "nobody has written", {"without": "pack_kernel"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_strange_memory_would_be_noticed(name, told) -> None:
    op, said, fault = STRANGE[name]
    told(**fault)
    arguments = OPS[op].make(PROBLEMS["in_place_channel_slice"], torch.bfloat16)
    with strange_memory_refused(), pytest.raises(interpreter.InterpreterError, match=said):
        call_of(OPS[op])(*arguments)


@pytest.fixture
def as_on(monkeypatch) -> Iterator[Callable[[str, int], None]]:
    """Takes the tiles of another family, and so many processors."""

    def choose(family: str, processors: int) -> None:
        for module in (configurations, separable_configurations):
            tables = [t for t in vars(module).values() if isinstance(t, dict) and family in t]
            assert tables
            for table in tables:
                monkeypatch.setitem(table, "interpreter", table[family])
        monkeypatch.setattr(target, "INTERPRETER_PROCESSORS", processors)
        target.target_of.cache_clear()

    yield choose
    target.target_of.cache_clear()


TILED = Problem("tiled", (2, 72, 11, 13), (Branch(132, (1, 1)), Branch(40, (3, 3), (4, 5))))
HIGH = Problem("high", (1, 20, 64, 65), (Branch(40, (1, 1)), Branch(12, (1, 3), (2, 3))))


@pytest.mark.prove
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", [*DENSE, "separable", "separable_backward_between"])
def test_with_the_tiles_of_a_gpu(name, cut, as_on, found) -> None:
    as_on("sm_90", 132 if cut else 1)
    op = OPS[name]
    long = {"pyramid_grad_weight": HIGH, "pyramid": CUT["separable"]}.get(name, CUT[name])
    arguments = op.make(long if cut else TILED, torch.bfloat16, integer=True)
    with strange_memory_refused():
        check_integers(call_of(op), op, arguments)
    assert (found[0][1].cut_count > 0) == cut
