# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_separable_pyramid_batch_norm``: by PyTorch's operators and, emulated, by the CUDA
kernels."""

from __future__ import annotations

import copy
from typing import Any

import norm_checks as checks
import pytest
import torch
from marks import on_emulated, on_native
from norm_checks import made, operator
from table import LOW, dtype_id
from test_emulated_calls import Emulation, kernels
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_map_only

from aspp_ext.ops import (
    atrous_separable_pyramid,
    atrous_separable_pyramid_batch_norm,
    separable_norm,
)
from aspp_ext.testing import DTYPES, PROBLEMS, Branch, Problem
from aspp_ext.testing.batch_norm import check_gradients

pytestmark = on_native

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
exact_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=dtype_id)
SMALL = Problem("small", (2, 2, 3, 4), (Branch(1, (1, 1)), Branch(2, (3, 3), (2, 3)), Branch(1)))
MANY = Problem(
    "many", (2, 24, 13, 15), (Branch(40), Branch(24, (1, 1)), Branch(40, (3, 3), (4, 5)))
)
OP = "atrous_separable_pyramid_batch_norm"


@on_emulated
@each_dtype
@checks.each_filled
def test_statistics(problem, dtype) -> None:
    checks.check_statistics(problem, dtype, "cpu")


@on_emulated
@exact_dtype
@checks.each_filled
def test_stored_integers_are_exact(problem, dtype) -> None:
    checks.check_stored_integers(problem, dtype, "cpu")


@on_emulated
@checks.each_path
@exact_dtype
@checks.each_filled
def test_integers_are_exact(problem, dtype, path) -> None:
    checks.check_integers(problem, dtype, "cpu", path)


@on_emulated
@checks.each_path
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=dtype_id)
@pytest.mark.parametrize("problem", [PROBLEMS["aspp"], MANY], ids=lambda p: p.name)
def test_error_law(problem, dtype, path) -> None:
    checks.check_error_law(problem, dtype, "cpu", path)


@on_emulated
@checks.each_store
@checks.each_shape
def test_float64(name, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    checks.check_against_torch(PROBLEMS[name], torch.float64, "cpu", 1e-11)


@on_emulated
@checks.each_store
@checks.each_shape
def test_float32(name, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    checks.check_against_torch(PROBLEMS[name], torch.float32, "cpu", 1e-5)


@on_emulated
@checks.each_store
def test_without_an_activation(store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        checks.check_against_torch(MANY, dtype, "cpu", tolerance, activation_between=None, eps=0.1)


@on_emulated
@checks.each_store
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_low_precision(dtype, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    check_gradients(MANY, dtype, "cpu")


@on_emulated
@checks.each_store
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_a_large_mean_costs_few_digits(dtype, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    checks.check_large_mean(dtype, "cpu")


@checks.each_store
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradcheck(activation, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    call = made(SMALL, torch.float64, "cpu").map(lambda t: t.detach().requires_grad_())
    given = call.leaves

    def result(*leaves: Tensor) -> Tensor:
        replaced = dict(zip(map(id, given), leaves, strict=True))
        return call.map(lambda t: replaced[id(t)])(activation_between=activation)[0]

    assert gradcheck(result, given)


@on_emulated
def test_each_gradient_alone_is_the_same() -> None:
    call = made(MANY, torch.float32, "cpu")
    grad = torch.randn(2, 104, 13, 15)
    _, _, _, *together = call.gradients(grad)
    for i, expected in enumerate(together):
        for j, leaf in enumerate(call.leaves):
            leaf.requires_grad_(i == j)
        (alone,) = torch.autograd.grad(call()[0], [call.leaves[i]], grad)
        assert torch.equal(alone, expected)


def test_it_is_what_modules_compute() -> None:
    """y, gradients and running statistics of depthwise, BatchNorm2d, ReLU and pointwise."""
    call = made(PROBLEMS["aspp"], torch.float64, "cpu")
    results, norms = [], []
    x = call.x.detach().requires_grad_()
    for d, p, rate, pair in zip(
        call.depthwise, call.pointwise, call.rates, call.norms, strict=True
    ):
        operand = x
        if d is not None:
            norm = nn.BatchNorm2d(x.size(1), eps=1e-3, momentum=1.0, dtype=torch.float64)
            norms.append(norm)
            for t, value in zip((norm.weight, norm.bias), pair, strict=True):
                t.data.copy_(t if value is None else value)
            e = nn.functional.conv2d(x, d, None, 1, rate, rate, x.size(1))
            operand = norm(e).relu()
        else:
            norms.append(None)
        results.append(nn.functional.conv2d(operand, p))
    expected = torch.cat(results, 1)
    ours = copy.copy(call)
    ours.x = call.x.detach().requires_grad_()
    y, mean, squares = ours(eps=1e-3)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    (got,) = torch.autograd.grad(y.sum(), ours.x)
    (want,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    count = x.numel() // x.size(1)
    assert not mean.requires_grad
    assert not squares.requires_grad
    for norm, m, s in zip(norms, mean.split(x.size(1)), squares.split(x.size(1)), strict=True):
        if norm is not None:
            torch.testing.assert_close(m, norm.running_mean)
            torch.testing.assert_close(s / (count - 1), norm.running_var)


@pytest.mark.parametrize("name", ["x_channels_last", "weights_channels_last", "one_branch"])
def test_memory_format(name) -> None:
    call = made(PROBLEMS[name], torch.float32, "cpu")
    expected = atrous_separable_pyramid(call.x, call.depthwise, call.pointwise, call.rates)
    for backend in (None, "reference"):
        assert call(backend=backend)[0].stride() == expected.stride()


def test_the_reference_differentiates_twice() -> None:
    call = made(SMALL, torch.float64, "cpu")
    leaves = [t.detach().requires_grad_() for t in call.leaves[:2]]

    def result(x: Tensor, p: Tensor) -> Tensor:
        replaced = copy.copy(call)
        replaced.x = x
        replaced.depthwise = [None, p, call.depthwise[2]]
        return replaced(backend="reference", activation_between=None)[0]

    assert gradgradcheck(result, leaves)


@on_emulated
def test_second_derivatives_are_refused() -> None:
    call = made(SMALL, torch.float64, "cpu").map(lambda t: t.detach().requires_grad_())
    y = call()[0]
    grads = torch.autograd.grad(y.square().sum(), call.leaves, create_graph=True)
    assert torch.equal(grads[0], torch.autograd.grad(call()[0].square().sum(), call.x)[0])
    sentence = f"{OP}: second derivatives are not available; use backend='reference'"
    for g in grads:
        with pytest.raises(NotImplementedError) as refusal:
            torch.autograd.grad(g.sum(), call.leaves, retain_graph=True, allow_unused=True)
        assert str(refusal.value) == sentence


@on_emulated
@pytest.mark.parametrize("step", ["statistics", "", "_sums", "_backward"])
def test_the_steps_have_no_gradient(step) -> None:
    x, depthwise, pointwise, rates = checks.SEPARABLE.make(SMALL, torch.float32)[:4]
    vectors = checks.affine(SMALL, torch.float32, "cpu", False)
    common = (x.requires_grad_(), depthwise, pointwise, rates, *vectors, True)
    grad = torch.randn(2, SMALL.out_channels, 3, 4)
    arguments = {
        "statistics": (x, depthwise, rates),
        "": (*common, []),
        "_sums": (grad, *common),
        "_backward": (grad, *common, *vectors, True, True, True),
    }
    with pytest.raises(NotImplementedError, match=f"it is a step of {OP}, which has the gradient"):
        operator(step)(*arguments[step])


@on_emulated
@pytest.mark.parametrize(
    "name",
    ["one_branch", "prime_sizes", "x_channels_last", "x_sliced", "in_place_channel_slice"],
)
def test_opcheck(name) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        checks.check_operators(name, dtype, "cpu")


@on_emulated
def test_batching() -> None:
    """Each sample of a vmap has statistics of its own."""
    x, depthwise, _, rates = checks.SEPARABLE.make(MANY, torch.float32)[:4]
    got = torch.func.vmap(lambda x: operator("statistics")(x, depthwise, rates, True))(x[:, None])
    for i in range(x.shape[0]):
        mean, squares, stored = operator("statistics")(x[i : i + 1], depthwise, rates, True)
        assert torch.equal(got[0][i], mean)
        assert torch.equal(got[1][i], squares)
        assert all(torch.equal(g[i], e) for g, e in zip(got[2], stored, strict=True))


@on_emulated
@pytest.mark.parametrize("wish", ["fused", "stored"])
def test_the_environment_decides(wish, go) -> None:
    """Computed again the fused kernel runs behind the statistics; stored, a pass per branch."""
    emulation = Emulation()
    go(wish)
    call = made(MANY, torch.bfloat16, "cpu")
    _, events = emulation.calls_of(call)
    found = kernels(events)
    others = {k: n for k, n in found.items() if not k.startswith(("transpose", "pack"))}
    forward = {"separable_kernel": 1, "depthwise_kernel": 1}
    if wish == "stored":
        forward = {"pyramid_kernel": 1, "depthwise_kernel": 3}
    assert others == forward | {"combine_kernel": 1}


@on_emulated
def test_the_planner_decides(monkeypatch) -> None:
    seen = []

    def spy(*arguments: Any) -> bool:
        seen.append(stores(*arguments))
        return seen[-1]

    stores = separable_norm._stores
    monkeypatch.delenv("ASPP_EXT_SEPARABLE", raising=False)
    monkeypatch.setattr(separable_norm, "_stores", spy)
    made(Problem("dead taps", (1, 8, 9, 9), (Branch(8, (3, 3), (6, 6)),)), torch.float64, "cpu")()
    made(Problem("live taps", (1, 8, 9, 9), (Branch(8, (3, 3), (1, 1)),)), torch.float64, "cpu")()
    assert seen == [False, True]


@pytest.mark.quick(when=lambda layout: layout == torch.channels_last)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled(layout, fresh_compiler) -> None:
    function = torch.compile(
        lambda call: call()[0], fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for shape in ((2, 24, 13, 15), (3, 24, 8, 9)):
        problem = Problem("compiled", shape, MANY.branches)
        call = made(problem, torch.float64, "cpu").map(lambda t: t.detach().requires_grad_())
        call.x = call.x.detach().contiguous(memory_format=layout).requires_grad_()
        grad = torch.randn(shape[0], 104, *shape[2:], dtype=torch.float64)
        got, expected = function(call), call()[0]
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        assert got.stride() == expected.stride()
        pair = [torch.autograd.grad(y, call.leaves, grad) for y in (got, expected)]
        torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-11)


def test_autocast() -> None:
    call = made(MANY, torch.float32, "cpu").map(lambda t: t.detach().requires_grad_())
    low = call.map(lambda t: t.detach().bfloat16())
    low.norms = call.norms
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, squares = call()
    assert (y.dtype, mean.dtype, squares.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert all(map(torch.equal, (y, mean, squares), low()))
    grads = torch.autograd.grad(y.float().square().sum(), call.leaves)
    assert all(g.dtype == torch.float32 for g in grads)


def t(*shape: int, **how: Any) -> Tensor:
    return torch.zeros(*shape, **how)


VALID = {
    "x": t(2, 6, 5, 7),
    "depthwise_weights": [t(6, 1, 3, 3), None],
    "pointwise_weights": [t(4, 6, 1, 1), t(3, 6, 1, 1)],
    "atrous_rates": [(2, 3), 1],
    "norms": [(t(6), t(6)), None],
}
D, P, N = VALID["depthwise_weights"][0], VALID["pointwise_weights"], VALID["norms"][0]
F64, BF16 = torch.float64, torch.bfloat16
META = {"device": "meta"}
BAD = {
    "no tensor": (TypeError, {"x": 3}, "x must be a tensor, got int"),
    "rank": (ValueError, {"x": t(6, 5, 7)}, "x must be [N, C, H, W], got shape [6, 5, 7]"),
    "one value": (ValueError, {"x": t(1, 6, 1, 1)},
        "x must have more than 1 value per channel in training, got shape [1, 6, 1, 1]"),
    "no value": (ValueError, {"x": t(0, 6, 5, 7)},
        "x must have more than 1 value per channel in training, got shape [0, 6, 5, 7]"),
    "no list": (TypeError, {"depthwise_weights": D},
        "depthwise_weights must be a list with one entry per branch, got Tensor"),
    "even kernel": (ValueError, {"depthwise_weights": [t(6, 1, 2, 3), None]},
        "depthwise_weights[0] must have odd kernel sizes, got 2x3"),
    "channels": (ValueError, {"pointwise_weights": [P[0], t(3, 5, 1, 1)]},
        "pointwise_weights[1] has 5 input channels but x has 6"),
    "dtype": (TypeError, {"x": t(2, 6, 5, 7, dtype=BF16)},
        "pointwise_weights[0] must have x's dtype bfloat16, got float32"),
    "rate": (ValueError, {"atrous_rates": [0, 1]}, "atrous_rates[0] must be >= 1, got 0"),
    "norms no list": (TypeError, {"norms": None},
        "norms must be a list with one entry per branch, got NoneType"),
    "fewer norms": (ValueError, {"norms": [N]},
        "norms must have one entry per branch, got 1 for 2 branches"),
    "norm no pair": (TypeError, {"norms": [t(6), None]},
        "norms[0] must be None or (weight, bias), got Tensor"),
    "norm missing": (ValueError, {"norms": [None, None]},
        "norms[0] must be (weight, bias) where the branch has a depthwise weight, got None"),
    "norm of a plain branch": (ValueError, {"norms": [N, N]},
        "norms[1] must be None where the branch has no depthwise weight, got a pair"),
    "norm no tensor": (TypeError, {"norms": [(1.0, None), None]},
        "norms[0] weight must be a tensor, got float"),
    "norm too short": (ValueError, {"norms": [(t(6), t(5)), None]},
        "norms[0] bias must have one value per channel (6), got shape [5]"),
    "norm in float64": (TypeError, {"norms": [(t(6, dtype=F64), None), None]},
        "norms[0] weight must have dtype float32 beside x, got float64"),
    "norm elsewhere": (ValueError, {"norms": [(t(6, **META), None), None]},
        "norms[0] weight must be on x's device cpu, got meta"),
    "activation": (ValueError, {"activation_between": "gelu"},
        "activation_between must be None or 'relu', got 'gelu'"),
    "eps": (ValueError, {"eps": 0.0}, "eps must be above 0, got 0.0"),
    "eps nan": (ValueError, {"eps": float("nan")}, "eps must be above 0, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("why", BAD)
def test_bad_input(why, backend) -> None:
    kind, change, sentence = BAD[why]
    with pytest.raises(kind) as refusal:
        atrous_separable_pyramid_batch_norm(**(VALID | change), backend=backend)
    assert str(refusal.value) == f"{OP}: {sentence}"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference"):
        atrous_separable_pyramid_batch_norm(**VALID, backend="tpu")


@on_emulated
def test_forward_mode_and_transforms_are_pytorchs() -> None:
    call = made(SMALL, torch.float64, "cpu")

    def result(x: Tensor) -> Tensor:
        moved = copy.copy(call)
        moved.x = x
        return moved(activation_between=None)[0]

    x, tangent = call.x, torch.randn_like(call.x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        got = forward_ad.unpack_dual(result(dual)).tangent
    difference = (result(x + 1e-6 * tangent) - result(x - 1e-6 * tangent)) / 2e-6
    torch.testing.assert_close(got, difference, rtol=1e-6, atol=1e-6)
    leaf = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(result(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: result(x).square().sum())(x), expected)


STEPS: dict[str, dict[str, Any]] = {
    "statistics": {"x": t(2, 6, 5, 7), "depthwise": [D, t(0)], "rates": [2, 3, 1, 1]},
    "": {
        "x": t(2, 6, 5, 7),
        "depthwise": [D, t(0)],
        "pointwise": P,
        "rates": [2, 3, 1, 1],
        "scale": t(12),
        "shift": t(12),
        "relu": True,
        "stored": [t(2, 6, 5, 7)],
    },
}
STEPS["_sums"] = {"grad": t(2, 7, 5, 7), **STEPS[""]}
del STEPS["_sums"]["stored"]
STEPS["_backward"] = STEPS["_sums"] | {"a": t(12), "b": t(12)}
STEPS["_backward"] |= {"need_x": True, "need_depthwise": True, "need_pointwise": True}
EACH = "must have one value per branch and channel (12), got shape"
BAD_STEPS = [
    ("statistics", {"x": t(0, 6, 5, 7)}, "statistics need at least one sample, got a batch of 0"),
    ("statistics", {"depthwise": [], "rates": []},
        "depthwise_weights must hold at least one branch, got an empty list"),
    ("statistics", {"rates": [2, 3]}, "atrous_rates must have one rate per branch, got 1 for 2 "
        "branches"),
    ("statistics", {"depthwise": [t(0), t(5, 1, 3, 3)]},
        "depthwise_weights[1] must be [6, 1, kh, kw], got shape [5, 1, 3, 3]"),
    ("statistics", {"depthwise": [t(6, 1, 3, 3, dtype=F64), t(0)]},
        "depthwise_weights[0] must have x's dtype float32, got float64"),
    ("", {"scale": t(6)}, f"scale {EACH} [6]"),
    ("", {"shift": t(12, 1)}, f"shift {EACH} [12, 1]"),
    ("", {"scale": t(12, dtype=BF16)},
        "scale must have the dtype of x's sums float32, got bfloat16"),
    ("", {"stored": [t(2, 6, 5, 7)] * 2},
        "stored must be empty or have one entry per branch with a depthwise weight, got 2 for 1 "
        "branches"),
    ("", {"stored": [t(2, 6, 5, 6)]},
        "stored[0] must have x's shape [2, 6, 5, 7], got shape [2, 6, 5, 6]"),
    ("", {"stored": [t(2, 6, 5, 7, dtype=F64)]},
        "stored[0] must have x's dtype float32, got float64"),
    ("_sums", {"grad": t(2, 8, 5, 7)},
        "grad must have the output's shape [2, 7, 5, 7], got [2, 8, 5, 7]"),
    ("_sums", {"shift": t(12, dtype=F64)},
        "shift must have the dtype of x's sums float32, got float64"),
    ("_backward", {"grad": t(2, 7, 5, 7, dtype=BF16)},
        "grad must have x's dtype float32, got bfloat16"),
    ("_backward", {"a": t(6)}, f"a {EACH} [6]"),
    ("_backward", {"b": t(12, dtype=BF16)},
        "b must have the dtype of x's sums float32, got bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=on_emulated), "meta"])
@pytest.mark.parametrize("step", STEPS)
def test_refusals_of_the_steps(step, device) -> None:
    """The kernels and the fakes refuse in the same words."""

    def call(change: dict[str, Any]) -> None:
        arguments = tree_map_only(Tensor, lambda t: t.to(device), STEPS[step] | change)
        operator(step)(*arguments.values())

    call({})
    for of_step, change, sentence in BAD_STEPS:
        if of_step == step:
            with pytest.raises((RuntimeError, ValueError, TypeError)) as refusal:
                call(change)
            assert str(refusal.value).partition("\n")[0] == f"{OP}: {sentence}"


@on_emulated
def test_an_empty_batch_of_the_steps() -> None:
    empty = {"x": t(0, 6, 5, 7), "grad": t(0, 7, 5, 7), "stored": [t(0, 6, 5, 7)]}

    def call(step: str) -> Any:
        changed = {k: empty.get(k, v) for k, v in STEPS[step].items()}
        return operator(step)(*changed.values())

    assert call("").shape == (0, 7, 5, 7)
    assert not any(v.any() for v in call("_sums"))
    of_x, *lists = call("_backward")
    assert of_x.shape == (0, 6, 5, 7)
    assert not any(v.any() for tensors in lists for v in tensors)
