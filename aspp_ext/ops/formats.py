# SPDX-License-Identifier: BSD-3-Clause
"""Memory formats of results: what a fake must promise and a kernel must keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(t: Tensor) -> bool:
    """PyTorch's rule for "these strides are channels_last" (c10::is_channels_last_strides_2d)."""
    if t.dim() != 4 or t.stride(1) == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = t.size(d), t.stride(d)
        if size == 0 or stride < least or (d == 0 and least == t.stride(1)):
            return False
        least = stride * size if size > 1 else stride
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    """Of images, which have one of two."""
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_image(
    like: Tensor,
    channels: int,
    sources: Sequence[Tensor],
    batch: int | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """[N, channels, H, W], channels_last if asked for, else if any source is: the convolution's
    rule."""
    last = any(is_channels_last(t) for t in sources) if channels_last is None else channels_last
    n, _, h, w = like.shape
    return torch.empty(
        (n if batch is None else batch, channels, h, w),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format(last),
    )


def like(x: Tensor, y: Tensor, channels_last: bool | None = None) -> Tensor:
    """y in x's memory format, unless another is asked for."""
    last = is_channels_last(x) if channels_last is None else channels_last
    return y.contiguous(memory_format=memory_format(last))


def in_strides_of(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``weight`` in its strides, if those are of dense memory, else in their order.

    ``AccumulateGrad`` copies a gradient into them, but for axes of size 1, at which DDP looks, too;
    what has to be copied here is not copied there. In views, so that it can be differentiated.
    """
    if grad.stride() == weight.stride():
        return grad
    # Of two axes with one stride, that of size 1 is the inner one.
    strides, sizes = weight.stride(), weight.shape
    order = sorted(range(grad.dim()), key=lambda d: (-strides[d], -sizes[d]))
    flat = grad.permute(order).reshape((-1,))
    outer = flat.view([grad.size(d) for d in order])
    return outer.permute([order.index(d) for d in range(grad.dim())])


def in_strides_of_image(x: Tensor, grad: Tensor) -> Tensor:
    """The same of an image, if it is a parameter; for others the copy would be for nothing."""
    return in_strides_of(x, grad) if isinstance(x, torch.nn.Parameter) else grad


def pointwise_as_channels_last(weight: Tensor) -> Tensor:
    """A 1x1 weight seen in channels_last, which is the same memory; others as they are."""
    out_channels, in_channels, *kernel = weight.shape
    if tuple(kernel) != (1, 1) or is_channels_last(weight) or not weight.is_contiguous():
        return weight
    return weight.view((out_channels, 1, 1, in_channels)).permute((0, 3, 1, 2))
