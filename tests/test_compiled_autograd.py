# SPDX-License-Identifier: BSD-3-Clause
"""A backward pass that compiled autograd traces and compiles, of a forward that ran eagerly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aspp_pairs import PAIRS, assert_all_close, features, train_step
from marks import on_all, on_emulated, on_native, proven_interpreted
from table import INTERPRETED
from torch import Tensor
from torch._dynamo.utils import counters

import aspp_ext
from aspp_ext import autograd
from aspp_ext.ops import atrous_separable_pyramid_batch_norm

compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")

pytestmark = [on_all, proven_interpreted, pytest.mark.usefixtures("fresh_compiler")]

DTYPE = torch.float32 if INTERPRETED else torch.float64


def compiled() -> Any:
    return compiled_autograd._enable(torch.compile(backend="aot_eager"))


def values(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=DTYPE) for s in shapes]


def pyramid(rate: int, x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return aspp_ext.atrous_pyramid(x, [v, w], [1, rate])


def separable(rate: int, x: Tensor, d: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return aspp_ext.atrous_separable_pyramid(x, [d, None], [p, q], [rate, 1], activation="relu")


def between(rate: int, x: Tensor, d: Tensor, p: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return aspp_ext.atrous_separable_pyramid(
        x, [d], [p], [rate], between=[(s, t)], between_activation="relu"
    )


def functions(rate: int, x: Tensor, d: Tensor, p: Tensor, w: Tensor) -> Tensor:
    y = autograd.AtrousSeparablePyramid.apply(1, [rate, 1], False, False, x, d, p)
    return autograd.AtrousPyramid.apply([rate, rate], False, True, y, w)


def batch_norm(rate: int, x: Tensor, d: Tensor, p: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return atrous_separable_pyramid_batch_norm(x, [d], [p], [rate], [(s, t)])[0]


X, D, P = (2, 3, 5, 7), (3, 1, 3, 3), (3, 3, 1, 1)
KINDS = {
    "pyramid": (pyramid, [X, P, (2, 3, 3, 3)]),
    "separable": (separable, [X, D, P, P]),
    "between": (between, [X, D, P, (3,), (3,)]),
    "functions": pytest.param(functions, [X, D, P, (2, 3, 3, 3)], marks=on_native),
    "batch_norm": pytest.param(batch_norm, [X, D, P, (3,), (3,)], marks=on_emulated),
}
each_kind = pytest.mark.parametrize(("call", "shapes"), KINDS.values(), ids=KINDS)


def gradients(call: Callable[[], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    for t in tensors:
        t.grad = None
    call().pow(2).sum().backward()
    return [t.grad for t in tensors]


@each_kind
def test_gradients(call, shapes) -> None:
    """Of calls that differ in nothing but what they keep beside tensors, too."""
    tensors = [t.requires_grad_() for t in values(*shapes)]
    for rate in (2, 1):
        expected = gradients(lambda rate=rate: call(rate, *tensors), tensors)
        with compiled():
            got = gradients(lambda rate=rate: call(rate, *tensors), tensors)
        torch.testing.assert_close(got, expected)


@each_kind
def test_of_one_input(call, shapes) -> None:
    for i in range(len(shapes)):
        tensors = values(*shapes)
        tensors[i].requires_grad_()
        expected = gradients(lambda t=tensors: call(2, *t), [tensors[i]])
        with compiled():
            got = gradients(lambda t=tensors: call(2, *t), [tensors[i]])
        torch.testing.assert_close(got, expected)


@on_native
@pytest.mark.quick(when=lambda name, training, last: name == "fused smp separable" and training)
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", PAIRS)
def test_modules(name, training, last) -> None:
    x = features().to(memory_format=torch.channels_last if last else torch.contiguous_format)
    model = PAIRS[name].build()[1].train(training)
    wanted = train_step(copy.deepcopy(model), x)
    with compiled():
        assert_all_close(train_step(model, x), wanted)


@on_native
@pytest.mark.parametrize("setting", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["ours dense", "ours separable"])
def test_backward_inside_a_compiled_step(name, setting) -> None:
    """Where the engine runs it, Dynamo compiles the Python that it calls."""
    model = PAIRS[name].build()[1]
    model.project[3].eval()
    wanted = train_step(model, features())
    model.zero_grad()
    y = model(features())
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=setting):
        step = torch.compile(lambda loss: loss.backward(), backend="aot_eager")
        step((y * weights).sum())
    assert counters["compiled_autograd"]["captures"] == setting
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[f"{key}.grad"])
