# SPDX-License-Identifier: BSD-3-Clause
"""Gradients lie in memory as what they are gradients of: DDP warns and copies where they do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from aspp_pairs import PAIRS, features
from marks import on_all, on_cpu, on_native, proven_emulated, proven_interpreted
from table import EMULATED
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import aspp_ext
from aspp_ext.ops import atrous_separable_pyramid_batch_norm
from aspp_ext.ops.formats import in_strides_of

pytestmark = [on_all, proven_interpreted]

PERMUTED = {
    "contiguous": (0, 1, 2, 3),
    "channels_last": (0, 2, 3, 1),
    "outputs_last": (2, 3, 1, 0),
    "rows_last": (3, 1, 0, 2),
}
each_layout = pytest.mark.parametrize("layout", PERMUTED)


def dense(layout: str, *shape: int) -> Tensor:
    """Of that shape, its axes in that order in memory."""
    order = PERMUTED[layout]
    inner = torch.randn([shape[d] for d in order])
    return inner.permute([order.index(d) for d in range(4)]).requires_grad_()


def pyramid(layout: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    shapes = [(4, 6, 1, 1), (3, 6, 3, 3), (1, 6, 1, 1), (2, 6, 1, 3)]
    return (
        lambda x, *w: aspp_ext.atrous_pyramid(x, w, [1, 2, 1, 2]),
        [dense(layout, *shape) for shape in shapes],
    )


def separable(layout: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    shapes = [(6, 1, 3, 3), (6, 1, 1, 3), (4, 6, 1, 1), (1, 6, 1, 1), (2, 6, 1, 1)]
    return (
        lambda x, a, b, *p: aspp_ext.atrous_separable_pyramid(x, [a, b, None], p, [2, 1, 1]),
        [dense(layout, *shape) for shape in shapes],
    )


def separable_batch_norm(layout: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    norms = [(torch.ones(6), torch.zeros(6)), None]
    shapes = [(6, 1, 3, 3), (4, 6, 1, 1), (2, 6, 1, 1)]
    return (
        lambda x, d, *p: atrous_separable_pyramid_batch_norm(x, [d, None], p, [2, 1], norms)[0],
        [dense(layout, *shape) for shape in shapes],
    )


def head(layout: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    ones = (torch.ones(9), None, None, torch.ones(2, 9), torch.ones(2))
    shapes = [(4, 6, 3, 3), (3, 6, 1, 1), (2, 6, 1, 3)]
    return (
        lambda x, *w: aspp_ext.aspp_inference(x, [None] * 3, w, [2, 1, 2], *ones),
        [dense(layout, *shape) for shape in shapes],
    )


def separable_head(layout: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    ones = (torch.ones(7), None, None, torch.ones(2, 7), torch.ones(2))
    shapes = [(6, 1, 3, 3), (4, 6, 1, 1), (3, 6, 1, 1)]
    return (
        lambda x, d, *p: aspp_ext.aspp_inference(x, [d, None], p, [2, 1], *ones),
        [dense(layout, *shape) for shape in shapes],
    )


# PyTorch's convolutions, which compute this elsewhere, know two formats.
NORMED = list(PERMUTED)[: 4 if EMULATED else 2]
each_operator = pytest.mark.parametrize(
    ("made", "layout"),
    [
        *((made, layout) for made in (pyramid, separable) for layout in PERMUTED),
        *(
            pytest.param(m, layout, marks=on_cpu)
            for m in (head, separable_head)
            for layout in PERMUTED
        ),
        *(pytest.param(separable_batch_norm, layout, marks=on_native) for layout in NORMED),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)


@each_operator
def test_gradients_have_the_strides_of_the_weights(made, layout) -> None:
    call, weights = made(layout)
    x = torch.randn(2, 6, 5, 7)
    grads = torch.autograd.grad(call(x, *weights).pow(2).sum(), weights)
    assert [g.stride() for g in grads] == [w.stride() for w in weights]


@each_layout
@pytest.mark.parametrize("made", [pyramid, separable])
def test_second_derivatives_have_them_too(made, layout) -> None:
    """But for sums by PyTorch, which have strides of their own where a size is 1."""
    call, weights = made(layout)
    x = dense(layout, 2, 6, 5, 7)
    (grad,) = torch.autograd.grad(call(x, *weights).sum(), x, create_graph=True)
    of_these = torch.autograd.grad(grad.pow(2).sum(), weights)
    assert [g.stride() for g in of_these] == [w.stride() for w in weights]


@on_native
@proven_emulated
@each_operator
def test_compiled(made, layout, fresh_compiler) -> None:
    call, weights = made(layout)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 5, 7)
    grads = torch.autograd.grad(compiled(x, *weights).pow(2).sum(), weights)
    assert [g.stride() for g in grads] == [w.stride() for w in weights]


@each_layout
@pytest.mark.parametrize("made", [pyramid, separable])
def test_of_an_image_that_is_a_parameter(made, layout) -> None:
    call, weights = made(layout)
    for shape in ((1, 6, 5, 7), (2, 6, 1, 1), (1, 6, 1, 9)):
        x = nn.Parameter(dense(layout, *shape).detach())
        (grad,) = torch.autograd.grad(call(x, *weights).sum(), x)
        assert grad.stride() == x.stride()


@on_native
def test_what_has_the_strides_is_not_copied() -> None:
    grad = torch.randn(4, 6, 1, 1)
    for layout in ("contiguous", "channels_last"):
        weight = dense(layout, 4, 6, 1, 1)
        assert in_strides_of(weight, grad).data_ptr() == grad.data_ptr()
    piece = dense("channels_last", 4, 10, 1, 1)[:, :6]  # as if it were alone
    assert in_strides_of(piece, grad).stride() == (6, 1, 6, 6)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@on_native
@pytest.mark.parametrize("weights_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("images_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", PAIRS)
def test_ddp_has_nothing_to_warn_of(name, images_last, weights_last, process_group) -> None:
    model = PAIRS[name].ours().double()
    formats = torch.contiguous_format, torch.channels_last
    model.to(memory_format=formats[weights_last])
    x = features().to(memory_format=formats[images_last])
    wrapped = DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)
        try:
            wrapped(x).sum().backward()
        finally:
            torch.set_warn_always(False)
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
