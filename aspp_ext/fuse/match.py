# SPDX-License-Identifier: BSD-3-Clause
"""The pyramids among the steps of a module's forward.

From each map that several convolutions read, their branches are followed as long as nobody else
reads what is between: stages, what joins the branches, the pooled map that comes beside them, the
projection. What is followed becomes one step of the program, the rest stays as it is.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from torch import nn

from aspp_ext.modules.parts import Unfusable
from aspp_ext.modules.program import BranchSpec, ConvSpec, Layer, Operator, Program, Pyramid, Step

from .graph import Graph
from .joins import Join, find_join
from .trace import Traced


class Run(NamedTuple):
    """Steps of one map behind one another."""

    steps: tuple[int, ...]  # by their places
    out: int  # what the last of them gives


class Path(NamedTuple):
    """A branch, followed to where it ends."""

    first: int  # the place of the convolution that reads the features
    depthwise: ConvSpec | None
    between: Run | None
    conv: ConvSpec
    last_conv: int
    stages: Run

    @property
    def places(self) -> set[int]:
        """Of all its steps."""
        between = () if self.between is None else self.between.steps
        return {self.first, *between, self.last_conv, *self.stages.steps}


def program_of(traced: Traced, module: nn.Module) -> Program:
    """The steps, with a pyramid in the place of what it computes.

    Raises:
        Unfusable: there is none.
    """
    graph = Graph(traced, module)
    made: dict[int, Pyramid] = {}  # by the place that it takes
    taken: set[int] = set()
    for source in graph.sources():
        while (found := _pyramid(graph, source, taken)) is not None:
            pyramid, places, at = found
            made[at] = pyramid
            taken |= places
    if not made:
        raise Unfusable(
            "no two convolutions of one map, one of them atrous, can be taken together: each needs "
            "a weight that is a parameter of its own, stride 1, zero padding that keeps the size, "
            "odd kernels and no groups"
        )
    steps: list[Step] = []
    for i, step in enumerate(traced.steps):
        if i in made:
            steps.append(made[i])
        if i not in taken:
            steps.append(step)
    steps = _without_idle(steps, graph)
    return Program(
        traced.arguments,
        traced.channels,
        tuple(steps),
        _dead(steps, graph),
        traced.result,
        len(traced.shapes),
    )


def _pyramid(graph: Graph, source: int, taken: set[int]) -> tuple[Pyramid, set[int], int] | None:
    """A pyramid of ``source``, the places of its steps, and where it goes."""
    paths = [p for i in graph.users(source) if i not in taken and (p := _path(graph, i, source))]
    # What serves at several rates, or twice, stays as it is.
    weights = Counter((p.depthwise or p.conv).weight for p in paths)
    paths = [p for p in paths if weights[(p.depthwise or p.conv).weight] == 1]
    if not _is_pyramid(graph, paths):
        return None
    join = find_join(graph, source, [p.stages.out for p in paths])
    if join is not None:
        by_end = {p.stages.out: p for p in paths}
        some = [by_end[end] for end in join.ends]
        if not _is_pyramid(graph, some) or not _joins_alike(graph, some, join):
            join = None
        else:
            paths = some
    keys = [_keys(graph, p) for p in paths]
    common = next(
        (k for k, ks in enumerate(zip(*keys, strict=False)) if len(set(ks)) > 1),
        min(map(len, keys)),
    )
    if join is not None and any(len(ks) != common for ks in keys):
        join = None
    if join is None:
        # Nothing brings them together, as if a 1x1 read what an atrous layer reads by chance.
        if sum(graph.looks_around(p.depthwise or p.conv) for p in paths) < 2:
            return None
        paths = [_shortened(graph, p, common) for p in paths]
    places = set().union(*(p.places for p in paths))
    joined = after = Run((), -1)
    project = pool = None
    if join is not None:
        places |= join.places
        pool = None if join.pooled is None else join.pooled.spec(join.place)
        places |= set() if join.pooled is None else join.pooled.places
        joined = _run(graph, join.out, drops=True)
        reader = graph.only_user(joined.out)
        conv = None if reader is None else graph.conv(reader)
        if reader is not None and conv is not None and conv.groups == 1:
            project = conv
            after = _run(graph, graph.steps[reader].out, drops=True)
            places |= {reader}
        places |= {*joined.steps, *after.steps}
    first, last = min(places), max(places)
    if graph.is_written(source, first, last, places):
        return None
    branches = tuple(
        BranchSpec(p.depthwise, _of(graph, p.between), p.conv, _of(graph, p.stages)) for p in paths
    )
    if join is None:
        outs = tuple(p.stages.out for p in paths)
        return Pyramid(source, branches, None, "none", (), None, (), outs), places, first
    out = joined.out if project is None else after.out
    kept = (_of(graph, joined), project, _of(graph, after), (out,))
    return Pyramid(source, branches, pool, join.kind, *kept), places, last


def _is_pyramid(graph: Graph, paths: list[Path]) -> bool:
    looks = any(graph.looks_around(p.depthwise or p.conv) for p in paths)
    return len(paths) > 1 and looks


def _joins_alike(graph: Graph, paths: list[Path], join: Join) -> bool:
    """Whether a joint computation draws in the order in which the steps do, and adds like maps."""
    if join.kind == "sum" and len({p.conv.shape[0] for p in paths}) > 1:
        return False
    drawing = [i for p in paths for i in p.stages.steps if graph.kind(i) == "dropout"]
    return drawing == sorted(drawing)


def _keys(graph: Graph, path: Path) -> list[str]:
    """Of the stages, what has to be the same in each branch."""
    return [f"{graph.kind(i)}" for i in path.stages.steps]


def _shortened(graph: Graph, path: Path, count: int) -> Path:
    """Without the stages from the ``count``-th on, and from a dropout on."""
    steps = path.stages.steps[:count]
    drop = next((k for k, i in enumerate(steps) if graph.kind(i) == "dropout"), len(steps))
    steps = steps[:drop]
    out = graph.steps[steps[-1] if steps else path.last_conv].out
    return path._replace(stages=Run(steps, out))


def _path(graph: Graph, place: int, source: int) -> Path | None:
    """The branch that begins with a convolution of ``source``."""
    conv = graph.conv(place)
    if conv is None or graph.source_of(place) != source:
        return None
    depthwise = between = None
    last = place
    if graph.is_depthwise(conv):
        depthwise = conv
        between = _run(graph, graph.steps[place].out)
        reader = graph.only_user(between.out)
        mix = None if reader is None else graph.conv(reader)
        if reader is None or mix is None or mix.groups != 1 or mix.shape[2:] != (1, 1):
            return None
        conv, last = mix, reader
    elif conv.groups != 1:
        return None
    return Path(place, depthwise, between, conv, last, _run(graph, graph.steps[last].out, True))


def _run(graph: Graph, value: int, drops: bool = False) -> Run:
    """The stages behind ``value``, each of which is all that reads what is before it."""
    steps: list[int] = []
    while (reader := graph.only_user(value)) is not None:
        kind = graph.kind(reader)
        if kind is None or (kind == "dropout" and not drops):
            break
        steps.append(reader)
        value = graph.steps[reader].out
    return Run(tuple(steps), value)


def _of(graph: Graph, run: Run | None) -> tuple[Layer | Operator, ...]:
    return () if run is None else tuple(graph.steps[i] for i in run.steps)


def _without_idle(steps: list[Step], graph: Graph) -> list[Step]:
    """Without sizes that nobody reads any more."""
    while True:
        read = Counter(graph.in_result)
        for step in steps:
            read.update(graph.reads(step))
        kept = [s for s in steps if not (graph.is_size(s) and not read[s.out])]  # type: ignore
        if len(kept) == len(steps):
            return steps
        steps = kept


def _dead(steps: list[Step], graph: Graph) -> tuple[tuple[int, ...], ...]:
    """After each step, the values that it was the last to read."""
    seen = set(graph.in_result)
    dead: list[tuple[int, ...]] = []
    for step in reversed(steps):
        outs = step.outs if isinstance(step, Pyramid) else (step.out,)
        values = [v for v in dict.fromkeys((*graph.reads(step), *outs)) if v not in seen]
        seen.update(values)
        dead.append(tuple(values))
    return tuple(reversed(dead))


__all__ = ["program_of"]
