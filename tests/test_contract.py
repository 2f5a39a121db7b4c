# SPDX-License-Identifier: BSD-3-Clause
"""Bad input: every implementation, the direct operators and the fakes refuse in the same words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bad_inputs import BAD, FLOATS, VALID, Bad, T
from marks import on_all, on_native, sanitized, varied
from table import BACKENDS, EMULATED
from torch.utils._pytree import tree_leaves, tree_map

import aspp_ext
from aspp_ext import _triton, ops
from aspp_ext.ops.family import FAMILIES, NATIVE, TRITON, Family

pytestmark = [on_all, varied, sanitized]

PUBLIC = ("atrous_pyramid", "atrous_separable_pyramid", "aspp_inference")
each_public = pytest.mark.parametrize(
    "bad",
    [b for b in BAD if b.op in PUBLIC],
    ids=lambda b: f"{b.op}-{b.why}".replace(" ", "_"),
)
# Triton's operators; of the head there is none.
each_direct = pytest.mark.parametrize(
    ("bad", "family"),
    [
        pytest.param(b, f, id=f"{b.op}{f.suffix}-{b.why}".replace(" ", "_"))
        for b in BAD
        for f in FAMILIES
        if f is NATIVE or b.op != "aspp_inference"
    ],
)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def made(arguments: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    return {
        name: tree_map(lambda v: v(device) if isinstance(v, T) else v, value)
        for name, value in arguments.items()
    }


def call_direct(op: str, arguments: dict[str, Any], family: Family = NATIVE) -> Any:
    return family.op(op)(*arguments.values())


def call_public(op: str, arguments: dict[str, Any], backend: str | None) -> Any:
    """The direct operator's arguments, as the public function of the same name takes them."""
    a = dict(arguments)
    a["atrous_rates"] = [tuple(a["rates"][i : i + 2]) for i in range(0, len(a["rates"]), 2)]
    del a["rates"]
    if "depthwise" in a:
        depthwise = a.pop("depthwise")
        a["depthwise_weights"] = [d if d.numel() else None for d in depthwise]
    if op == "atrous_separable_pyramid":
        a["pointwise_weights"] = a.pop("pointwise")
        pairs = zip(a.pop("between_scale"), a.pop("between_shift"), strict=True)
        a["between"] = [p if p[0].numel() + p[1].numel() else None for p in pairs]
        a["between_activation"] = "relu" if a.pop("between_relu") else None
    for flag, name in (("relu", "activation"), ("project_relu", "project_activation")):
        if flag in a:
            a[name] = "relu" if a.pop(flag) else None
    return getattr(aspp_ext, op)(**a, backend=backend)


def kind_of(bad: Bad) -> type[Exception]:
    return TypeError if "x's dtype" in bad.sentence or FLOATS in bad.sentence else ValueError


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("op", VALID)
def test_the_valid_arguments_are_valid(op, device) -> None:
    arguments = made(VALID[op], device)
    direct = call_direct(op, arguments)
    if op in PUBLIC:
        for backend in BACKENDS:
            assert call_public(op, arguments, backend).shape == direct.shape


REFUSED = {
    "missing": "Triton is not installed",
    "cpu": "Triton computes on GPUs; on the CPU only its interpreter does (TRITON_INTERPRET=1)",
    "float64": "dtypes are float32, bfloat16 and float16, got float64",
    "branches": "branches go up to 64, got 65",
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("op", [op for op in VALID if op != "aspp_inference"])
def test_what_triton_cannot_run(op, why, monkeypatch) -> None:
    """Of what is valid, before a kernel is loaded."""
    monkeypatch.setattr(_triton, "missing", REFUSED[why] if why == "missing" else None)
    monkeypatch.setattr(_triton, "interpreted", why not in ("missing", "cpu"))
    arguments = made(VALID[op])
    if why == "float64":
        arguments = tree_map(lambda v: v.double() if torch.is_tensor(v) else v, arguments)
    if why == "branches":
        arguments = repeated(arguments, 65)
    with pytest.raises(RuntimeError) as refusal:
        call_direct(op, arguments, TRITON)
    assert str(refusal.value) == f"{op}: {REFUSED[why]}"


def repeated(arguments: dict[str, Any], times: int) -> dict[str, Any]:
    """The same with as many branches, each of them the first."""
    per_branch = {"rates": 2, "kernels": 2}
    many = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, list):
            many[name] = value[: per_branch.get(name, 1)] * times
        elif name in ("grad", "scale", "shift"):  # of the outputs, four in a branch
            size = [*value.shape]
            size[1 if value.dim() == 4 else 0] = 4 * times
            many[name] = value.new_zeros(size)
    return many


@each_backend
@each_public
def test_public_functions(bad, backend) -> None:
    arguments = made(bad.arguments)
    before = tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, arguments)
    with pytest.raises(kind_of(bad)) as refusal:
        call_public(bad.op, arguments, backend)
    assert str(refusal.value) == bad.message()
    for a, b in zip(tree_leaves(arguments), tree_leaves(before), strict=True):
        if isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.element_size() > 1:
            assert torch.equal(a, b)


@each_direct
def test_direct_operators(bad, family) -> None:
    """A fake kernel answers where devices are mixed, hence the other kinds of exception."""
    with pytest.raises((RuntimeError, ValueError, TypeError)) as refusal:
        call_direct(bad.op, made(bad.arguments), family)
    assert str(refusal.value).partition("\n")[0] == bad.message()


@each_direct
def test_fakes(bad, family) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as refusal:
        call_direct(bad.op, made(bad.arguments, "meta"), family)
    assert str(refusal.value).partition("\n")[0] == bad.message("meta")


@pytest.mark.parametrize(
    "bad",
    [
        b
        for b in BAD
        if b.op in PUBLIC[:2] and kind_of(b) is ValueError and "device" not in b.sentence
    ],
    ids=lambda b: f"{b.op}-{b.why}".replace(" ", "_"),
)
def test_with_gradients(bad) -> None:
    """Also where a gradient is wanted: nothing is recorded before the refusal."""
    arguments = tree_map(
        lambda v: v.requires_grad_() if isinstance(v, torch.Tensor) and v.numel() else v,
        made(bad.arguments),
    )
    calls = [lambda op, a, f=family: call_direct(op, a, f) for family in FAMILIES]
    for call in (*calls, lambda op, a: call_public(op, a, None)):
        with pytest.raises((RuntimeError, ValueError)) as refusal:
            call(bad.op, arguments)
        assert str(refusal.value).partition("\n")[0] == bad.message()


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


X, W, D, P, V = zeros(1, 6, 5, 7), zeros(4, 6, 3, 3), zeros(6, 1, 3, 3), zeros(4, 6, 1, 1), zeros(4)
PROJECT = (zeros(2, 4), zeros(2))


def pyramid(x=X, weights=(W,), rates=(2,), **keywords):
    return lambda: aspp_ext.atrous_pyramid(x, weights, rates, **keywords)


def separable(x=X, depthwise=(D,), pointwise=(P,), rates=(2,), **keywords):
    return lambda: aspp_ext.atrous_separable_pyramid(x, depthwise, pointwise, rates, **keywords)


def head(depthwise=(None,), weights=(W,), shift=V, pool=(None, None), project=PROJECT, **keywords):
    end = (shift, *pool, *project)
    return lambda: aspp_ext.aspp_inference(X, depthwise, weights, [2], *end, **keywords)


def prepare(weights=(W,), rates=(2,), size=(5, 7)):
    return lambda: ops.polyphase_weights(weights, rates, *size)


A, S, H, F = (f"{name}: " for name in (*PUBLIC, "polyphase_weights"))
LIST = "must be a list with one entry per branch, got"
PYTHON_ONLY = {
    "x a list": (pyramid(x=[1.0]), TypeError, A + "x must be a tensor, got list"),
    "x None": (separable(x=None), TypeError, S + "x must be a tensor, got NoneType"),
    "one weight": (pyramid(weights=W), TypeError, A + f"weights {LIST} Tensor"),
    "weight None": (pyramid(weights=[None]), TypeError,
        A + "weights[0] must be a tensor, got NoneType"),
    "one depthwise": (separable(depthwise=D), TypeError, S + f"depthwise_weights {LIST} Tensor"),
    "pointwise None": (separable(pointwise=[None]), TypeError,
        S + "pointwise_weights[0] must be a tensor, got NoneType"),
    "depthwise a number": (separable(depthwise=[1]), TypeError,
        S + "depthwise_weights[0] must be a tensor, got int"),
    "one rate": (pyramid(rates=2), TypeError, A + f"atrous_rates {LIST} int"),
    "rates a tensor": (pyramid(rates=torch.tensor([2])), TypeError,
        A + f"atrous_rates {LIST} Tensor"),
    "rate 1.5": (pyramid(rates=[1.5]), TypeError,
        A + "atrous_rates[0] must be an int or a pair of ints, got 1.5"),
    "rate a string": (separable(rates=["2"]), TypeError,
        S + "atrous_rates[0] must be an int or a pair of ints, got '2'"),
    "three rates": (pyramid(rates=[(1, 2, 3)]), TypeError,
        A + "atrous_rates[0] must be an int or a pair of ints, got (1, 2, 3)"),
    "rate 0 of a pair": (pyramid(rates=[(1, 0)]), ValueError,
        A + "atrous_rates[0] must be >= 1, got 0"),
    "bias a list": (pyramid(bias=[0.0] * 4), TypeError, A + "bias must be a tensor, got list"),
    "bias too short": (pyramid(bias=zeros(3)), ValueError,
        A + "bias must have one value per output channel (4), got shape [3]"),
    "bias per sample": (separable(bias=zeros(1, 4)), ValueError,
        S + "bias must have one value per output channel (4), got shape [1, 4]"),
    "scale a number": (pyramid(scale=2.0), TypeError, A + "scale must be a tensor, got float"),
    "shift a number": (separable(shift=1), TypeError, S + "shift must be a tensor, got int"),
    "activation": (pyramid(activation="gelu"), ValueError,
        A + "activation must be None or 'relu', got 'gelu'"),
    "activation a function": (separable(activation=1), ValueError,
        S + "activation must be None or 'relu', got 1"),
    "between_activation": (separable(between_activation="elu"), ValueError,
        S + "between_activation must be None or 'relu', got 'elu'"),
    "between a tensor": (separable(between=V), TypeError, S + f"between {LIST} Tensor"),
    "between no pair": (separable(between=[zeros(6)]), TypeError,
        S + "between[0] must be None or (scale, shift), got Tensor"),
    "between of numbers": (separable(between=[(1.0, 0.0)]), TypeError,
        S + "between[0] scale must be a tensor, got float"),
    "between too long": (separable(between=[None, (zeros(6), zeros(6))]), ValueError,
        S + "between must have one entry per branch, got 2 for 1 branches"),
    "between too long, none": (separable(between=[None, None]), ValueError,
        S + "between must have one entry per branch, got 2 for 1 branches"),
    "backend": (pyramid(backend="tpu"), ValueError,
        A + "backend must be one of cuda, triton, cpu, reference, got 'tpu'"),
    "backend cannot": (pyramid(weights=[zeros(4, 6, 65, 1)], backend="cpu"), RuntimeError,
        A + "backend 'cpu' cannot run this: kernel sizes go up to 63, got 65x1"),
    "head weights": (head(weights=W), TypeError, H + f"weights {LIST} Tensor"),
    "head shift": (head(shift=None), TypeError, H + "shift must be a tensor, got NoneType"),
    "head pool": (head(pool=([1.0], V)), TypeError, H + "pool_weight must be a tensor, got list"),
    "head project": (head(project=([1.0], V)), TypeError,
        H + "project_weight must be a tensor, got list"),
    "head project_shift": (head(project=(zeros(2, 4), 1.0)), TypeError,
        H + "project_shift must be a tensor, got float"),
    "head activation": (head(activation="gelu"), ValueError,
        H + "activation must be None or 'relu', got 'gelu'"),
    "head project_activation": (head(project_activation=True), ValueError,
        H + "project_activation must be None or 'relu', got True"),
    "polyphase a number": (pyramid(polyphase=1), TypeError,
        A + "polyphase must be True or False, got 1"),
    "head polyphase": (head(polyphase="always"), TypeError,
        H + "polyphase must be True or False, got 'always'"),
    "prepared a tensor": (head(prepared=W), TypeError, H + f"prepared {LIST} Tensor"),
    "prepared None": (head(prepared=[None]), TypeError,
        H + "prepared[0] must be a tensor, got NoneType"),
    "weights to prepare": (prepare(weights=W), TypeError, F + f"weights {LIST} Tensor"),
    "weight to prepare": (prepare(weights=[None]), TypeError,
        F + "weights[0] must be a tensor, got NoneType"),
    "nothing to prepare": (prepare(weights=[]), ValueError,
        F + "weights must hold at least one branch, got an empty list"),
    "even to prepare": (prepare(weights=[zeros(4, 6, 2, 3)]), ValueError,
        F + "weights[0] must have odd kernel sizes, got 2x3"),
    "rates to prepare": (prepare(rates=[0]), ValueError,
        F + "atrous_rates[0] must be >= 1, got 0"),
    "no rows to prepare for": (prepare(size=(0, 7)), ValueError,
        F + "height must be at least 1, got 0"),
    "empty line": (pyramid(x=zeros(2, 6, 0), weights=[zeros(4, 6, 3)]), ValueError,
        A + "x needs at least one channel, row and column, got shape [2, 6, 1, 0]"),
}  # fmt: skip


@on_native
@pytest.mark.parametrize("name", PYTHON_ONLY)
def test_what_only_python_can_get_wrong(name) -> None:
    call, kind, sentence = PYTHON_ONLY[name]
    with pytest.raises(kind) as refusal:
        call()
    assert str(refusal.value) == sentence


@on_native
def test_a_kernel_too_large_for_the_cpu_goes_to_the_reference() -> None:
    x, w = torch.randn(1, 2, 9, 8), torch.randn(3, 2, 65, 1)
    got = aspp_ext.atrous_pyramid(x, [w], [1])
    assert torch.equal(got, aspp_ext.reference.atrous_pyramid(x, [w], [1]))
    if EMULATED:  # what the CUDA kernels compute has no limit
        return
    with pytest.raises(
        RuntimeError, match=r"weights\[0\] must have kernel sizes up to 63 on the CPU"
    ):
        torch.ops.aspp_ext.atrous_pyramid(x, [w], [1, 1])


@on_native
def test_backend_by_environment(monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_BACKEND", "nonsense")
    with pytest.raises(
        ValueError, match="must be one of cuda, triton, cpu, reference, got 'nonsense'"
    ):
        pyramid()()
    pyramid(backend="cpu")()  # an argument wins
    monkeypatch.setenv("ASPP_EXT_BACKEND", "")
    pyramid()()


@on_native
@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "quantized", "nested"])
def test_other_kinds_of_tensors_are_refused(layout) -> None:
    x = torch.randn(1, 6, 5, 7)
    strange = {
        "sparse": lambda: x.to_sparse(),
        "mkldnn": lambda: x.to_mkldnn(),
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([x[0], x[0]]),
    }[layout]
    try:
        tensor = strange()
    except RuntimeError as error:
        pytest.skip(str(error)[:60])
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
        aspp_ext.atrous_pyramid(tensor, [W], [2])
    with pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
        aspp_ext.atrous_pyramid(x, [W.to_sparse() if layout == "sparse" else tensor], [2])
