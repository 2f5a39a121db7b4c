# SPDX-License-Identifier: BSD-3-Clause
"""Drop-in replacement of the pyramids inside anybody's models.

Classes are known by name (:mod:`.adapters`) or read by their structure (:mod:`.structure`).
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar

from torch import nn

from aspp_ext import _native, _triton
from aspp_ext.evidence import rulings
from aspp_ext.modules.aspp import ASPP
from aspp_ext.modules.described import DescribedForward
from aspp_ext.modules.fused import PROGRAM, SETTINGS, FusedForward, FusedModule
from aspp_ext.modules.head import check_pool_batch_of_one
from aspp_ext.modules.parts import Unfusable
from aspp_ext.modules.siblings import GROUPING, SiblingConv2d, resume
from aspp_ext.ops.checks import check_flag, check_module, shown

from . import floor
from .adapters import ADAPTERS, Adapter, register_adapter
from .inspection import inspect, is_of_an_earlier_import
from .report import FuseEntry, FuseReport
from .restore import descends, is_ours, restore, restore_siblings

Model = TypeVar("Model", bound=nn.Module)


def fuse(
    model: Model,
    *,
    strict: bool = True,
    pool_batch_of_one: Literal["error", "running_stats"] | None = None,
    polyphase: bool | None = None,
    example_inputs: tuple[Any, ...] | None = None,
    verbose: bool = False,
) -> Model:
    """Give every atrous pyramid in ``model`` the fused forward, in place.

    The modules stay the same objects with the same parameters, buffers, state-dict keys and
    hooks; only their class becomes a subclass of what it was. Training, eval, ``deepcopy``,
    pickling and ``torch.compile`` work as before.

    Some classes are known by name (:func:`aspp_ext.register_adapter` adds others). Of any other
    module in which convolutions read one map, one of them atrous, the forward is read by
    ``torch.export``, in eval and in training mode, for maps of any size: its branches, norms,
    activations, concatenation or sum, image pooling and projection are computed together, and what
    else there is stays as it is. What was read is tried out on random numbers first. Where export
    cannot read a forward, as it makes numbers of sizes for instance, the forward stays, and those
    of its ``nn.Conv2d`` that read one map become siblings, of which the first that is called
    computes for all (:mod:`aspp_ext.modules.siblings`). A module that decides by the sizes or
    values of its maps, changes something in its forward, has hooks on its layers, or computes
    anything that is not understood, is left alone with a warning that says why. Fusing twice is the
    same as fusing once, unless a module has been changed since: then it is read anew.

    Changes of parameters are noticed however they are made. In eval mode that takes time in each
    call, on the CPU to read the parameters once, elsewhere to fold the norms anew:
    :func:`aspp_ext.freeze` is the way without. A layer whose methods are replaced, hooked or
    wrapped, on the instance or on its class, before or after, makes the module run its own layers,
    and :func:`fuse_report` says so.

    Args:
        model: any module; may itself be a pyramid.
        strict: raise when there is nothing to fuse.
        pool_batch_of_one: for the pooled branch in training with a batch of one: "error" (as
            PyTorch) or "running_stats". None leaves the modules as they are ("error" at first).
        polyphase: whether the CPU may compute dense branches by minimal filtering, which multiplies
            less, rounds a little more and in eval mode keeps prepared weights, several times the
            memory of the branches' own for each size of image, up to 1 GiB in all or two sizes.
            None leaves the modules as they are (True at first).
        example_inputs: positional arguments of the model, of any size. Needed only where a module
            takes something else than one map, a list of maps for instance: a copy of the model runs
            on them, without memory or values, to see what its modules are called with.
        verbose: print what :func:`fuse_report` gives.

    Returns:
        ``model``.

    Raises:
        ValueError: no pyramid was found and ``strict`` is set, or a copy of the model does not run
            on example_inputs.
        TypeError: model is no module, strict, polyphase or verbose not a bool, or example_inputs no
            tuple.
    """
    check_module("fuse", model)
    check_flag("fuse", "strict", strict)
    check_flag("fuse", "verbose", verbose)
    if pool_batch_of_one is not None:
        check_pool_batch_of_one(pool_batch_of_one, "fuse")
    if polyphase is not None:
        check_flag("fuse", "polyphase", polyphase)
    given = {"pool_batch_of_one": pool_batch_of_one, "polyphase": polyphase}
    settings = {name: value for name, value in given.items() if value is not None}
    _check_inputs("fuse", example_inputs)
    before = _restore_what_has_changed(model)
    try:
        findings = inspect(model, example_inputs, "fuse", before.keys())
    except ValueError:
        for module in model.modules():
            _put_back(module, before)
        raise
    for finding in findings:
        module = finding.module
        if finding.fused is not None:
            _, state = before.pop(id(module), (None, {}))
            module.__class__ = finding.fused
            vars(module).update({key: state[key] for key in SETTINGS if key in state})
            if finding.description is not None:
                vars(module)[PROGRAM] = finding.description
        elif finding.plan is not None:
            _, state = before.pop(id(module), (None, {}))
            floor.apply(module, finding.plan)
            floor.set_polyphase(module, state.get("polyphase", True))
        else:  # whatever is in the way may go again
            _put_back(module, before)
        if settings and isinstance(module, FusedModule):
            module.drop_folded()
            vars(module).update(settings)
        elif polyphase is not None:
            floor.set_polyphase(module, polyphase)
    _tell_of_verify(model)
    refused = [f.entry for f in findings if f.entry.reason is not None]
    if refused:
        lines = "; ".join(f"{e.name or 'the model'}: {e.reason}" for e in refused)
        warnings.warn(f"aspp_ext.fuse left these modules as they were: {lines}", stacklevel=2)
    if strict and not findings:
        raise ValueError(
            "fuse: expected at least one pyramid, convolutions of one map of which one is atrous, "
            f"in the model, found none in {type(model).__name__}; strict=False lets such a model "
            "pass, and a module that takes something else than one map needs example_inputs"
        )
    if verbose:
        made = [f.entry.fused or f.fused is not None or f.plan is not None for f in findings]
        pairs = zip(findings, made, strict=True)
        print(FuseReport(finding.entry._replace(fused=fused) for finding, fused in pairs))
    return model


def _restore_what_has_changed(model: nn.Module) -> dict[int, tuple[Any, dict[str, Any]]]:
    """Of modules that are to be read anew, by their ids, the class and the settings they had."""
    before: dict[int, tuple[Any, dict[str, Any]]] = {}
    for module in model.modules():
        state = {k: v for k, v in vars(module).items() if k in (*SETTINGS, PROGRAM)}
        if GROUPING in vars(module):
            try:
                floor.check(module)
            except Unfusable:
                before[id(module)] = (None, restore_siblings(module))
        elif is_of_an_earlier_import(module) and not descends(type(module), ASPP):
            before[id(module)] = (None, state)
            restore(module)
        elif isinstance(module, DescribedForward):
            try:
                type(module).described_heads(module)
            except Unfusable:
                before[id(module)] = (type(module), state)
                restore(module)
        elif isinstance(module, FusedForward) and not isinstance(module, ASPP):
            try:
                type(module).read(module)
            except Unfusable:
                before[id(module)] = (type(module), state)
                restore(module)
    return before


def _put_back(module: Any, before: dict[int, tuple[Any, dict[str, Any]]]) -> None:
    kind, state = before.pop(id(module), (None, {}))
    if GROUPING in state:
        resume(module, state[GROUPING])
    elif kind is not None:
        module.__class__ = kind
        vars(module).update(state)


def _check_inputs(op: str, example_inputs: Any) -> None:
    if example_inputs is not None and not isinstance(example_inputs, tuple):
        raise TypeError(f"{op}: example_inputs must be a tuple, got {shown(example_inputs)}")


def _tell_of_verify(model: nn.Module) -> None:
    """Where the model lies on a GPU whose kernels nobody has tried, once in a process."""
    fused = (m for m in model.modules() if isinstance(m, (FusedModule, SiblingConv2d)))
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
        vars(module).pop(GROUPING, None)
        if not is_ours(kind) or descends(kind, ASPP):
            continue
        if (reason := restore(module)) is not None:
            left.append(f"{name or 'the model'}: {reason}")
    if left:
        warnings.warn(f"aspp_ext.unfuse left these modules fused: {'; '.join(left)}", stacklevel=2)
    return model


def fuse_report(model: nn.Module, *, example_inputs: tuple[Any, ...] | None = None) -> FuseReport:
    """List the pyramids of ``model`` with what is, or would be, done to each and why.

    Args:
        model: any module, fused or not.
        example_inputs: as in :func:`fuse`.

    Returns:
        One :class:`FuseEntry` per module that is, or may be, a pyramid. Printed, it is a table.

    Raises:
        ValueError, TypeError: as :func:`fuse`.
    """
    check_module("fuse_report", model)
    _check_inputs("fuse_report", example_inputs)
    return FuseReport(f.entry for f in inspect(model, example_inputs, "fuse_report"))


__all__ = [
    "ADAPTERS",
    "Adapter",
    "FuseEntry",
    "FuseReport",
    "fuse",
    "fuse_report",
    "register_adapter",
    "unfuse",
]
