# SPDX-License-Identifier: BSD-3-Clause
"""Every argument of every public function with values of every wrong kind: one sentence says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from aspp_pairs import torchvision_aspp
from marks import on_all
from table import BACKENDS, INTERPRETED
from torch import nn

import aspp_ext
from aspp_ext import ops

pytestmark = [on_all, pytest.mark.filterwarnings("ignore::UserWarning")]

zeros = torch.zeros
X, W, D, P, V = zeros(2, 6, 5, 7), zeros(4, 6, 3, 3), zeros(6, 1, 3, 3), zeros(4, 6, 1, 1), zeros(4)
PAIR, MODEL = (zeros(6), zeros(6)), torchvision_aspp()

Made = tuple[Callable[..., Any], dict[str, Any]]
BY_BACKEND: dict[str, Made] = {
    "atrous_pyramid": (
        aspp_ext.atrous_pyramid,
        {"x": X, "weights": [W], "atrous_rates": [2], "bias": V, "scale": V, "shift": V,
         "activation": None, "polyphase": True},
    ),
    "atrous_separable_pyramid": (
        aspp_ext.atrous_separable_pyramid,
        {"x": X, "depthwise_weights": [D], "pointwise_weights": [P], "atrous_rates": [2],
         "between": [PAIR], "between_activation": "relu", "bias": V, "scale": V, "shift": V,
         "activation": None},
    ),
    "atrous_separable_conv2d": (
        aspp_ext.atrous_separable_conv2d,
        {"x": X, "depthwise_weight": D, "pointwise_weight": P, "atrous_rate": 2, "between": PAIR},
    ),
    "atrous_separable_pyramid_batch_norm": (
        ops.atrous_separable_pyramid_batch_norm,
        {"x": X, "depthwise_weights": [D], "pointwise_weights": [P], "atrous_rates": [2],
         "norms": [PAIR], "eps": 1e-5, "activation_between": "relu"},
    ),
    "aspp_inference": (
        aspp_ext.aspp_inference,
        {"x": X, "depthwise_weights": [None], "weights": [W], "atrous_rates": [2], "shift": V,
         "pool_weight": zeros(2, 6), "pool_shift": zeros(2), "project_weight": zeros(3, 6),
         "project_shift": zeros(3), "polyphase": True, "channels_last": None,
         "activation": "relu", "project_activation": None},
    ),
}  # fmt: skip
OTHERS: dict[str, Made] = {
    "polyphase_weights": (
        ops.polyphase_weights,
        {"weights": [W], "atrous_rates": [2], "height": 5, "width": 7, "polyphase": True},
    ),
    "explain": (
        aspp_ext.explain,
        {"x": X, "weights": [P], "atrous_rates": [2], "depthwise_weights": [None],
         "polyphase": True},
    ),
    "fuse": (
        aspp_ext.fuse,
        {"model": MODEL, "strict": True, "pool_batch_of_one": None, "polyphase": None},
    ),
    "fuse_report": (aspp_ext.fuse_report, {"model": MODEL}),
    "unfuse": (aspp_ext.unfuse, {"model": MODEL}),
    "freeze": (aspp_ext.freeze, {"model": MODEL}),
    "unfreeze": (aspp_ext.unfreeze, {"model": MODEL}),
    "ASPP": (
        aspp_ext.ASPP,
        {"in_channels": 4, "atrous_rates": [2], "out_channels": 3, "separable": False,
         "dropout": 0.5, "pool_batch_of_one": "error", "polyphase": True},
    ),
}  # fmt: skip


def strange(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of that shape that are no dense ones of floats on its device."""
    return {
        "sparse": t.to_sparse(),
        "mkldnn": t.to_mkldnn() if t.dim() else t.to_sparse(),
        "quantized": torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([t, t]),
        "jagged": torch.nested.nested_tensor([zeros(2, 3), zeros(1, 3)], layout=torch.jagged),
        "complex": t.to(torch.complex64),
        "integer": t.long(),
        "elsewhere": t.to("meta"),
    }


def wrong(name: str, right: Any) -> Iterator[Any]:
    """Values of another kind than the right one, and what is near to it."""
    like = right if isinstance(right, torch.Tensor) else W
    plain = ["x", "4", "", 1.5, -3, 0, True, {}, (), [1.0], np.zeros(3), nn.ReLU()]
    plain += [None, float("nan"), 2**70, b"relu", print, np.zeros((4, 6, 3, 3)), torch.tensor(2)]
    tensors = list(strange(like).values())
    lists: list[Any] = [[v] for v in (*plain, *strange(W).values(), (True, 2), (1.0, 2), (1, 2, 3))]
    yield from (v for v in (*plain, *tensors, *lists) if not may_be(name, v))


TENSORS_OR_NONE = ("bias", "scale", "shift", "between", "activation", "between_activation")
TENSORS_OR_NONE += ("activation_between", "channels_last", "depthwise_weights")
TENSORS_OR_NONE += ("project_activation",)


def may_be(name: str, value: Any) -> bool:
    """Whether the argument of that name may be this."""
    if isinstance(value, torch.Tensor):
        return False
    if isinstance(value, list):
        of = value[0] if value else ()
        return name in ("depthwise_weights", "between") and of is None
    if isinstance(value, bool):
        return name in ("polyphase", "separable", "strict", "channels_last")
    if name == "eps":
        return value in (1.5, 2**70) if isinstance(value, (int, float)) else False
    if name == "dropout":
        return isinstance(value, int) and value == 0
    if name == "model":
        return isinstance(value, nn.Module)
    return False


def cases(made: dict[str, Made]) -> list[Any]:
    return [pytest.param(f, a, id=f"{f}-{a}") for f in made for a in made[f][1]]


def refusal(call: Callable[..., Any], arguments: dict[str, Any], keywords: dict[str, Any]) -> str:
    """What it says, if it refuses. Tensors without values have no weights to prepare."""
    try:
        call(**arguments, **keywords)
    except (TypeError, ValueError) as error:
        return str(error)
    except NotImplementedError as error:
        assert call is ops.polyphase_weights
        return str(error)
    return ""


def check(function: str, argument: str, backend: Any = "") -> None:
    call, arguments = (BY_BACKEND | OTHERS)[function]
    keywords = {} if backend == "" else {"backend": backend}
    operators = {"atrous_separable_conv2d": "atrous_separable_pyramid"}
    operators |= {"explain": "atrous_separable_pyramid"}
    starts = (f"{function}: ", f"{operators.get(function, function)}: ")
    optional = arguments[argument] is None
    for value in wrong(argument, arguments[argument]):
        if value is None and (optional or argument in TENSORS_OR_NONE):
            continue
        sentence = refusal(call, {**arguments, argument: value}, keywords)
        assert sentence, f"accepted {value!r}"
        assert sentence.startswith(starts), f"{value!r}: {sentence}"
        assert "\n" not in sentence
        assert len(sentence) < 300


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(("function", "argument"), cases(BY_BACKEND))
def test_operators(function, argument, backend) -> None:
    check(function, argument, backend)


@pytest.mark.parametrize(("function", "argument"), cases(OTHERS))
def test_everything_else(function, argument) -> None:
    if INTERPRETED and function == "polyphase_weights":
        pytest.skip("the CPU's kernels alone have any")
    check(function, argument)


@pytest.mark.parametrize("function", BY_BACKEND)
@pytest.mark.parametrize("value", [0, "", True, 1.5, [], {}, np.zeros(3), "gpu", W], ids=repr)
def test_backends(function, value) -> None:
    call, arguments = BY_BACKEND[function]
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference, go"):
        call(**arguments, backend=value)


@pytest.mark.parametrize("separable", [False, True], ids=["dense", "separable"])
@pytest.mark.parametrize("mode", ["training", "eval", "inference", "autocast"])
@pytest.mark.parametrize("kind", [*strange(X), "empty", "flat"])
def test_features_of_a_module(kind, mode, separable) -> None:
    x = {**strange(X), "empty": X[:, :, :0], "flat": X[0]}[kind]
    module = aspp_ext.ASPP(6, [1, 2], 3, separable=separable).train(mode == "training")
    starts = ("ASPP: x ", "atrous_pyramid: ", "atrous_separable_pyramid: ", "aspp_inference: ")
    casts, grad = mode == "autocast", mode in ("training", "eval")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=casts):
        sentence = refusal(module, {"x": x}, {})
    assert sentence.startswith(starts), sentence
    assert "\n" not in sentence
