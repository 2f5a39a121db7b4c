# SPDX-License-Identifier: BSD-3-Clause
"""The floor: where a forward cannot be read, the convolutions that were seen to read one map.

A copy without memory runs, in eval and in training mode, and each convolution's input is noted.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext.modules.head import Branch, Head, is_atrous
from aspp_ext.modules.parts import Unfusable, check_conv, dense_conv, part
from aspp_ext.modules.siblings import GROUPING, Grouping, read, switch

from .observe import without_values
from .report import FuseEntry, rates_of, shares
from .trial import try_out

_NOTES = "_aspp_ext_notes"
Note = tuple[nn.Module, Tensor, int]
"""A convolution, what it read, and its version. The tensor is kept: its address tells it."""


class Plan(NamedTuple):
    """Groups of convolutions, by their paths, and why no more of their module can be fused."""

    groups: tuple[tuple[str, ...], ...]
    left: str


class _Noting(nn.Conv2d):
    """A convolution that notes what it reads."""

    def forward(self, input: Tensor) -> Tensor:
        self.__dict__[_NOTES].append((self, input, input._version))
        return super().forward(input)


def plan(
    module: nn.Module,
    twin: nn.Module,
    arguments: tuple[Any, ...],
    apart: Collection[str],
    left: str,
) -> Plan:
    """What of ``module`` can be computed together.

    Args:
        module: whose forward cannot be read.
        twin: its copy on the meta device.
        arguments: that it takes, on the meta device.
        apart: submodules, by their paths, that are fused on their own.
        left: the reason why it cannot be read.

    Raises:
        Unfusable: that reason, or a part that is watched or patched, or what the trial has found.
    """
    for path, inner in module.named_modules():
        if path:
            part(inner, path, type(inner))  # of what is watched or patched nothing is known
    groups = []
    for group in _observed(twin, arguments):
        kept = [path for path in group if path not in apart and _is_sibling(module, path)]
        if _is_worth_it([module.get_submodule(path) for path in kept]):
            groups.append(tuple(kept))
    if not groups:
        raise Unfusable(left)
    found = Plan(tuple(groups), left)
    try_out(twin, lambda copied: apply(copied, found), arguments, any_size=False)
    return found


def apply(module: nn.Module, found: Plan) -> None:
    """Switch the convolutions, in place."""
    switch(module, found.groups, found.left)


def set_polyphase(module: nn.Module, polyphase: bool) -> None:
    """Of a module whose convolutions have been switched, if they have."""
    if GROUPING in vars(module):
        for siblings in vars(module)[GROUPING].groups:
            siblings.polyphase = polyphase


def _observed(twin: nn.Module, arguments: tuple[Any, ...]) -> list[list[str]]:
    """The paths of convolutions by what these read: once, one map, in eval and in training."""
    copied = copy.deepcopy(twin)
    found = [(path, m) for path, m in copied.named_modules() if type(m) is nn.Conv2d]
    notes: list[Note] = []
    for _, conv in found:
        conv.__class__ = _Noting
        vars(conv)[_NOTES] = notes
    runs: list[list[Note]] = []
    drawn = random.getstate()
    for training in (False, True):
        notes.clear()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                copied.train(training)(*arguments)
        except Exception as error:
            if not training:
                raise without_values(error) from error
            continue  # it may not train on nothing
        runs.append(list(notes))
    if drawn != random.getstate():
        raise Unfusable("its forward draws random numbers outside of PyTorch")
    groups: dict[str, list[str]] = {}
    for path, conv in found:
        reads = [[(id(x), version) for c, x, version in run if c is conv] for run in runs]
        if all(len(of_one) == 1 for of_one in reads):
            groups.setdefault(str(reads), []).append(path)
    return list(groups.values())


def _is_sibling(module: nn.Module, path: str) -> bool:
    with contextlib.suppress(Unfusable):
        conv = dense_conv(module.get_submodule(path), path)
        check_conv(conv, conv.weight.dtype)
        return conv.weight.is_floating_point()
    return False


def _is_worth_it(convs: Sequence[Any]) -> bool:
    """Whether two of them are atrous, with weights of their own."""
    atrous = (conv for conv in convs if is_atrous(conv.kernel_size, conv.dilation))
    return len({id(conv.weight) for conv in atrous}) > 1


def heads_of(groups: Sequence[Sequence[Any]]) -> list[Head]:
    """Groups of convolutions, as pyramids whose branches nobody joins."""
    return [
        Head([Branch(None, (), conv, ()) for conv in group], None, "none", (), None, ())
        for group in groups
    ]


def entry(name: str, kind: str, fused: bool, groups: Sequence[Sequence[Any]], left: str) -> Any:
    """That of a module of which these convolutions are, or would be, computed together."""
    heads = heads_of(groups)
    what = [f"{len(h.branches)} convolutions{rates_of(h)} in one call" for h in heads]
    known = (name, kind, fused, None, "siblings", "; ".join(what), left)
    return FuseEntry(*known, **shares(heads))


def entry_of(name: str, kind: str, module: nn.Module) -> FuseEntry:
    """That of a module whose convolutions have been switched."""
    try:
        groups = check(module)
    except Unfusable as reason:
        return FuseEntry(name, kind, True, str(reason), "siblings")
    return entry(name, kind, True, groups, vars(module)[GROUPING].left)


def check(module: nn.Module) -> list[list[Any]]:
    """The groups of a module whose convolutions have been switched.

    Raises:
        Unfusable: what of it has changed since.
    """
    found = vars(module)[GROUPING]
    if not isinstance(found, Grouping):
        raise Unfusable(
            "its classes are of an aspp_ext that was imported before this one: fuse it again"
        )
    paths: dict[Any, str] = {m: path for path, m in module.named_modules()}
    groups = []
    for siblings in found.groups:
        members = siblings.members()
        if len(members) < siblings.size or any(conv not in paths for conv in members):
            raise Unfusable("some of its convolutions are gone: fuse it again")
        for conv in members:
            read(conv, at=paths[conv])
        groups.append(members)
    return groups
