# SPDX-License-Identifier: BSD-3-Clause
"""Drop-in replacement of the ASPP modules inside third-party models.

To support another implementation: write its fused class (one small file like ``torchvision.py``)
and add one line to ``ADAPTERS``.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Literal, NamedTuple, TypeVar

from torch import nn

from aspp_ext import _native, _triton
from aspp_ext.evidence import rulings
from aspp_ext.modules.aspp import ASPP
from aspp_ext.modules.fused import CACHE, SETTINGS, FusedForward
from aspp_ext.modules.head import check_pool_batch_of_one
from aspp_ext.modules.parts import Unfusable, check_tensors
from aspp_ext.ops.checks import check_flag, check_module

from .restore import descends, restore

Model = TypeVar("Model", bound=nn.Module)


class Adapter(NamedTuple):
    """One known ASPP class and the fused subclass of it, as "module:name".

    Neither is imported before an instance of the known class is met.
    """

    source: str
    fused: str

    def fused_class(self) -> type[FusedForward]:
        """Import the fused subclass (its library is loaded already)."""
        module, name = self.fused.split(":")
        return getattr(importlib.import_module(module), name)


ADAPTERS = (
    Adapter(
        "torchvision.models.segmentation.deeplabv3:ASPP",
        "aspp_ext.fuse.torchvision:FusedASPP",
    ),
    Adapter(
        "segmentation_models_pytorch.decoders.deeplabv3.decoder:ASPP",
        "aspp_ext.fuse.smp:FusedASPP",
    ),
)


class FuseEntry(NamedTuple):
    """What became of one ASPP module of a model."""

    name: str  # path in the model, "" for the model itself
    kind: str  # "module:name" of the class it was written as
    fused: bool  # whether its forward is the fused one
    reason: str | None  # why the fused forward is not, or cannot be, taken


def fuse(
    model: Model,
    *,
    strict: bool = True,
    pool_batch_of_one: Literal["error", "running_stats"] | None = None,
    polyphase: bool | None = None,
) -> Model:
    """Give every ASPP in ``model`` that is known here the fused forward, in place.

    The modules stay the same objects with the same parameters, buffers, state-dict keys and
    hooks; only their class becomes a subclass of what it was. Training, eval, ``deepcopy``,
    pickling and ``torch.compile`` work as before. A module with parts that the fused forward does
    not compute (another convolution class, another norm, a stride, hooks on an inner layer, ...)
    is left alone with a warning. Fusing twice is the same as fusing once.

    Changes of parameters are noticed however they are made. In eval mode that takes time in each
    call, on the CPU to read the parameters once, elsewhere to fold the norms anew:
    :func:`aspp_ext.freeze` is the way without. A layer whose methods are replaced, hooked or
    wrapped, on the instance or on its class, before or after, makes the module run its own layers,
    and :func:`fuse_report` says so.

    Args:
        model: any module; may itself be an ASPP.
        strict: raise when there is nothing to fuse.
        pool_batch_of_one: for the pooled branch in training with a batch of one: "error" (as
            PyTorch) or "running_stats". None leaves the modules as they are ("error" at first).
        polyphase: whether the CPU may compute dense branches by minimal filtering, which multiplies
            less, rounds a little more and in eval mode keeps prepared weights, several times the
            memory of the branches' own for each size of image, up to 1 GiB in all or two sizes.
            None leaves the modules as they are (True at first).

    Returns:
        ``model``.

    Raises:
        ValueError: no module of a known class was found and ``strict`` is set.
        TypeError: model is no module, or strict or polyphase not a bool.
    """
    check_module("fuse", model)
    check_flag("fuse", "strict", strict)
    if pool_batch_of_one is not None:
        check_pool_batch_of_one(pool_batch_of_one, "fuse")
    if polyphase is not None:
        check_flag("fuse", "polyphase", polyphase)
    given = {"pool_batch_of_one": pool_batch_of_one, "polyphase": polyphase}
    settings = {name: value for name, value in given.items() if value is not None}
    entries = []
    for name, module in model.named_modules():
        kept = {}
        if _is_of_an_earlier_import(module) and not descends(type(module), ASPP):
            kept = {key: value for key, value in vars(module).items() if key in SETTINGS}
            restore(module)
        entry = _inspect(name, module)
        if entry is None:
            continue
        entries.append(entry)
        if not entry.fused and entry.reason is None:
            module.__class__ = _adapter(module).fused_class()  # type: ignore[union-attr]
            vars(module).update(kept)
        if settings and isinstance(module, FusedForward):
            module.drop_folded()
            vars(module).update(settings)
    _tell_of_verify(model)
    refused = [e for e in entries if e.reason is not None]
    if refused:
        lines = "; ".join(f"{e.name or 'the model'}: {e.reason}" for e in refused)
        warnings.warn(f"aspp_ext.fuse left these modules as they were: {lines}", stacklevel=2)
    if strict and not entries:
        known = ", ".join(adapter.source.replace(":", ".") for adapter in ADAPTERS)
        raise ValueError(
            f"fuse: expected at least one ASPP of a known class ({known}) in the model, found none "
            f"in {type(model).__name__}; strict=False lets such a model pass"
        )
    return model


def _tell_of_verify(model: nn.Module) -> None:
    """Where the model lies on a GPU whose kernels nobody has tried, once in a process."""
    fused = (m for m in model.modules() if isinstance(m, FusedForward))
    devices = {p.device for module in fused for p in module.parameters() if p.is_cuda}
    if _native.cuda_missing is not None and _triton.missing is not None:
        return
    for device in sorted(map(str, devices)):
        if (sentence := rulings.once_about_the_command(device)) is not None:
            warnings.warn(f"aspp_ext.fuse: {sentence}", stacklevel=3)


def unfuse(model: Model) -> Model:
    """Give every module that :func:`fuse` changed its original class back, in place.

    Wrappers that have made another class of it since, such as FSDP2's, stay around it. A module of
    a class that somebody has derived from a fused one is left alone with a warning.

    Args:
        model: any module.

    Returns:
        ``model``, with the same parameters, buffers and keys.
    """
    check_module("unfuse", model)
    left = []
    for name, module in model.named_modules():
        kind = type(module)
        if not descends(kind, FusedForward) or descends(kind, ASPP):
            continue
        if (reason := restore(module)) is not None:
            left.append(f"{name or 'the model'}: {reason}")
    if left:
        warnings.warn(f"aspp_ext.unfuse left these modules fused: {'; '.join(left)}", stacklevel=2)
    return model


def fuse_report(model: nn.Module) -> list[FuseEntry]:
    """List the ASPP modules of ``model`` with what is, or would be, done to each and why.

    Args:
        model: any module, fused or not.

    Returns:
        One entry per module that is an ASPP of a known class or of a subclass of one.
    """
    check_module("fuse_report", model)
    found = (_inspect(name, module) for name, module in model.named_modules())
    return [entry for entry in found if entry is not None]


def _inspect(name: str, module: nn.Module) -> FuseEntry | None:
    if isinstance(module, FusedForward):
        source = type(module) if isinstance(module, ASPP) else module.original
        return FuseEntry(name, _path(source), True, _reason(type(module), module))
    kind = type(module)
    if _is_of_an_earlier_import(module):
        remedy = "make it anew" if descends(kind, ASPP) else "fuse it again"
        reason = f"its class is of an aspp_ext that was imported before this one: {remedy}"
        return FuseEntry(name, _path(kind), True, reason)
    adapter = _adapter(module)
    if adapter is not None:
        return FuseEntry(name, adapter.source, False, _reason(adapter.fused_class(), module))
    sources = {adapter.source for adapter in ADAPTERS}
    base = next((b for b in kind.__mro__ if _path(b) in sources), None)
    if base is None:
        return None
    reason = f"{kind.__name__} is a subclass of {_path(base)} and may compute something else"
    return FuseEntry(name, _path(kind), False, reason)


def _is_of_an_earlier_import(module: nn.Module) -> bool:
    return descends(type(module), FusedForward) and not isinstance(module, FusedForward)


def _reason(fused: type[FusedForward], module: nn.Module) -> str | None:
    if "forward" in module.__dict__ and not isinstance(module, FusedForward):
        return "its forward is replaced"
    try:
        check_tensors(fused.read(module))
    except Unfusable as reason:
        return str(reason)
    cache = module.__dict__.get(CACHE)
    if cache is not None and not cache.in_range:
        return f"{cache.dtype} cannot hold the products of its norms and weights"
    return None


def _adapter(module: nn.Module) -> Adapter | None:
    path = _path(type(module))
    return next((adapter for adapter in ADAPTERS if adapter.source == path), None)


def _path(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


__all__ = ["ADAPTERS", "Adapter", "FuseEntry", "fuse", "fuse_report", "unfuse"]
