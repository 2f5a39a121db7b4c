# SPDX-License-Identifier: BSD-3-Clause
"""``torch.func``, higher derivatives, and the refusals: never a silent zero."""

from __future__ import annotations

import pytest
import torch
from marks import on_native, proven_emulated, quick_emulated, varied
from torch import func

import aspp_ext
from aspp_ext import reference
from aspp_ext.autograd import AtrousPyramid, AtrousSeparablePyramid

pytestmark = [proven_emulated, on_native, varied]

EXACT = {"rtol": 1e-10, "atol": 1e-10}
MODULES = {"ours": aspp_ext, "reference": reference}


def values(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(s, dtype=torch.float64) for s in shapes]


def pyramid_loss(module):
    """A function of (x, w0, w1) whose derivatives of every order depend on all three."""

    def loss(x, w0, w1):
        return module.atrous_pyramid(x, [w0, w1], [2, (1, 3)]).pow(3).sum()

    return loss


def separable_loss(module):
    def loss(x, d, p, q):
        y = module.atrous_separable_pyramid(x, [d, None], [p, q], [2, 1])
        return y.pow(3).sum()

    return loss


PYRAMID = [(1, 2, 3, 4), (2, 2, 3, 3), (1, 2, 1, 3)]
SEPARABLE = [(1, 2, 3, 4), (2, 1, 3, 3), (2, 2, 1, 1), (1, 2, 1, 1)]
LOSSES = {"pyramid": (pyramid_loss, PYRAMID), "separable": (separable_loss, SEPARABLE)}
each_loss = pytest.mark.parametrize(("loss", "shapes"), LOSSES.values(), ids=LOSSES.keys())


def same(transform, loss, tensors) -> None:
    got, expected = (transform(loss(module))(*tensors) for module in MODULES.values())
    torch.testing.assert_close(got, expected, **EXACT)


def every(shapes) -> tuple[int, ...]:
    return tuple(range(len(shapes)))


@quick_emulated()
@each_loss
def test_grad(loss, shapes) -> None:
    same(lambda f: func.grad(f, every(shapes)), loss, values(*shapes))


@each_loss
def test_vjp(loss, shapes) -> None:
    same(lambda f: lambda *t: func.vjp(f, *t)[1](torch.tensor(2.0).double()), loss, values(*shapes))


@each_loss
def test_jvp(loss, shapes) -> None:
    tangents = tuple(values(*shapes))
    same(lambda f: lambda *t: func.jvp(f, t, tangents), loss, values(*shapes))


@each_loss
def test_jacrev(loss, shapes) -> None:
    same(lambda f: func.jacrev(f, every(shapes)), loss, values(*shapes))


@each_loss
def test_jacfwd(loss, shapes) -> None:
    same(lambda f: func.jacfwd(f, every(shapes)), loss, values(*shapes))


NESTED = {
    "jvp of jvp": lambda f, x, v: func.jvp(lambda x: func.jvp(f, (x,), (v,))[1], (x,), (v,))[1],
    "jvp of grad": lambda f, x, v: func.jvp(func.grad(f), (x,), (v,))[1],
    "vjp of grad": lambda f, x, v: func.vjp(func.grad(f), x)[1](v)[0],
    "grad of grad": lambda f, x, v: func.grad(lambda x: (func.grad(f)(x) * v).sum())(x),
}


@each_loss
@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED.keys())
def test_nested_transforms(nested, loss, shapes) -> None:
    x, *rest = values(*shapes)
    v = torch.randn_like(x)
    if loss is separable_loss and nested is NESTED["jvp of grad"]:
        pytest.skip("refused, see below")
    same(lambda f: lambda x, *rest: nested(lambda x: f(x, *rest), x, v), loss, [x, *rest])


def test_hessian_of_the_pyramid() -> None:
    same(lambda f: func.hessian(f, (0, 1, 2)), pyramid_loss, values(*PYRAMID))


@each_loss
def test_reverse_over_reverse_hessian(loss, shapes) -> None:
    argnums = every(shapes)
    same(lambda f: func.jacrev(func.jacrev(f, argnums), argnums), loss, values(*shapes))


@each_loss
def test_third_derivative(loss, shapes) -> None:
    def third(f):
        def run(*tensors):
            leaves = [t.clone().requires_grad_() for t in tensors]
            value = f(*leaves)
            for _ in range(2):
                grads = torch.autograd.grad(value, leaves, create_graph=True)
                value = sum(g.pow(2).sum() for g in grads)
            return torch.autograd.grad(value, leaves)

        return run

    same(third, loss, values(*shapes))


@each_loss
@pytest.mark.parametrize("batched", ["x", "weights", "all"])
def test_vmap(loss, shapes, batched) -> None:
    in_dims = tuple(
        0 if batched == "all" or (batched == "x") == (i == 0) else None for i in every(shapes)
    )
    tensors = [
        torch.randn((3, *s) if d == 0 else s, dtype=torch.float64)
        for s, d in zip(shapes, in_dims, strict=True)
    ]
    same(lambda f: func.vmap(f, in_dims), loss, tensors)
    same(lambda f: func.vmap(func.grad(f, every(shapes)), in_dims), loss, tensors)


def test_vmap_over_another_dimension_and_per_sample_shift() -> None:
    x, w, shift = values((2, 3, 5, 6, 4), (2, 3, 3, 3), (4, 2, 2))

    def forward(module):
        return lambda x, shift: module.atrous_pyramid(x, [w], [2], shift=shift, activation="relu")

    # The samples are the input's last dimension.
    same(lambda f: func.vmap(f, (4, 0)), forward, [x, shift])


def test_forward_mode_is_not_dropped() -> None:
    x, w, t = values((1, 2, 3, 4), (2, 2, 3, 3), (1, 2, 3, 4))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        y = aspp_ext.atrous_pyramid(dual, [w], [2])
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, reference.atrous_pyramid(t, [w], [2]))


def test_functions_are_the_other_door() -> None:
    shapes = [(1, 2, 3, 4), (2, 2, 3, 3), (2, 1, 3, 3), (2, 2, 1, 1)]
    x, w, d, p = (t.requires_grad_() for t in values(*shapes))
    pyramids = (
        AtrousPyramid.apply([2, 2], False, True, x, w),
        reference.atrous_pyramid(x, [w], [2]),
    )
    separables = (
        AtrousSeparablePyramid.apply(1, [2, 2], False, False, x, d, p),
        reference.atrous_separable_conv2d(x, d, p, 2),
    )
    for pair, inputs in ((pyramids, [x, w]), (separables, [x, d, p])):
        got, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in pair)
        torch.testing.assert_close(got, expected)


def between_relu(backend=None):
    def loss(x, d, p, s, t):
        keywords = {"between": (s, t), "between_activation": "relu", "backend": backend}
        return aspp_ext.atrous_separable_conv2d(x, d, p, 1, **keywords).pow(2).sum()

    return loss


BETWEEN = [(1, 2, 3, 4), (2, 1, 3, 3), (2, 2, 1, 1), (2,), (2,)]


def test_second_derivative_through_the_activation_is_refused() -> None:
    leaves = [t.requires_grad_() for t in values(*BETWEEN)]
    grads = torch.autograd.grad(between_relu()(*leaves), leaves, create_graph=True)
    sentence = "second derivatives need between_activation=None, got 'relu'"
    with pytest.raises(NotImplementedError, match=sentence):
        sum(g.sum() for g in grads).backward()
    by_reference = func.jacrev(func.grad(between_relu("reference")))(*values(*BETWEEN))
    assert by_reference.abs().sum() > 0


def test_forward_mode_through_the_activation_is_refused() -> None:
    tensors = tuple(values(*BETWEEN))
    with pytest.raises(NotImplementedError, match="forward-mode derivatives need"):
        func.jvp(between_relu(), tensors, tensors)


def test_forward_over_reverse_of_the_separable_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="forward mode over reverse mode"):
        func.hessian(separable_loss(aspp_ext))(*values(*SEPARABLE))


PARTS = [(pooled, end) for pooled in (False, True) for end in ("relu", "linear", "per sample")]


@pytest.mark.parametrize(("pooled", "end"), [*PARTS, (False, "none")])
@pytest.mark.parametrize("separable", [False, True])
def test_gradients_of_the_head(separable, pooled, end) -> None:
    kernel, q = (1, 1) if separable else (3, 3), 2 if pooled else 0
    shape = (2, 2) if end == "per sample" else (2,)
    x, w, d, shift, project, last = (
        t.requires_grad_()
        for t in values((2, 3, 4, 5), (2, 3, *kernel), (3, 1, 3, 3), (2,), (2, 2 + q), shape)
    )
    pool = [t.requires_grad_() for t in values((2, 3), (2,))] if pooled else [None, None]
    of_project = [None, None] if end == "none" else [project, last]
    tensors = [t for t in (x, w, shift, *pool, *of_project) if t is not None]
    tensors += [d] if separable else []
    activation = None if end == "linear" else "relu"

    def head(module):
        return module.aspp_inference(
            *(x, [d if separable else None], [w], [2], shift, *pool, *of_project),
            activation=activation,
            project_activation=activation,
        )

    by_module = []
    for module in MODULES.values():
        first = torch.autograd.grad(head(module).square().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        by_module.append([*first, *second])
    torch.testing.assert_close(*by_module)
    with torch.no_grad():
        torch.testing.assert_close(*(head(module) for module in MODULES.values()))


@pytest.mark.parametrize("projects", [True, False])
def test_vmap_of_the_head(projects) -> None:
    """Over x and a shift of each sample."""
    x, w, shift, project, last = values((4, 2, 3, 5, 6), (2, 3, 3, 3), (2,), (5, 2), (4, 2, 5))

    def forward(module):
        def call(x, last):
            of_project = (project, last) if projects else (None, None)
            keywords = {"activation": None, "project_activation": None}
            return module.aspp_inference(
                x, [None], [w], [2], shift, None, None, *of_project, **keywords
            )

        return call

    same(func.vmap, forward, [x, last])


def test_batched_gradients_are_right_or_refused() -> None:
    """PyTorch's ``is_grads_batched`` has no rule for operators with lists of tensors."""
    x, w = (t.requires_grad_() for t in values((1, 2, 3, 4), (2, 2, 3, 3)))
    v = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64)
    y, expected = (m.atrous_pyramid(x, [w], [2]) for m in MODULES.values())
    try:
        got = torch.autograd.grad(y, x, v, is_grads_batched=True)[0]
    except RuntimeError as error:
        assert "vmap" in str(error) or "Batch" in str(error)  # noqa: PT017
    else:
        rows = [torch.autograd.grad(expected, x, row, retain_graph=True)[0] for row in v]
        torch.testing.assert_close(got, torch.stack(rows))
