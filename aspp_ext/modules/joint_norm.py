# SPDX-License-Identifier: BSD-3-Clause
"""The batch norms of all branches as one, on the branches' maps side by side.

Statistics are per channel, so the norms of the parts are the norm of the whole: nothing is copied
apart and put together again. Where the pyramid has given the statistics along, they are not
computed again either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aspp_ext import _native
from aspp_ext.ops.channel_sums import channel_gradient, channel_statistics, channel_sums

from .tracing import in_forward_mode, is_traced, is_transformed

Norm = nn.modules.batchnorm._BatchNorm  # BatchNorm2d or SyncBatchNorm


def joinable(norms: Sequence[Norm], x: Tensor) -> bool:
    """Whether :func:`joint_norm` computes what the norms would, on maps of x ``[N, C, H, W]``.

    Subclasses and synchronised norms have rules of their own; hooks are refused before. A norm that
    serves two branches counts both. One value per channel, or none, is left to the norms too, whose
    sentences speak of their own channels.
    """
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        return False
    first = None
    for i, norm in enumerate(norms):
        if type(norm) is not nn.BatchNorm2d or any(norm is other for other in norms[:i]):
            return False
        tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        setting = (
            *(norm.training, norm.track_running_stats, norm.momentum, norm.eps),
            *(None if t is None else (t.dtype, t.device) for t in tensors),
            norm.num_batches_tracked is None,
        )
        # Of what serves two, the second finds what the first has left.
        if any(_shares(norm, other) for other in norms[:i]):
            return False
        first = setting if first is None else first
        if setting != first:
            return False
    return True


def _shares(norm: Norm, other: Norm) -> bool:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return any(
        getattr(norm, n) is not None and getattr(norm, n) is getattr(other, n) for n in names
    )


def uses_statistics(norms: Sequence[Norm]) -> bool:
    """Whether :func:`joint_norm` of joinable norms has a use for the statistics of the batch.

    Not in forward mode, whose derivative only PyTorch's batch norm has, and not with an eps that
    PyTorch's refuses.
    """
    return not in_forward_mode() and _by_batch(norms[0]) and norms[0].eps > 0


def joint_norm(
    norms: Sequence[Norm],
    y: Tensor,
    mean: Tensor | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """``cat_b norms[b](y_b)`` for :func:`joinable` norms, and what they do to their buffers.

    Args:
        norms: one per branch.
        y: ``[N, sum O, H, W]``, the branches' maps side by side.
        mean, squares: ``[sum O]``, the mean over N, H and W and the sum of squared differences
            from it, where they are known already and :func:`uses_statistics` is true.

    Returns:
        ``[N, sum O, H, W]`` in y's dtype.
    """
    first, eps = norms[0], norms[0].eps
    weight, bias = _joint([n.weight for n in norms], y), _joint([n.bias for n in norms], y)
    if not _by_batch(first):
        running_mean = _joint([n.running_mean for n in norms], y)
        running_var = _joint([n.running_var for n in norms], y)
        known = running_mean is not None and running_var is not None
        if known and eps > 0 and _sums_here(y):
            return _Normalise.apply(y, weight, bias, running_mean, running_var, eps, False)
        return F.batch_norm(y, running_mean, running_var, weight, bias, False, 0.0, eps)
    tracked = first.training and first.track_running_stats
    if mean is None and eps > 0 and _sums_here(y):
        mean, squares = channel_statistics(y)
    if mean is not None and squares is not None:
        count = y.shape[0] * y.shape[2] * y.shape[3]
        if tracked:
            _track(norms, mean, squares / (count - 1))
        return _Normalise.apply(y, weight, bias, mean, squares / count, eps, True)
    if not tracked:
        return F.batch_norm(y, None, None, weight, bias, True, 0.0, eps)
    # With momentum 1 the running statistics are the batch's.
    mean, var = (y.new_zeros((y.shape[1],), dtype=_wide(y)) for _ in range(2))
    out = F.batch_norm(y, mean, var, weight, bias, True, 1.0, eps)
    _track(norms, mean, var)
    return out


def one_norm(norm: Norm, y: Tensor) -> Tensor:
    """``norm(y)``, by our own sums where those are better."""
    return joint_norm([norm], y) if _sums_here(y) and joinable([norm], y) else norm(y)


def _by_batch(norm: Norm) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _sums_here(y: Tensor) -> bool:
    """Whether the CPU's own sums are taken, which keep digits that PyTorch's would lose."""
    if is_traced() or in_forward_mode() or is_transformed(y):
        return False
    if _native.cpu_missing is not None or _native.emulated:
        return False
    last = torch.channels_last
    plain = y.device.type == "cpu" and y.numel() > 0
    dense = plain and y.is_contiguous(memory_format=last) and not y.is_contiguous()
    return dense and y.dtype in (torch.float32, torch.float64)


def _wide(y: Tensor) -> torch.dtype:
    """Of statistics and parameters beside a low-precision y, as PyTorch's are under autocast."""
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def _joint(vectors: Sequence[Tensor | None], y: Tensor) -> Tensor | None:
    present = _present(vectors)
    if not present:
        return None
    _check_memory(present)
    joint = torch.cat(present)
    return joint.to(_wide(y)) if joint.dtype == y.dtype else joint


def _check_memory(tensors: Sequence[Tensor]) -> None:
    """In PyTorch's words, of storages that were freed or cut: its ``cat`` would read on."""
    if is_traced():
        return
    for t in tensors:
        if is_transformed(t) or t.numel() == 0:
            continue
        reach = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
        needed = (t.storage_offset() + reach + 1) * t.element_size()
        there = t.untyped_storage().nbytes()
        if there == 0:
            raise RuntimeError(
                "The tensor has a non-zero number of elements, but its data is not allocated yet."
            )
        if there < needed:
            raise RuntimeError(
                f"setStorage: sizes {list(t.shape)}, strides {list(t.stride())}, "
                f"storage offset {t.storage_offset()}, and itemsize {t.element_size()} requiring "
                f"a storage size of {needed} are out of bounds for storage of size {there}"
            )


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


@torch.no_grad()
def _track(norms: Sequence[Norm], mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics towards the batch's mean and unbiased variance ``[sum O]``.

    Their versions stay, as they do in PyTorch's batch norm, which has saved them where a norm has
    been called before in the same graph: its backward would raise. The count's version moves.
    """
    counts = _present([n.num_batches_tracked for n in norms])
    if counts:
        torch._foreach_add_(counts, 1)
    sizes = [n.num_features for n in norms]
    momentum = norms[0].momentum
    for name, of_batch in (("running_mean", mean), ("running_var", var)):
        running = _present([getattr(n, name) for n in norms])
        if not running:
            continue
        _check_memory(running)
        if not is_traced():  # a compiler has ways of its own to write to them
            running = [r.data for r in running]
        wide = [r.to(mean.dtype) for r in running]
        if momentum is not None:
            torch._foreach_lerp_(wide, of_batch.split(sizes), momentum)
        elif counts:  # the mean of all batches so far; without a count PyTorch keeps the old values
            shares = [c.to(mean.dtype).reciprocal() for c in counts]
            torch._foreach_lerp_(wide, of_batch.split(sizes), shares)
        if wide[0] is not running[0]:
            torch._foreach_copy_(running, wide)


class _Normalise(torch.autograd.Function):
    """``(y - mean) / sqrt(var + eps) * weight + bias``, with mean and var of y itself or given.

    Its gradient is the batch norm's, of every order that PyTorch's has.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        of_batch: bool,
    ) -> Tensor:
        invstd = (var + eps).rsqrt()
        ctx.save_for_backward(y, weight, mean, var, invstd)
        ctx.eps, ctx.of_batch = eps, of_batch
        real = type(y) is Tensor and not torch.compiler.is_compiling()
        if y.is_cuda and real:  # the operator has no fake
            return torch.batch_norm_elemt(y, weight, bias, mean, invstd, eps)
        scale = invstd if weight is None else invstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        scale, shift = scale[:, None, None], shift[:, None, None]
        return torch.addcmul(shift, y, scale).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        y, weight, mean, var, invstd = ctx.saved_tensors
        wanted, of_batch = ctx.needs_input_grad[:3], ctx.of_batch
        if not torch.is_grad_enabled() and _sums_here(y) and not is_transformed(grad):
            grads = _gradients(grad, y, weight, mean, invstd, of_batch, wanted)
        else:
            # An operator with a gradient of its own, which takes mean and invstd as functions of y.
            known = (None, None, mean, invstd) if of_batch else (mean, var, None, None)
            grads = torch.ops.aten.native_batch_norm_backward(
                grad, y, weight, *known, of_batch, ctx.eps, wanted
            )
        return (*grads, None, None, None, None)


def _gradients(
    grad: Tensor,
    y: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    of_batch: bool,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Of y, weight and bias."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    scale = invstd if weight is None else invstd * weight
    if not of_batch and not any(wanted[1:]):
        return [grad * scale[:, None, None], None, None]
    total, product = channel_sums(grad, y, mean)
    if of_batch:
        of_y = channel_gradient(grad, y, mean, invstd, scale, total, product)
    else:
        of_y = grad * scale[:, None, None]
    return [g if w else None for g, w in zip((of_y, product * invstd, total), wanted, strict=True)]
