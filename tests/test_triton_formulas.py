# SPDX-License-Identifier: BSD-3-Clause
"""Everything that is derived from Triton's operators is computed by Triton's operators.

Here they compute twice what the native ones do. That is a family of its own, whose derivatives are
right where, and only where, the formula of no order has a native operator in it. No kernel runs.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from pretending import Calls
from test_autocast import test_gradients_are_those_of_the_cast as check_autocast
from test_backward import FUNCTIONS, LINEAR, leaf
from test_compile import SIZES, Layer, assert_same_step
from test_second_order import LOSSES, MODULES, NESTED, every, same, separable_loss, values
from torch import Tensor, func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

import aspp_ext
from aspp_ext import _triton, dispatch, reference
from aspp_ext.ops.family import FAMILIES, NATIVE, TRITON
from aspp_ext.testing import OPS, PROBLEMS, outputs

DIFFERENTIABLE = [name for name in OPS if not name.startswith("head")]
each_kind = pytest.mark.parametrize("separable", [False, True], ids=["pyramid", "separable"])
each_loss = pytest.mark.parametrize(("loss", "shapes"), LOSSES.values(), ids=LOSSES.keys())


def doubled(name: str) -> Any:
    """The native operator of the doubled weights, or gradient: what is behind it is as it was."""
    at = {"atrous_pyramid": 1, "atrous_separable_pyramid": 2}.get(name, 0)

    def call(*arguments: Any) -> Any:
        twice = tree_map_only(Tensor, lambda t: 2 * t, arguments[at])
        return NATIVE.op(name)(*arguments[:at], twice, *arguments[at + 1 :])

    return call


def statistics(*arguments: Any) -> Any:
    y = doubled("atrous_pyramid")(*arguments[:3])
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    return y, mean, var * (y.numel() // y.shape[1])


class Doubled:
    """The reference of this family, for a call without an epilogue."""

    @staticmethod
    def atrous_pyramid(*arguments: Any) -> Tensor:
        return 2 * reference.atrous_pyramid(*arguments)

    @staticmethod
    def atrous_separable_pyramid(*arguments: Any) -> Tensor:
        return 2 * reference.atrous_separable_pyramid(*arguments)


@pytest.fixture(autouse=True)
def family(monkeypatch) -> None:
    operators = types.ModuleType("aspp_ext.triton.operators")
    for name in {op.name for op in OPS.values()} - {"aspp_inference"}:
        setattr(operators, name, doubled(name))
    operators.atrous_pyramid_statistics = statistics
    package = types.ModuleType("aspp_ext.triton")
    package.operators = operators
    monkeypatch.setitem(sys.modules, "aspp_ext.triton", package)
    monkeypatch.setitem(sys.modules, "aspp_ext.triton.operators", operators)
    monkeypatch.setattr(_triton, "missing", None)
    monkeypatch.setattr(_triton, "interpreted", True)
    monkeypatch.setattr(_triton, "DTYPES", (*_triton.DTYPES, torch.float64))
    monkeypatch.setenv("ASPP_EXT_BACKEND", "triton")
    monkeypatch.setitem(MODULES, "reference", Doubled)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name) -> None:
    function, shapes = FUNCTIONS[name]
    leaves = [leaf(*s) for s in shapes]
    assert gradcheck(function, leaves, check_forward_ad=name in LINEAR)


@pytest.mark.parametrize("name", LINEAR)
def test_gradgradcheck(name) -> None:
    function, shapes = FUNCTIONS[name]
    over = name.startswith("pyramid")
    assert gradgradcheck(function, [leaf(*s) for s in shapes], check_fwd_over_rev=over)


def test_the_statistics_gradient() -> None:
    def result(x: Tensor, *weights: Tensor) -> Tensor:
        return TRITON.op("atrous_pyramid_statistics")(x, list(weights), [2, 2, 1, 3])[0]

    leaves = [leaf(1, 3, 4, 5), leaf(2, 3, 3, 3), leaf(1, 3, 1, 3)]
    assert gradcheck(result, leaves, check_forward_ad=True)
    assert gradgradcheck(result, leaves)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_native_operator_runs(name) -> None:
    function, shapes = FUNCTIONS[name]
    leaves = [leaf(*s) for s in shapes]
    with Calls() as calls:
        first = torch.autograd.grad(
            function(*leaves).pow(3).sum(), leaves, create_graph=name in LINEAR
        )
        if name in LINEAR:
            second = torch.autograd.grad(
                sum(g.pow(2).sum() for g in first), leaves, create_graph=True
            )
            torch.autograd.grad(sum(g.pow(2).sum() for g in second), leaves)
    assert len(calls.names) > (6 if name in LINEAR else 1)
    assert all(n.endswith(TRITON.suffix) for n in calls.names)


@each_loss
def test_jacobians(loss, shapes) -> None:
    for jacobian in (func.jacrev, func.jacfwd):
        same(lambda f, of=jacobian: of(f, every(shapes)), loss, values(*shapes))


@each_loss
@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED.keys())
def test_nested_transforms(nested, loss, shapes) -> None:
    if loss is separable_loss and nested is NESTED["jvp of grad"]:
        pytest.skip("refused in words: see test_second_order.py")
    x, *rest = values(*shapes)
    v = torch.randn_like(x)
    same(lambda f: lambda x, *rest: nested(lambda x: f(x, *rest), x, v), loss, [x, *rest])


@each_loss
@pytest.mark.parametrize("batched", ["x", "all"])
def test_vmap(loss, shapes, batched) -> None:
    in_dims = tuple(0 if batched == "all" or i == 0 else None for i in every(shapes))
    tensors = [
        torch.randn((3, *s) if d == 0 else s, dtype=torch.float64)
        for s, d in zip(shapes, in_dims, strict=True)
    ]
    same(lambda f: func.vmap(func.grad(f, every(shapes)), in_dims), loss, tensors)


@each_kind
def test_compile_with_gradients_once_for_all_sizes(separable, fresh_compiler) -> None:
    layer, seen = Layer(separable), set()

    def collect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        seen.update(t.split(".")[1] for t in targets if t.startswith("aspp_ext"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=collect, bw_compiler=collect)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for i, (n, h, w) in enumerate(SIZES):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same_step(compiled, layer, torch.randn(n, 5, h, w))
    kind = "separable_pyramid" if separable else "pyramid"
    faces = ["", "_backward"] if separable else ["", "_grad_input", "_grad_weight"]
    assert seen == {f"atrous_{kind}{face}{TRITON.suffix}" for face in faces}


@each_kind
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_for_training(separable, fresh_compiler) -> None:
    layer, x = Layer(separable), torch.randn(2, 5, 7, 9)
    module = torch.export.export(layer, (x,), strict=True).module()
    assert_same_step(module, layer, x)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck(name) -> None:
    op, arguments = OPS[name], OPS[name].make(PROBLEMS["kernel_1x3_3x1"], torch.float64)
    opcheck(op.operator(TRITON).default, arguments)
    if name != "separable_backward_between":
        leaves = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), arguments)
        opcheck(op.operator(TRITON).default, leaves)


@pytest.mark.parametrize("problem", ["x_channels_last", "weights_channels_last", "empty_batch"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_fakes_agree(name, problem) -> None:
    arguments = OPS[name].make(PROBLEMS[problem], torch.float16, device="meta")
    ours, theirs = (outputs(OPS[name].operator(f)(*arguments)) for f in FAMILIES)
    assert len(ours) == len(theirs)
    for g, e in zip(ours, theirs, strict=True):
        assert (g.shape, g.stride(), g.dtype) == (e.shape, e.stride(), e.dtype)


@each_kind
def test_autocast(separable) -> None:
    check_autocast(separable)


@pytest.mark.parametrize("kind", ["dense", "separable", "mixed"])
def test_head(kind) -> None:
    """Its branches and its projection are doubled; of the pooled branch only that is no pyramid."""
    op = OPS["head" if kind == "dense" else "head_separable"]
    x, depthwise, weights, rates, shift, *pool, project, end = op.make(
        PROBLEMS["aspp"], torch.float64
    )
    if kind == "mixed":
        depthwise[2], weights[2] = depthwise[0], torch.randn(16, 16, 3, 3, dtype=torch.float64)
    pairs, none = dispatch.pairs(rates), [d if d.numel() else None for d in depthwise]
    with Calls() as calls:
        got = aspp_ext.aspp_inference(x, none, weights, pairs, shift, *pool, project, end)
    assert all(n.endswith(TRITON.suffix) for n in calls.names)
    twice = torch.cat([2 * project[:, : shift.numel()], project[:, shift.numel() :]], 1)
    expected = reference.aspp_inference(
        x, none, [2 * w for w in weights], pairs, shift, *pool, twice, end
    )
    torch.testing.assert_close(got, expected)
