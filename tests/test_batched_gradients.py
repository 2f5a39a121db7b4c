# SPDX-License-Identifier: BSD-3-Clause
"""Many gradients at once: ``is_grads_batched``, ``jacobian(vectorize=True)`` and what is built of
them, which batch by an older vmap than ``torch.func``'s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from aspp_pairs import PAIRS, features
from marks import on_all, on_emulated, on_native, proven_emulated, proven_interpreted
from table import INTERPRETED
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import aspp_ext
from aspp_ext import reference
from aspp_ext.ops import atrous_separable_pyramid_batch_norm

pytestmark = [on_all, proven_interpreted]

DTYPE = torch.float32 if INTERPRETED else torch.float64
CLOSE = {"rtol": 1e-4, "atol": 1e-4} if INTERPRETED else {"rtol": 1e-9, "atol": 1e-9}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)

Call = Callable[..., Tensor]


def values(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=DTYPE, requires_grad=True) for s in shapes]


def pyramid(module: Any) -> Call:
    return lambda x, v, w, s: module.atrous_pyramid(x, [v, w], [1, 2], shift=s, activation="relu")


def separable(module: Any) -> Call:
    return lambda x, d, p, q: module.atrous_separable_pyramid(x, [d, None], [p, q], [2, 1])


def between(module: Any) -> Call:
    keywords = {"between_activation": "relu"}
    return lambda x, d, p, s: module.atrous_separable_pyramid(
        x, [d], [p], [2], between=[(s, s - 1)], **keywords
    )


X, P = (1, 2, 3, 4), (2, 2, 1, 1)
KINDS = {
    "pyramid": (pyramid, [X, P, (1, 2, 3, 3), (3,)]),
    "separable": (separable, [X, (2, 1, 3, 3), P, (1, 2, 1, 1)]),
    "between": (between, [X, (2, 1, 3, 3), P, (2,)]),
}
each_kind = pytest.mark.parametrize(("kind", "shapes"), KINDS.values(), ids=KINDS)


def one_by_one(y: Tensor, inputs: Any, grads: Tensor) -> list[Tensor]:
    each = [torch.autograd.grad(y, inputs, g, retain_graph=True) for g in grads]
    return [torch.stack(of_one) for of_one in zip(*each, strict=True)]


@each_format
@each_kind
def test_gradients(kind, shapes, format) -> None:
    x, *weights = inputs = values(*shapes)
    y = kind(aspp_ext)(x.to(memory_format=format), *weights)
    grads = torch.randn(3, *y.shape, dtype=DTYPE)
    got = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(list(got), one_by_one(y, inputs, grads), **CLOSE)


@each_kind
def test_jacobian(kind, shapes) -> None:
    inputs = tuple(values(*shapes))
    got = jacobian(kind(aspp_ext), inputs, vectorize=True)
    torch.testing.assert_close(got, jacobian(kind(reference), inputs), **CLOSE)


@on_native
@pytest.mark.parametrize("of", range(4))
@pytest.mark.parametrize("kind", ["pyramid", "separable"])
def test_hessian(kind, of) -> None:
    make, shapes = KINDS[kind]
    inputs = values(*shapes)

    def result(module: Any) -> Tensor:
        def loss(v: Tensor) -> Tensor:
            return make(module)(*inputs[:of], v, *inputs[of + 1 :]).pow(3).sum()

        return hessian(loss, inputs[of].detach(), vectorize=module is aspp_ext)

    torch.testing.assert_close(result(aspp_ext), result(reference), **CLOSE)


@on_native
@pytest.mark.parametrize("kind", ["pyramid", "separable"])
def test_what_is_recorded_while_batched(kind) -> None:
    """The gradient of many gradients, and many gradients of those."""
    make, shapes = KINDS[kind]
    inputs = tuple(values(*shapes))

    def result(module: Any) -> Any:
        vectorize = module is aspp_ext
        jacobians = jacobian(make(module), inputs, vectorize=vectorize, create_graph=True)
        some = torch.stack([j.pow(2).sum() for j in jacobians])
        if not vectorize:
            return one_by_one(some, inputs, torch.eye(4, dtype=DTYPE))
        eye = torch.eye(4, dtype=DTYPE)
        return list(torch.autograd.grad(some, inputs, eye, is_grads_batched=True))

    torch.testing.assert_close(result(aspp_ext), result(reference), **CLOSE)


@on_emulated
def test_batch_norm_between() -> None:
    x, d, p, w, b = inputs = values((2, 2, 3, 4), (2, 1, 3, 3), P, (2,), (2,))
    y, _, _ = atrous_separable_pyramid_batch_norm(x, [d], [p], [2], [(w, b)])
    grads = torch.randn(3, *y.shape, dtype=DTYPE)
    got = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    torch.testing.assert_close(list(got), one_by_one(y, inputs, grads), **CLOSE)


@on_native
@proven_emulated
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@each_format
@pytest.mark.parametrize("name", PAIRS)
def test_modules(name, format, training) -> None:
    original, ours = (m.train(training) for m in PAIRS[name].build())
    x = features().to(memory_format=format).requires_grad_()
    results = []
    for module in (original, ours):
        module.project[3].eval()
        y = module(x)
        parameters = [x, *module.parameters()]
        grads = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
        results.append(torch.autograd.grad(y, parameters, grads, is_grads_batched=True))
    torch.testing.assert_close(results[1], results[0])
