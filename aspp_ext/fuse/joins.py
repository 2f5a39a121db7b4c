# SPDX-License-Identifier: BSD-3-Clause
"""Where branches come together: a concatenation over channels, or a sum."""

from __future__ import annotations

from typing import NamedTuple

from aspp_ext.modules.program import Ref

from .graph import Graph
from .pooled import Pooled, find_pooled

_CATS = ("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
_ADDS = ("aten.add.Tensor", "aten.add_.Tensor")


class Join(NamedTuple):
    """What joins some of the branches, and nothing else but one pooled map."""

    kind: str  # "cat" or "sum"
    ends: tuple[int, ...]  # the branches' maps, in order
    pooled: Pooled | None
    place: int  # before which branch the pooled map is
    places: set[int]  # of its steps
    out: int


def find_join(graph: Graph, source: int, ends: list[int]) -> Join | None:
    """That of the most branches; ``ends`` are their last maps."""
    found: dict[int, Join] = {}
    for end in ends:
        reader = graph.only_user(end)
        if reader is None:
            continue
        join = _cat(graph, source, reader, ends) or _sum(graph, reader, ends)
        if join is not None:
            found[join.out] = join
    return max(found.values(), key=lambda join: len(join.ends), default=None)


def _cat(graph: Graph, source: int, place: int, ends: list[int]) -> Join | None:
    """A concatenation, also of concatenations."""
    if not _is_cat(graph, place):
        return None
    while (above := graph.only_user(graph.steps[place].out)) is not None and _is_cat(graph, above):
        place = above
    places: set[int] = set()
    pooled, at, joined = None, 0, []
    for value in _beside(graph, place, ends, places):
        if value in ends and value not in joined and graph.only_user(value) in places:
            joined.append(value)
        elif pooled is None and (pooled := find_pooled(graph, source, value)) is not None:
            at = len(joined)
        else:
            return None
    if pooled is None:
        at = len(joined)
    return Join("cat", tuple(joined), pooled, at, places, graph.steps[place].out)


def _is_cat(graph: Graph, place: int) -> bool:
    """Whether it is one of maps alone, over channels."""
    named = graph.operator(place)
    if named is None or named[1].keywords:
        return False
    items, *dims = named[1].arguments
    along = named[1].target == "aten.hstack.default"
    if not along and (named[1].target not in _CATS or dims not in ([1], [-3])):
        return False
    return all(isinstance(item, Ref) for item in items)


def _beside(graph: Graph, place: int, ends: list[int], places: set[int]) -> list[int]:
    """What is concatenated, in order."""
    places.add(place)
    found: list[int] = []
    for value in graph.reads(graph.steps[place]):
        below = graph.producer(value)
        inner = below is not None and value not in ends and _is_cat(graph, below)
        if inner and graph.only_user(value) == place:
            found += _beside(graph, below, ends, places)  # type: ignore[arg-type]
        else:
            found.append(value)
    return found


def _sum(graph: Graph, place: int, ends: list[int]) -> Join | None:
    """A tree of additions, or a stack that is summed up."""
    named = graph.operator(place)
    if named is None:
        return None
    if named[1].target == "aten.stack.default":
        return _sum_of_stack(graph, place, ends)
    if named[1].target not in _ADDS:
        return None
    top = place
    while True:
        above = graph.only_user(graph.steps[top].out)
        if above is None or not _is_addition(graph, above):
            break
        top = above
    places: set[int] = set()
    leaves = _leaves(graph, top, ends, places)
    out = graph.steps[top].out
    while leaves is None or any(leaf not in ends for leaf in leaves):
        # The last addition may be of something else: what is below it is a sum, too.
        below = [graph.producer(v) for v in graph.reads(graph.steps[top])]
        below = [b for b in below if b is not None and _is_addition(graph, b)]
        if len(below) != 1 or below[0] is None:
            return None
        top, places = below[0], set()
        leaves = _leaves(graph, top, ends, places)
        out = graph.steps[top].out
    if len(set(leaves)) != len(leaves) or len(leaves) < 2:
        return None
    ordered = tuple(sorted(leaves, key=ends.index))
    return Join("sum", ordered, None, len(ordered), places, out)


def _is_addition(graph: Graph, place: int) -> bool:
    named = graph.operator(place)
    if named is None or named[1].target not in _ADDS or named[1].keywords:
        return False
    return len(named[1].arguments) == 2


def _leaves(graph: Graph, place: int, ends: list[int], places: set[int]) -> list[int] | None:
    """What a tree of additions adds up; None where that is not maps alone."""
    if not _is_addition(graph, place):
        return None
    places.add(place)
    found: list[int] = []
    for item in graph.operator(place)[1].arguments:  # type: ignore[index]
        if item == 0 and isinstance(item, (int, float)):  # where Python's sum begins
            continue
        if not isinstance(item, Ref):
            return None
        below = graph.producer(item.number)
        inner = item.number not in ends and below is not None and _is_addition(graph, below)
        if inner and graph.only_user(item.number) == place:
            leaves = _leaves(graph, below, ends, places)  # type: ignore[arg-type]
            if leaves is None:
                return None
            found += leaves
        elif item.number in ends and graph.only_user(item.number) != place:
            return None
        else:
            found.append(item.number)
    return found


def _sum_of_stack(graph: Graph, place: int, ends: list[int]) -> Join | None:
    stack = graph.steps[place]
    reader = graph.only_user(stack.out)
    named = graph.operator(reader)
    items = [getattr(item, "number", None) for item in stack.arguments[0]]  # type: ignore
    axis = stack.arguments[1] if len(stack.arguments) > 1 else 0  # type: ignore[union-attr]
    if named is None or reader is None or axis != 0:
        return None
    if any(i not in ends or graph.only_user(i) != place for i in items):
        return None
    step = named[1]
    if step.target != "aten.sum.dim_IntList" or len(set(items)) != len(items) or step.keywords:
        return None
    if len(step.arguments) != 2 or tuple(step.arguments[1]) != (0,):
        return None
    kept = tuple(i for i in items if i is not None)
    return Join("sum", kept, None, len(kept), {place, reader}, step.out)
