# SPDX-License-Identifier: BSD-3-Clause
"""What follows a convolution on its map: norms, activations, dropouts, in any order.

A stage is a function of a map ``[N, C, H, W]`` that keeps its size, a module of the user's own or a
:class:`Function`. Stages of several branches run on the branches' maps side by side, at once where
they are the same and look at each channel alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aspp_ext.ops.formats import is_channels_last, memory_format

from .joint_norm import joinable, joint_norm, one_norm
from .tracing import in_forward_mode

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
OTHER_NORMS = (nn.GroupNorm, nn.InstanceNorm2d)
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
)
WEIGHTED_ACTIVATIONS = (nn.PReLU,)
DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)

_RELUS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)
_DRAWING = tuple(
    getattr(torch.ops.aten, f"{name}{in_place}").default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for in_place in ("", "_")
)


class Function(NamedTuple):
    """An operator of PyTorch, of a map and constants."""

    op: Any
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()

    def __call__(self, y: Tensor) -> Tensor:
        return self.op(y, *self.arguments, **dict(self.keywords))


RELU = Function(_RELUS[0])
Stage = Callable[[Tensor], Tensor]


def is_relu(stage: Stage) -> bool:
    """Whether it is max(., 0), module or function."""
    return type(stage) is nn.ReLU or (isinstance(stage, Function) and stage.op in _RELUS)


def is_batch_norm(stage: Stage) -> bool:
    """Whether it is affine in eval mode, of exactly PyTorch's classes."""
    return type(stage) in BATCH_NORMS


def is_idle(stage: Stage) -> bool:
    """Whether it leaves a map as it is now: a dropout in eval mode."""
    idle = isinstance(stage, DROPOUTS) and type(stage) in DROPOUTS and not stage.training
    return idle or type(stage) is nn.Identity


def is_random(stage: Stage) -> bool:
    """Whether it may draw, in the order of the map's memory."""
    if isinstance(stage, Function):
        return stage.op in _DRAWING
    return not (
        is_batch_norm(stage) or is_relu(stage) or type(stage) in (*OTHER_NORMS, *ACTIVATIONS)
    )


def alike(stages: Sequence[Stage]) -> bool:
    """Whether all compute the same, element by element."""
    first, *others = stages
    if all(is_relu(s) for s in stages):
        return True
    if isinstance(first, Function):
        return all(s == first for s in others)
    if type(first) not in ACTIVATIONS:
        return False
    known = _setting(first)
    return all(type(s) is type(first) and _setting(s) == known for s in others)


def _setting(activation: Any) -> tuple[Any, ...]:
    """All that an activation without parameters depends on."""
    constants = vars(activation)
    return tuple(constants.get(name) for name in _CONSTANTS)


_CONSTANTS = ("negative_slope", "alpha", "min_val", "max_val", "approximate", "beta", "threshold")


def activate(stage: Stage, y: Tensor) -> Tensor:
    """``stage(y)``, of an activation, over y where nobody else has seen it.

    What a subclass of Tensor makes inside an autograd function is a view, not to be written over,
    what linearize records is kept, and so is what an activation before this one has saved.
    """
    ours = type(y) is Tensor and not in_forward_mode()
    if not torch.compiler.is_compiling():  # which writes over nothing
        ours = ours and not hasattr(y.grad_fn, "_saved_result")
    if is_relu(stage):
        return y.relu_() if ours else y.relu()
    return stage(y if ours else y.clone())


def run(stage: Stage, y: Tensor) -> Tensor:
    """``stage(y)``, of one map that is ours."""
    if is_batch_norm(stage):
        return one_norm(stage, y)  # type: ignore[arg-type]
    if is_relu(stage) or type(stage) in ACTIVATIONS:
        return activate(stage, y)
    return stage(y)


def run_beside(
    lists: Sequence[Sequence[Stage]],
    y: Tensor,
    widths: Sequence[int],
    channels_last: Sequence[bool],
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``cat_b lists[b](y_b)``.

    Args:
        lists: of each branch its stages; as many, and of the same kinds one by one.
        y: ``[N, sum widths, H, W]``, ours.
        widths: channels of each branch.
        channels_last: how each branch's map lies in memory, for who draws in that order.
        statistics: of y, as :func:`joint_norm` takes them.
    """
    columns = list(zip(*lists, strict=True))
    for k, stages in enumerate(columns):
        if all(is_batch_norm(s) for s in stages) and joinable(stages, y):
            y = joint_norm(stages, y, *(statistics or ()))
        elif alike(stages):
            y = activate(stages[0], y)
        elif (joint := _joint(stages, y, widths)) is not None:
            y = joint
        else:
            return _each([stages[k:] for stages in lists], y, widths, channels_last)
        statistics = None
    return y


def _joint(stages: Sequence[Any], y: Tensor, widths: Sequence[int]) -> Tensor | None:
    """What layers with parameters of their own compute side by side, where one call does."""
    first = stages[0]
    if type(first) is nn.PReLU:
        return _joint_prelu(stages, y, widths)
    pairs = list(zip(stages, widths, strict=True))
    known = _shared(first, widths[0])
    if known is None or any(_shared(norm, width) != known for norm, width in pairs):
        return None
    weight, bias = (
        None if getattr(first, name) is None else torch.cat([getattr(s, name) for s in stages])
        for name in ("weight", "bias")
    )
    if type(first) is nn.GroupNorm:  # more groups of the same size
        return F.group_norm(y, sum(s.num_groups for s in stages), weight, bias, first.eps)
    return F.instance_norm(y, weight=weight, bias=bias, eps=first.eps)


def _shared(norm: Any, width: int) -> tuple[Any, ...] | None:
    """What has to be the same of norms without memory that are computed at once."""
    group = 1
    if type(norm) is nn.GroupNorm and width % norm.num_groups == 0:
        group = width // norm.num_groups
    elif type(norm) is not nn.InstanceNorm2d or norm.track_running_stats:
        return None
    tensors = (norm.weight, norm.bias)
    if any(t is not None and not _is_of(t, width) for t in tensors):
        return None
    return (type(norm), group, norm.eps, *(None if t is None else t.dtype for t in tensors))


def _joint_prelu(stages: Sequence[Any], y: Tensor, widths: Sequence[int]) -> Tensor | None:
    weights = []
    for stage, width in zip(stages, widths, strict=True):
        if type(stage) is not nn.PReLU or not (_is_of(w := stage.weight, 1) or _is_of(w, width)):
            return None
        weights.append(w.expand(width))
    return F.prelu(y, torch.cat(weights)) if len({w.dtype for w in weights}) == 1 else None


def _is_of(t: Any, width: int) -> bool:
    """Whether it is a tensor of so many numbers that gives functions no other meaning."""
    return type(t) in (nn.Parameter, Tensor) and tuple(t.shape) == (width,)


def _each(
    lists: Sequence[Sequence[Stage]],
    y: Tensor,
    widths: Sequence[int],
    channels_last: Sequence[bool],
) -> Tensor:
    draws = any(is_random(s) for stages in lists for s in stages)
    ours = [is_channels_last(y)] * len(widths)
    results = []
    copies = parts(y, widths, channels_last if draws else ours)
    for stages, part in zip(lists, copies, strict=True):
        for stage in stages:
            part = run(stage, part)
        results.append(part)
    return torch.cat(results, 1)


def parts(y: Tensor, widths: Sequence[int], channels_last: Sequence[bool]) -> list[Tensor]:
    """Each branch's channels of y, copied, in its format.

    Split, not slices: its backward is one concatenation instead of a padded map per branch. A batch
    norm of a strided slice takes up to 100 times as long as one of a dense copy.
    """
    formats = map(memory_format, channels_last)
    if len(widths) == 1:
        return [y.contiguous(memory_format=next(formats))]
    split = y.split(list(widths), 1)
    return [p.clone(memory_format=f) for p, f in zip(split, formats, strict=True)]
