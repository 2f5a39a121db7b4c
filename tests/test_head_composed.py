# SPDX-License-Identifier: BSD-3-Clause
"""The head as pyramids, as it runs on GPUs: here by the CPU's operators."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from aspp_pairs import PAIRS, TIGHT, assert_all_close, features, train_step
from marks import on_cpu, on_native, proven_emulated, quick_emulated, varied
from table import LOW, SEEN, check_error_law, dtype_id, each_dtype

import aspp_ext
from aspp_ext import dispatch, reference
from aspp_ext.ops.formats import is_channels_last
from aspp_ext.ops.head_composed import aspp_inference
from aspp_ext.testing import OPS, PROBLEMS, Op
from aspp_ext.testing.checks import check_float64, check_integers, check_reach, is_representative

pytestmark = [proven_emulated, on_native, varied]

HEAD = OPS["head"]
HEADS = {name: op for name, op in OPS.items() if name.startswith("head")}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
STATISTICS = [p for p in PROBLEMS.values() if is_representative(p)]


@quick_emulated(lambda problem: problem.name == "prime_sizes")
@each_dtype
@each_problem
@each_head
def test_integers_are_exact(head, problem, dtype) -> None:
    if head.exact(problem):
        check_integers(aspp_inference, head, head.make(problem, dtype, integer=True))


@each_dtype
def test_integers_of_both_kinds_of_branches_are_exact(dtype) -> None:
    """A dense 3x3 among separable branches, which no pyramid has together."""
    problem = next(p for p in PROBLEMS.values() if HEAD.exact(p) and len(p.branches) > 1)
    x, depthwise, weights, *rest = HEADS["head_separable"].make(problem, dtype, integer=True)
    for at in range(len(weights)):
        given, mixed = list(depthwise), list(weights)
        given[at] = x.new_empty(0)
        mixed[at] = torch.randint(-1, 2, (*weights[at].shape[:2], 3, 3)).to(dtype)
        check_integers(aspp_inference, HEADS["head_separable"], (x, given, mixed, *rest))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=dtype_id)
@pytest.mark.parametrize("problem", STATISTICS, ids=lambda p: p.name)
@each_head
def test_error_law(head, problem, dtype) -> None:
    check_error_law(aspp_inference, head, problem, dtype, "cpu")


@quick_emulated(lambda problem: problem.name == "in_place_channel_slice")
@each_problem
@each_head
def test_float64(head, problem) -> None:
    check_float64(aspp_inference, head, problem, "cpu")


@on_cpu  # emulated, a NaN among the weights reaches more: see check_reach
@pytest.mark.parametrize("name", SEEN)
@each_head
def test_nan_reaches_exactly_what_sees_it(head, name) -> None:
    check_reach(aspp_inference, head, PROBLEMS[name], torch.float32, "cpu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "outputs_last"])
@each_head
def test_memory_format_is_the_input_s(head, layout, weight_layout) -> None:
    problem = replace(PROBLEMS["aspp"], layout=layout, weight_layout=weight_layout)
    arguments = head.make(problem, torch.float32)
    got = aspp_inference(*arguments)
    assert is_channels_last(got) == is_channels_last(arguments[0])
    assert got.stride() == head.native(*arguments).stride()


@pytest.fixture
def chosen(monkeypatch) -> None:
    """The composition takes the native head's place."""
    own = dispatch.IMPLEMENTATIONS["aspp_inference"]
    composed = [replace(i, call=aspp_inference) if i.name == "cpu" else i for i in own]
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "aspp_inference", tuple(composed))


def flags(rest: list[Any]) -> dict[str, bool]:
    """Of a head's arguments behind the rates those that turn activations off."""
    return dict(zip(("relu", "project_relu"), rest[8:] or (True, True), strict=True))


def activations(rest: list[Any]) -> dict[str, str | None]:
    """The same as the public function takes them."""
    names = {"relu": "activation", "project_relu": "project_activation"}
    return {names[name]: "relu" if on else None for name, on in flags(rest).items()}


class Layer(torch.nn.Module):
    def __init__(self, head: Op = HEAD) -> None:
        super().__init__()
        _, depthwise, weights, self.rates, *rest = head.make(PROBLEMS["aspp"], torch.float32)
        self.depthwise = torch.nn.ParameterList(depthwise).requires_grad_(False)
        self.weights = torch.nn.ParameterList(weights).requires_grad_(False)
        *others, shift = rest[:5]
        if shift is not None and shift.dim() == 2:  # of a batch, which is of another size here
            shift = shift[0]
        self.rest = torch.nn.ParameterList([*others, shift]).requires_grad_(False)
        self.activations = activations(rest)

    def forward(self, x):
        given, pairs = (
            [d if d.numel() else None for d in self.depthwise],
            dispatch.pairs(self.rates),
        )
        return aspp_ext.aspp_inference(
            x, given, list(self.weights), pairs, *self.rest, **self.activations
        )


SIZES = [(2, 17, 19), (3, 8, 12), (4, 31, 5)]


@each_head
def test_compile_once_for_all_sizes(head, chosen, fresh_compiler) -> None:
    layer = Layer(head)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (n, h, w) in enumerate(SIZES):
        x = torch.randn(n, 16, h, w)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
@each_head
def test_export(head, strict, chosen, fresh_compiler) -> None:
    layer = Layer(head)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with torch.no_grad():
        x = torch.randn(2, 16, 17, 17)
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,), strict=strict)
        targets = [str(n.target) for n in program.graph.nodes]
        pyramids = 1 if layer.rest[3] is None else 2
        assert sum("aspp_ext.atrous_" in target for target in targets) == pyramids
        for n, h, w in SIZES:
            x = torch.randn(n, 16, h, w)
            torch.testing.assert_close(program.module()(x), layer(x))


def test_autocast(chosen) -> None:
    layer, x = Layer(), torch.randn(2, 16, 9, 9)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    expected = layer.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("last", [False, True])
def test_modules(name, last, chosen) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    original, ours = (m.eval().to(memory_format=layout) for m in PAIRS[name].build())
    x = features().contiguous(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), original(x), **TIGHT)
        assert ours(x).is_contiguous(memory_format=layout)
    assert_all_close(train_step(ours.train(), x), train_step(original.train(), x), **TIGHT)


def test_an_empty_batch() -> None:
    assert aspp_inference(*HEAD.make(PROBLEMS["empty_batch"], torch.float32)).shape[0] == 0


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_the_result_lies_in_memory_as_asked(head, asked, backend) -> None:
    """By the kernel, by what composes it, by the reference and in the fake."""
    problem = next(p for p in PROBLEMS.values() if is_representative(p))
    x, depthwise, weights, rates, *rest = head.make(problem, torch.float32, integer=True)
    none = [d if d.numel() else None for d in depthwise]
    pairs = list(zip(rates[::2], rates[1::2], strict=True))
    for last in (False, True):
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        public = partial(
            aspp_ext.aspp_inference, x, none, weights, pairs, *rest[:5], **activations(rest)
        )
        expected = public(backend=backend)
        with torch.no_grad():
            got = public(backend=backend, channels_last=asked)
        direct = {"channels_last": asked, **flags(rest)}
        composed = aspp_inference(x, depthwise, weights, rates, *rest[:5], **direct)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            fake = head.native(x, depthwise, weights, rates, *rest[:5], **direct)
        assert torch.equal(got, expected)
        for result in (got, composed, fake):
            assert is_channels_last(result) == (last if asked is None else asked)


@pytest.mark.parametrize("width", [1, 15, 16, 17])
@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW], ids=dtype_id)
def test_infinity_stays_what_it_is(separable, width, dtype) -> None:
    """Not NaN, by what pads a branch to whole vectors."""

    def ones(*shape):
        return torch.ones(shape, dtype=dtype)

    for value in (torch.inf, -torch.inf):
        x = ones(1, 3, 4, 5)
        x[0, 1, 2, 3] = value
        depthwise, kernel = (ones(3, 1, 3, 3), 1) if separable else (None, 3)
        weights = [ones(width, 3, kernel, kernel), ones(width, 3, 1, 1)]
        call = (x, [depthwise, None], weights, [1, 1], ones(2 * width), None, None)
        call = (*call, ones(2, 2 * width), ones(2))
        got = aspp_ext.aspp_inference(*call)
        assert torch.equal(got, reference.aspp_inference(*call))
        assert got.isinf().any() == (value > 0)
