# SPDX-License-Identifier: BSD-3-Clause
"""What is, or would be, done to each module of a model, and why."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import nn

from aspp_ext.modules.aspp import ASPP
from aspp_ext.modules.described import DescribedForward, Description, fused_class
from aspp_ext.modules.fused import PROGRAM, FusedForward, FusedModule
from aspp_ext.modules.head import Head
from aspp_ext.modules.parts import Unfusable, check_tensors
from aspp_ext.modules.program import Layer, Operator, Program, Step, head_of
from aspp_ext.modules.siblings import GROUPING
from aspp_ext.ops.checks import shown

from . import floor, observe
from .adapters import adapter_of, load_adapters, path_of
from .report import FuseEntry, in_words, shares
from .restore import descends
from .structure import describe, is_whole


class Finding(NamedTuple):
    """An entry, the module, and what makes it fused, if anything is to be done: a class, with a
    description if it is ours, or convolutions to be switched."""

    entry: FuseEntry
    module: nn.Module
    fused: type[FusedModule] | None = None
    description: Description | None = None
    plan: floor.Plan | None = None


def inspect(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    op: str = "fuse",
    anew: Collection[int] = (),
) -> list[Finding]:
    """Every pyramid in ``model``, in the order of its modules; ``op`` says who asks. Modules of the
    ids ``anew`` have been unfused to be read again, also in one that is fused and calls them."""
    load_adapters()
    names = dict(model.named_modules())
    order = {name: i for i, name in enumerate(names)}
    given: dict[str, Any] = {}
    if example_inputs is not None:
        try:
            given = observe.arguments_of(model, example_inputs)
        except Exception as error:
            raise ValueError(f"{op}: the model does not run on example_inputs: {error}") from error
    found: list[Finding] = []
    inside: set[int] = set()  # of modules that are looked after
    for name, module in names.items():
        if id(module) in anew:
            inside.difference_update(map(id, module.modules()))
        if id(module) in inside and not _is_fused(module):
            continue
        finding = _known(name, module, given.get(name))
        if finding is not None:
            found.append(finding)
            inside.update(map(id, module.modules()))
    blocks: set[Any] = set()  # that are none, of which a backbone has many alike
    for name, module in reversed(names.items()):
        if id(module) in inside:
            continue
        if not observe.may_be_pyramid(module, inside):
            if observe.has_other_dimensions(module):
                reason = "its convolutions are not of maps but of volumes"
                found.append(Finding(_refused(name, module, reason), module))
                inside.update(map(id, module.modules()))
            continue
        finding = _by_structure(name, module, given.get(name), blocks, inside)
        if finding is None:
            continue
        if name and finding.description is not None and not is_whole(finding.description):
            above = name.rpartition(".")[0]
            finding = _joined_above(above, names[above], given.get(above), inside) or finding
        found.append(finding)
        inside.update(map(id, finding.module.modules()))
    return sorted(found, key=lambda finding: order[finding.entry.name])


def _known(name: str, module: nn.Module, arguments: tuple[Any, ...] | None) -> Finding | None:
    """What is fused, or of a class that is known by name."""
    kind = type(module)
    if GROUPING in vars(module):
        return Finding(floor.entry_of(name, path_of(kind), module), module)
    if isinstance(module, FusedModule):
        return Finding(_of_fused(name, module), module)
    if is_of_an_earlier_import(module):
        remedy = "make it anew" if descends(kind, ASPP) else "fuse it again"
        reason = f"its class is of an aspp_ext that was imported before this one: {remedy}"
        return Finding(FuseEntry(name, path_of(kind), True, reason), module)
    adapter = adapter_of(module)
    if adapter is None:
        return None
    if "forward" in module.__dict__:
        return Finding(_refused(name, module, "its forward is replaced"), module)
    said: str | None = None
    try:
        if (fused := adapter.fused_class()) is not None:
            head = fused.read(module)
            check_tensors(head)
            return Finding(_entry(name, module, False, "name", [head]), module, fused)
    except Unfusable as refusal:
        said = str(refusal)
    except Exception as error:  # of anybody's adapter
        return Finding(_refused(name, module, _by_adapter("fused class", error)), module)
    if arguments is None and adapter.example_inputs is not None:
        try:
            arguments = observe.to_meta(adapter.example_inputs(module))
            if not isinstance(arguments, tuple):
                raise TypeError(f"it must give a tuple, it gave {shown(arguments)}")
        except Exception as error:
            return Finding(_refused(name, module, _by_adapter("example_inputs", error)), module)
    try:
        description = describe(module, arguments, deep=True)
    except Unfusable as refusal:
        return Finding(_refused(name, module, said or str(refusal)), module)
    if description is None:
        return Finding(_refused(name, module, said or "nothing in it is a pyramid"), module)
    if said is not None and isinstance(description, floor.Plan):
        description = description._replace(left=said)
    return _described(name, module, description)


def _by_adapter(part: str, error: Exception) -> str:
    kind = type(error).__name__
    return f"the {part} of its adapter cannot be used: {kind}: {observe.in_a_line(error)}"


def _by_structure(
    name: str,
    module: nn.Module,
    arguments: tuple[Any, ...] | None,
    blocks: set[Any],
    inside: set[int],
) -> Finding | None:
    try:
        key = (type(module), repr(module))
    except Exception:  # of somebody's own
        key = (type(module), str(id(module)))
    if arguments is None and key in blocks:
        return None
    try:
        if "forward" in module.__dict__:
            raise Unfusable("its forward is replaced")
        description = describe(module, arguments, inside)
    except Unfusable as refusal:
        return Finding(_refused(name, module, str(refusal)), module)
    if description is not None:
        return _described(name, module, description)
    if not observe.has_bare_weights(module):  # which do not show in its repr
        blocks.add(key)
    return None


def _joined_above(
    name: str, module: nn.Module, arguments: tuple[Any, ...] | None, inside: set[int]
) -> Finding | None:
    """The module around a pyramid that is not joined, or not projected, if it does that."""
    if not observe.may_hold_pyramid(module):
        return None
    try:
        description = describe(module, arguments, inside, deep=True)
    except Unfusable:
        return None
    if not isinstance(description, Description) or not is_whole(description):
        return None
    return _described(name, module, description)


def _described(name: str, module: nn.Module, description: Description | floor.Plan) -> Finding:
    if isinstance(description, floor.Plan):
        groups = [list(map(module.get_submodule, paths)) for paths in description.groups]
        entry = floor.entry(name, path_of(type(module)), False, groups, description.left)
        return Finding(entry, module, plan=description)
    heads = _heads(module, description.program)
    entry = _entry(name, module, False, "structure", heads, description.program)
    return Finding(entry, module, fused_class(type(module)), description)


def _heads(module: nn.Module, program: Program) -> list[Head]:
    return [head_of(module, spec) for spec in program.pyramids]


def _entry(
    name: str,
    module: nn.Module,
    fused: bool,
    recognised: str,
    heads: list[Head],
    program: Program | None = None,
) -> FuseEntry:
    source = type(module).original if isinstance(module, FusedModule) else type(module)
    steps = () if program is None else program.steps
    named = (s.path if isinstance(s, Layer) else _name_of(s) for s in steps)
    left = ", ".join(dict.fromkeys(name for name in named if name))
    known = (name, path_of(source), fused, None, recognised, in_words(heads), left)
    return FuseEntry(*known, **shares(heads))


def _name_of(step: Step) -> str | None:
    """Of an operator that computes something of maps."""
    if not isinstance(step, Operator) or not step.target.startswith("aten."):
        return None
    name = step.target.split(".")[1].removesuffix("_")
    return None if name == "sym_size" else name


def _refused(name: str, module: nn.Module, reason: str) -> FuseEntry:
    return FuseEntry(name, path_of(type(module)), False, reason)


def _of_fused(name: str, module: FusedModule) -> FuseEntry:
    ours = isinstance(module, ASPP)
    source = path_of(type(module) if ours else type(module).original)
    described = isinstance(module, DescribedForward)
    recognised = "structure" if described else "name"
    try:
        if isinstance(module, DescribedForward):
            heads = type(module).described_heads(module)
        else:
            assert isinstance(module, FusedForward)
            heads = [type(module).read(module)]
        for head in heads:
            check_tensors(head)
    except Unfusable as refusal:
        return FuseEntry(name, source, True, str(refusal), recognised)
    for cache in module.folded_copies():
        if not cache.in_range:
            reason = f"{cache.dtype} cannot hold the products of its norms and weights"
            return FuseEntry(name, source, True, reason, recognised)
    program = module.__dict__[PROGRAM].program if described else None
    return _entry(name, module, True, recognised, heads, program)._replace(kind=source)


def _is_fused(module: nn.Module) -> bool:
    return GROUPING in vars(module) or descends(type(module), FusedModule)


def is_of_an_earlier_import(module: nn.Module) -> bool:
    """Whether it is fused by an ``aspp_ext`` that was imported before this one."""
    return descends(type(module), FusedModule) and not isinstance(module, FusedModule)
