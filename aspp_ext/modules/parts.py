# SPDX-License-Identifier: BSD-3-Clause
"""Reading a :class:`Head` out of an ASPP module, and refusing what the fused path cannot compute.

Whatever is not exactly one of the known layers in a known setting is refused with a reason: the
caller then runs the module's own forward. Being observed (hooks) counts as a reason, because the
fused path would pass the layer by.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .head import Branch, Conv, Head, Pool, RawConv, same_padding
from .joint_norm import Norm
from .meaning import gives_meaning
from .stages import BATCH_NORMS, DROPOUTS
from .untouched import changed_class, changed_function, changed_methods

Part = TypeVar("Part", bound=nn.Module)
LAYERS = (nn.Sequential, nn.ModuleList, nn.Conv2d, *BATCH_NORMS, nn.ReLU, nn.AdaptiveAvgPool2d)


class Unfusable(Exception):
    """The reason why the fused path does not compute a module."""


class Unread(Unfusable):
    """The reason why a forward cannot be read, though nothing is known to speak against it."""


def describe_standard(
    module: nn.Module,
    conv: type,
    pooling: type,
    *,
    separable_conv: type | None = None,
    separable_pair: type | None = None,
) -> Head:
    """Read torchvision's structure, which segmentation_models_pytorch shares.

    ``convs`` = ModuleList of Sequential(1x1, norm, ReLU), atrous branches, pooling;
    ``project`` = Sequential(1x1, norm, ReLU, Dropout).

    Args:
        module: the ASPP module.
        conv: class of a dense branch, Sequential(Conv2d, norm, ReLU).
        pooling: class of the pooled branch, Sequential(AdaptiveAvgPool2d, Conv2d, norm, ReLU).
        separable_conv: class of a separable one, Sequential(separable_pair, norm, ReLU).
        separable_pair: class of the pair of depthwise and pointwise convolution.

    Raises:
        Unfusable: naming the first part that is something else.
    """
    check_calls()
    check_classes(*LAYERS, conv, pooling, separable_conv, separable_pair)
    convs, projection = children(module, "", ("convs", "project"))
    *blocks, last = part(convs, "convs", nn.ModuleList).children()
    branches = []
    for i, block in enumerate(blocks):
        at = f"convs.{i}"
        kind = type(block)
        if kind not in (nn.Sequential, conv, separable_conv):
            raise Unfusable(f"{at} is {a(kind)}")
        first, norm, relu = children(part(block, at, kind), at, 3)
        part(relu, f"{at}.2", nn.ReLU)
        depthwise = None
        if kind is separable_conv and separable_pair is not None:
            filters, mix = children(part(first, f"{at}.0", separable_pair), f"{at}.0", 2)
            depthwise, weight = depthwise_conv(filters, f"{at}.0.0"), pointwise(mix, f"{at}.0.1")
        else:
            weight = dense_conv(first, f"{at}.0")
        norm = batch_norm(norm, f"{at}.1", weight)
        branches.append(Branch(depthwise, (), weight, (norm, relu)))
    if not branches:
        raise Unfusable("convs has no branch besides the pooled one")
    separable = any(b.depthwise is not None for b in branches)
    if separable and any(b.depthwise is None and b.conv.kernel_size != (1, 1) for b in branches):
        raise Unfusable("dense and separable atrous branches are mixed")

    at = f"convs.{len(blocks)}"
    mean, pool, norm, relu = children(part(last, at, pooling), at, 4)
    if part(mean, f"{at}.0", nn.AdaptiveAvgPool2d).output_size not in (1, (1, 1)):
        raise Unfusable(f"{at}.0 pools to {mean.output_size}, not to 1x1")
    pool = pointwise(pool, f"{at}.1")
    norm = batch_norm(norm, f"{at}.2", pool)
    pooled = Pool(pool, (norm, part(relu, f"{at}.3", nn.ReLU)), len(branches))

    project, norm, relu, dropout = children(
        part(projection, "project", nn.Sequential), "project", 4
    )
    project = pointwise(project, "project.0")
    norm = batch_norm(norm, "project.1", project)
    part(relu, "project.2", nn.ReLU)
    part(dropout, "project.3", *DROPOUTS, nn.Identity)
    stages = (norm, relu, dropout)
    head = Head(tuple(branches), pooled, "cat", (), project, stages)
    check_channels(head)
    return head


def children(module: nn.Module, at: str, expected: int | tuple[str, ...]) -> list[nn.Module]:
    """The direct submodules, when there are exactly the expected ones."""
    found = module._modules
    if isinstance(expected, int):
        expected = tuple(map(str, range(expected)))
    if tuple(found) != expected:
        raise Unfusable(f"{at or 'the module'} has the parts {list(found)}, not {list(expected)}")
    if any(name in module.__dict__ for name in expected):
        raise Unfusable(f"{at or 'the module'} has attributes in front of its parts")
    return list(found.values())  # type: ignore[arg-type]


def part(module: nn.Module, at: str, *kinds: type[Part]) -> Part:
    """``module``, when it is exactly one of ``kinds`` and nobody watches or patches it."""
    if type(module) not in kinds:
        names = " or ".join(map(a, kinds))
        raise Unfusable(f"{at} is {a(type(module))}, not {names}")
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise Unfusable(f"{at} is compiled, or called otherwise, on its own")
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        raise Unfusable(f"{at} has a hook, which must see its own inputs and outputs")
    if replaced := changed_methods(module):
        raise Unfusable(f"{at} has its {replaced[0]} replaced")
    return module  # type: ignore[return-value]


def a(kind: type) -> str:
    """Its name, with an article."""
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def check_calls() -> None:
    """Refuses what concerns every layer: global hooks, and functions that somebody replaced."""
    if _has_any_global_hook():
        raise Unfusable("a global module hook is registered, which must see every layer")
    if (name := changed_function()) is not None:
        raise Unfusable(f"{name} is replaced")


def check_classes(*kinds: type[nn.Module] | None) -> None:
    """Refuses classes of which somebody replaced a method."""
    for kind in kinds:
        if kind is not None and (name := changed_class(kind)) is not None:
            raise Unfusable(f"{kind.__name__}.{name} is replaced")


def dense_conv(module: nn.Module, at: str, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """A stride 1, zero "same" padded, odd, ungrouped Conv2d; with or without bias."""
    conv = part(module, at, kind)
    if conv.groups != 1:
        raise Unfusable(f"{at} has groups={conv.groups}")
    return _same_padded(conv, at)


def pointwise(module: nn.Module, at: str) -> nn.Conv2d:
    """A 1x1 Conv2d without padding; with or without bias."""
    conv = dense_conv(module, at)
    if conv.kernel_size != (1, 1):
        raise Unfusable(f"{at} has kernel_size={conv.kernel_size}, not (1, 1)")
    return conv


def depthwise_conv(module: nn.Module, at: str) -> nn.Conv2d:
    """One odd, stride 1, zero "same" padded filter per channel, no bias."""
    conv = part(module, at, nn.Conv2d)
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise Unfusable(f"{at} is not depthwise: groups={conv.groups}")
    if conv.bias is not None:
        raise Unfusable(f"{at} is depthwise with a bias")
    return _same_padded(conv, at)


def batch_norm(module: nn.Module, at: str, conv: nn.Conv2d) -> Norm:
    """A BatchNorm2d or SyncBatchNorm over the convolution's channels."""
    norm: Norm = part(module, at, *BATCH_NORMS)
    if norm.num_features != conv.out_channels:
        raise Unfusable(f"{at} norms {norm.num_features} channels of {conv.out_channels}")
    return norm


def check_channels(head: Head) -> None:
    """Every branch reads the same channels and the projection reads all the branches."""
    channels = head.channels
    readers = [b.depthwise or b.conv for b in head.branches]
    readers += [] if head.pool is None else [head.pool.conv]
    for i, conv in enumerate(readers):
        mixes = i >= len(head.branches) or head.branches[i].conv.in_channels == channels
        if conv.in_channels != channels or not mixes:
            at = f"branch {i}" if i < len(head.branches) else "the pooled branch"
            raise Unfusable(f"{at} does not read {channels} channels")
    width = sum(head.widths) if head.join == "cat" else head.widths[0]
    width += 0 if head.pool is None else head.pool.conv.out_channels
    if head.project is not None and head.project.in_channels != width:
        raise Unfusable(f"the projection reads {head.project.in_channels} channels of {width}")


def check_tensors(head: Head) -> None:
    """Refuses a layer that computes with other shapes than it says of itself, and mixed dtypes.

    PyTorch takes norms in float32, wholly, beside convolutions in a lower precision, and no others.
    """
    dtype = head.weight.dtype
    for conv in head.convs():
        check_conv(conv, dtype)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    for norm in head.folded_norms():
        own = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        kind = wide if all(t is None or t.dtype == wide for t in own) else dtype
        for name in ("weight", "bias", "running_mean", "running_var"):
            _check_tensor(norm, name, (norm.num_features,), kind)


def check_conv(conv: Conv, dtype: torch.dtype) -> None:
    """Refuses a convolution whose parameters are of other shapes than it says, or another dtype."""
    inputs = conv.in_channels // conv.groups
    _check_tensor(conv, "weight", (conv.out_channels, inputs, *conv.kernel_size), dtype)
    _check_tensor(conv, "bias", (conv.out_channels,), dtype)


def _check_tensor(
    module: Conv | Norm, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor: Tensor | None = getattr(module, name)
    if tensor is None:
        return
    layer = "a convolution" if isinstance(module, RawConv) else str(module)
    if gives_meaning(type(tensor)):
        kind = type(tensor).__name__
        raise Unfusable(f"the {name} of {layer} is a {kind}, which gives functions another meaning")
    if tensor.layout is not torch.strided:
        raise Unfusable(f"the {name} of {layer} is {tensor.layout}")
    if tuple(tensor.shape) != shape:
        shapes = f"has the shape {list(tensor.shape)}, not {list(shape)}"
        raise Unfusable(f"the {name} of {layer} {shapes}")
    if tensor.dtype != dtype:
        raise Unfusable(f"the {name} of {layer} is {tensor.dtype}, not {dtype}")


def _same_padded(conv: nn.Conv2d, at: str) -> nn.Conv2d:
    if conv.weight is None:
        raise Unfusable(f"{at} has no weight")
    if conv.stride != (1, 1):
        raise Unfusable(f"{at} has stride={conv.stride}")
    if conv.padding_mode != "zeros":
        raise Unfusable(f"{at} has padding_mode={conv.padding_mode!r}")
    kernel, rate = conv.kernel_size, conv.dilation
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise Unfusable(f"{at} has the even kernel_size={kernel}")
    same = same_padding(kernel, rate)
    if conv.padding not in (same, "same", "valid" if same == (0, 0) else same):
        raise Unfusable(f"{at} has padding={conv.padding}, not {same}: the map changes size")
    return conv
