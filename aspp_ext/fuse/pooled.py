# SPDX-License-Identifier: BSD-3-Clause
"""The pooled branch: the mean of the features through a 1x1 convolution, spread over the plane."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from aspp_ext.modules.program import ConvSpec, Layer, Operator, PoolSpec

from .graph import Graph

# Of a map of one pixel each of these makes a plane of its value.
_SPREAD = {
    *("upsample_bilinear2d", "upsample_nearest2d", "_upsample_nearest_exact2d"),
    *("expand", "expand_as", "repeat", "broadcast_to"),
}


class Pooled(NamedTuple):
    """A pooled branch among the steps."""

    conv: ConvSpec
    stages: tuple[Layer | Operator, ...]
    places: set[int]

    def spec(self, place: int) -> PoolSpec:
        """As a part of a pyramid, before the branch ``place`` among what is concatenated."""
        return PoolSpec(self.conv, self.stages, place)


def find_pooled(graph: Graph, source: int, value: int) -> Pooled | None:
    """The branch that ends in ``value``, a map of the size of ``source``, if it is one."""
    place = graph.producer(value)
    named = graph.operator(place)
    if named is None or place is None or named[0] not in _SPREAD:
        return None
    if graph.shape(value)[2:] != graph.shape(source)[2:] or graph.only_user(value) is None:
        return None
    inner = graph.source_of(place)
    places = {place}
    stages: list[int] = []
    while inner is not None:
        if graph.shape(inner)[2:] != ("1", "1") or graph.only_user(inner) is None:
            return None
        at = graph.producer(inner)
        if at is None:
            return None
        places.add(at)
        if (conv := graph.conv(at)) is not None:
            mean = graph.source_of(at)
            known = conv.groups == 1 and conv.shape[2:] == (1, 1) and mean is not None
            if not known or not _is_mean(graph, mean, source, places):  # type: ignore[arg-type]
                return None
            ordered = tuple(graph.steps[i] for i in reversed(stages))
            return Pooled(conv, ordered, places)
        if graph.kind(at) in (None, "dropout"):
            return None
        stages.append(at)
        inner = graph.source_of(at)
    return None


def _is_mean(graph: Graph, value: int, source: int, places: set[int]) -> bool:
    """Whether it is the mean of ``source`` over the plane; adds the steps that serve it alone."""
    at = graph.producer(value)
    if at is None or value == source:
        return False
    alone = graph.only_user(value) is not None
    inner = graph.source_of(at)
    layer, named = graph.layer(at), graph.operator(at)
    whole = graph.shape(value)[2:] == ("1", "1") and inner == source
    if type(layer) is nn.AdaptiveAvgPool2d:
        found = whole
    elif named is None:
        return False
    elif named[0] == "adaptive_avg_pool2d":
        found = whole
    elif named[1].target == "aten.mean.dim":
        _, dims, *keep = named[1].arguments
        over = {d % 4 for d in dims}
        if keep != [True] or named[1].keywords or not over <= {2, 3}:
            return False
        # One axis after the other is the mean of both.
        found = inner == source and over == {2, 3}
        if not found and inner is not None and len(over) == 1:
            found = _is_mean_over(graph, inner, source, {2, 3} - over, places)
    else:
        return False
    if found and alone:
        places.add(at)
    return found


def _is_mean_over(graph: Graph, value: int, source: int, axis: set[int], places: set[int]) -> bool:
    at = graph.producer(value)
    named = graph.operator(at)
    if at is None or named is None or named[1].target != "aten.mean.dim":
        return False
    _, dims, *keep = named[1].arguments
    if keep != [True] or {d % 4 for d in dims} != axis or graph.source_of(at) != source:
        return False
    if graph.only_user(value) is not None:
        places.add(at)
    return True
