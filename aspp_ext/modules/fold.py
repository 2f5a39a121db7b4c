# SPDX-License-Identifier: BSD-3-Clause
"""Batch norms folded into the weights before them, and when such a folded copy is still true."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.ops import polyphase_weights
from aspp_ext.ops.formats import pointwise_as_channels_last

from .head import Head, Norm


class Folded(NamedTuple):
    """The arguments of ``aspp_inference`` after x."""

    depthwise_weights: list[Tensor | None]
    weights: list[Tensor]
    atrous_rates: list[tuple[int, int]]
    shift: Tensor
    pool_weight: Tensor
    pool_shift: Tensor
    project_weight: Tensor
    project_shift: Tensor


def fold(head: Head, dtype: torch.dtype) -> Folded:
    """Fold every norm: ``norm(conv(x)) = (scale * W) x + shift``, ``scale = g / sqrt(var + eps)``.

    Computed in float32 (float64 for double) and rounded to ``dtype`` once. The norms must have
    running statistics.
    """
    depthwise = [
        None if b.depthwise is None else b.depthwise.weight.detach().to(dtype)
        for b in head.branches
    ]
    folded = [_fold_one(b.conv, b.norm) for b in head.branches]
    weights = [_as_read(w.to(dtype)) for w, _ in folded]
    shift = torch.cat([s for _, s in folded]).to(dtype)
    pool_weight, pool_shift = _fold_one(head.pool, head.pool_norm)
    project_weight, project_shift = _fold_one(head.project, head.project_norm)
    return Folded(
        depthwise,
        weights,
        [b.rate for b in head.branches],
        shift,
        _as_read(pool_weight.flatten(1).to(dtype)),
        pool_shift.to(dtype),
        _as_read(project_weight.flatten(1).to(dtype)),
        project_shift.to(dtype),
    )


def _fold_one(conv: nn.Conv2d, norm: Norm) -> tuple[Tensor, Tensor]:
    weight = conv.weight.detach()
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    scale = (var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(wide)
    shift = -mean.to(wide)
    if conv.bias is not None:
        shift = shift + conv.bias.detach().to(wide)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().to(wide)
    return weight.to(wide) * scale[:, None, None, None], shift


def _as_read(weight: Tensor) -> Tensor:
    """[O, K] or [O, C, kh, kw] as the device's kernels read it in place.

    The CPU's want stride 1 over O; the CUDA kernels, and cuDNN's, stride 1 over C.
    """
    if weight.device.type == "cuda":
        last = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        return pointwise_as_channels_last(weight.contiguous(memory_format=last))
    inner = (*range(2, weight.dim()), 1, 0)
    order = [inner.index(d) for d in range(weight.dim())]
    return weight.permute(inner).contiguous().permute(order)


_PREPARED_SIZES = 2  # of images upright and across


def _prepare(folded: Folded, height: int, width: int) -> list[Tensor]:
    # Outside inference mode, as the folded copy.
    with torch.inference_mode(False), torch.no_grad():
        return polyphase_weights(folded.weights, folded.atrous_rates, height, width)


class FoldCache:
    """One folded copy with the evidence that its sources have not changed since.

    A source (parameter or buffer) is unchanged when it is the same tensor object on the same
    memory with the same version counter. Writes through ``.data`` bypass the counter, so on the
    CPU a fingerprint of the values is compared too: every element of small tensors, a diagonal of
    large ones. On other devices that comparison would make the host wait, and is left out.

    ``prepared(height, width)`` are the folded weights as minimal filtering takes them, kept
    for the last sizes. They take several times the memory of the branches' weights.
    """

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        self.sources = sources(head)
        # Aliases keep the memory alive, so that an equal address means the same memory.
        self.aliases = [t.detach() for t in self.sources]
        self.versions = [t._version for t in self.sources]
        self.settings = _settings(head)
        self.dtype = dtype
        self.samples: list[Tensor] = []
        if self.sources[0].device.type == "cpu":
            self.samples = [_sample(t) for t in self.aliases]
        self.fingerprint = self._fingerprint()
        self.folded = fold(head, dtype)
        # Bound to the copy and not to self: a cycle would outlive the last reference to it.
        self.prepared = functools.lru_cache(maxsize=_PREPARED_SIZES)(
            functools.partial(_prepare, self.folded)
        )

    def holds(self, head: Head, dtype: torch.dtype) -> bool:
        """Whether the folded copy still is what :func:`fold` would return."""
        now = sources(head)
        if self.dtype != dtype or len(now) != len(self.sources):
            return False
        for new, old, alias, version in zip(
            now, self.sources, self.aliases, self.versions, strict=True
        ):
            if new is not old or new._version != version or new.data_ptr() != alias.data_ptr():
                return False
        if self.settings != _settings(head):
            return False
        return all(map(torch.equal, self._fingerprint(), self.fingerprint))

    def _fingerprint(self) -> list[Tensor]:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for sample in self.samples:
            by_dtype.setdefault(sample.dtype, []).append(sample)
        return [torch.cat(group) for group in by_dtype.values()]


def sources(head: Head) -> list[Tensor]:
    """Every parameter and buffer that goes into the folded weights."""
    found: list[Tensor | None] = []
    for conv in head.convs():
        found += (conv.weight, conv.bias)
    for norm in head.norms():
        found += (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [t for t in found if t is not None]


def cacheable(head: Head) -> bool:
    """Whether the tensors have the version counters and the memory that a cache relies on."""
    for tensor in sources(head):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference():
            return False
        if tensor.device.type not in ("cpu", "cuda"):
            return False
    device = head.project.weight.device
    # A copy made during capture would live in the graph's private pool.
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _settings(head: Head) -> list[object]:
    return [*(b.rate for b in head.branches), *(norm.eps for norm in head.norms())]


def _sample(tensor: Tensor) -> Tensor:
    """A view of the values to compare; of a large tensor one or more per output channel."""
    last = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=last)):
        return tensor[:, 0, 0, 0] if tensor.dim() == 4 else tensor
    flat = tensor.as_strided((tensor.numel(),), (1,))
    if flat.numel() <= 4096:
        return flat
    return flat[:: flat.numel() // tensor.shape[0] + 1]
