# SPDX-License-Identifier: BSD-3-Clause
"""The head as two dense pyramids, as it runs on CUDA: here by the CPU's operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from aspp_pairs import PAIRS, assert_all_close, features, train_step
from table import (
    EMULATED,
    LOW,
    SEEN,
    check_error_law,
    check_float64,
    check_integers,
    check_nan,
    dtype_id,
    each_dtype,
    is_representative,
)

import aspp_ext
from aspp_ext import dispatch
from aspp_ext.ops.formats import is_channels_last
from aspp_ext.ops.head_composed import aspp_inference
from aspp_ext.testing import OPS, PROBLEMS

HEAD = OPS["head"]
TIGHT = {"rtol": 1e-10, "atol": 1e-11}
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
STATISTICS = [p for p in PROBLEMS.values() if is_representative(p)]


@each_dtype
@each_problem
def test_integers_are_exact(problem, dtype) -> None:
    if HEAD.exact(problem):
        check_integers(aspp_inference, HEAD, HEAD.make(problem, dtype, integer=True))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=dtype_id)
@pytest.mark.parametrize("problem", STATISTICS, ids=lambda p: p.name)
def test_error_law(problem, dtype) -> None:
    check_error_law(aspp_inference, HEAD, problem, dtype, "cpu")


@each_problem
def test_float64(problem) -> None:
    check_float64(aspp_inference, HEAD, problem, "cpu")


@pytest.mark.skipif(EMULATED, reason="a NaN among the weights reaches more: see check_nan")
@pytest.mark.parametrize("name", SEEN)
def test_nan_reaches_exactly_what_sees_it(name) -> None:
    check_nan(aspp_inference, HEAD, PROBLEMS[name], torch.float32, "cpu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "outputs_last"])
def test_memory_format_is_the_input_s(layout, weight_layout) -> None:
    problem = replace(PROBLEMS["aspp"], layout=layout, weight_layout=weight_layout)
    arguments = HEAD.make(problem, torch.float32)
    got = aspp_inference(*arguments)
    assert is_channels_last(got) == is_channels_last(arguments[0])
    assert got.stride() == HEAD.native(*arguments).stride()


@pytest.fixture
def chosen(monkeypatch) -> None:
    """The composition takes the native head's place."""
    own = dispatch.IMPLEMENTATIONS["aspp_inference"]
    dense = [replace(i, call=aspp_inference) if i.name == "cpu" else i for i in own]
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "aspp_inference", tuple(dense))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, _, weights, self.rates, *rest = HEAD.make(PROBLEMS["aspp"], torch.float32)
        self.weights = torch.nn.ParameterList(weights).requires_grad_(False)
        self.rest = torch.nn.ParameterList(rest).requires_grad_(False)

    def forward(self, x):
        none, pairs = [None] * len(self.weights), dispatch.pairs(self.rates)
        return aspp_ext.aspp_inference(x, none, list(self.weights), pairs, *self.rest)


SIZES = [(2, 17, 19), (3, 8, 12), (4, 31, 5)]


def test_compile_once_for_all_sizes(chosen, fresh_compiler) -> None:
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (n, h, w) in enumerate(SIZES):
        x = torch.randn(n, 16, h, w)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, chosen, fresh_compiler) -> None:
    layer = Layer()
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with torch.no_grad():
        x = torch.randn(2, 16, 17, 17)
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,), strict=strict)
        targets = [str(n.target) for n in program.graph.nodes]
        assert targets.count("aspp_ext.atrous_pyramid.default") == 2
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


@pytest.mark.parametrize("name", [name for name in PAIRS if "separable" not in name])
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
