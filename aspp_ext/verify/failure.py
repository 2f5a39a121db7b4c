# SPDX-License-Identifier: BSD-3-Clause
"""A wrong result as a page that can be mailed: on which problem, where, and what that says."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..testing import OPS, Op, Problem, checks, oracle_of, outputs
from ..testing.checks import Wrong
from .isolation import PYTORCH

if TYPE_CHECKING:
    from .rightness import Subject

SHRINKING_S = 4.0
MOST_LINES = 10
PIXELS, CHANNELS = 128, 64
"""Of a tile and of a block of k, whose counts show which of them are wrong."""
PASSES = {"pyramid_grad_input": "grad_input", "pyramid_grad_weight": "grad_weight"}


class Failure(Exception):
    """What is wrong in a sentence, and in a page."""

    def __init__(self, sentence: str, page: str) -> None:
        super().__init__(sentence)
        self.page = page


def examine(
    subject: Subject, name: str, problem: Problem, check: Callable[[Problem], Any], way: str = ""
) -> Any:
    """``check(problem)``.

    Args:
        name: what is computed, as in ``OPS``.
        check: raises Wrong; is tried on smaller problems then.
        way: what ASPP_EXT_SEPARABLE is, which the page tells.

    Raises:
        Failure: for Wrong.
    """
    subject.beat(f"{name}, {problem.name}", patience=PYTORCH)
    try:
        return check(problem)
    except Wrong as wrong:
        title = f"{name.replace('_', ' ')}, {problem.name}{f', {way}' if way else ''}"
        sentence = f"{title}: {wrong}"
        found = wrong
    lines = [sentence, f"{subject.cell.title} on {subject.device}"]
    with_way = f"{name} ({way})" if way else name
    lines += _described(subject, name, with_way, problem, found)
    with contextlib.suppress(Exception):  # what is broken may break this, too
        smaller, left = _shrunk(subject, problem, check, found)
        if smaller != problem:
            lines += ["", "The least problem that was found to be wrong, too:"]
            lines += _described(subject, name, with_way, smaller, left)
    raise Failure(sentence, "\n".join(lines) + "\n")


def _described(
    subject: Subject, name: str, title: str, problem: Problem, wrong: Wrong
) -> list[str]:
    branches = ", ".join(
        f"{b.out_channels} x {b.kernel[0]}x{b.kernel[1]} at {b.rate[0]}x{b.rate[1]}"
        for b in problem.branches
    )
    lines = [
        f"{title}: x {list(problem.shape)} {problem.layout}; {branches}; "
        f"weights {problem.weight_layout}",
        str(wrong),
    ]
    for part in (_mismatches, _blocks_of_k, _repeats, _plan):
        subject.beat(f"describing {problem.name}", patience=PYTORCH)
        try:
            lines += part(subject, name, problem, wrong)
        except Exception as error:
            lines.append(f"{part.__name__.strip('_')}: not known, {type(error).__name__}: {error}")
    return lines


def _smaller(problem: Problem) -> Iterator[Problem]:
    """The same with less of one thing."""
    for place, size in enumerate(problem.shape):
        for less in dict.fromkeys((1, size // 2, size - 1)):
            if 0 < less < size:
                n, c, h, w = (less if i == place else s for i, s in enumerate(problem.shape))
                yield replace(problem, shape=(n, c, h, w))
    branches = problem.branches
    for b in range(len(branches)):
        if len(branches) > 1:
            yield replace(problem, branches=(*branches[:b], *branches[b + 1 :]))
    for b, branch in enumerate(branches):
        for less in dict.fromkeys((1, branch.out_channels // 2, branch.out_channels - 1)):
            if 0 < less < branch.out_channels:
                own = replace(branch, out_channels=less)
                yield replace(problem, branches=(*branches[:b], own, *branches[b + 1 :]))
    if problem.layout != "contiguous":
        yield replace(problem, layout="contiguous")
    if problem.weight_layout != "contiguous":
        yield replace(problem, weight_layout="contiguous")


def _shrunk(
    subject: Subject, problem: Problem, check: Callable[[Problem], Any], wrong: Wrong
) -> tuple[Problem, Wrong]:
    """A problem that is wrong, of which nothing smaller was seen to be, as far as time allows."""
    until = time.monotonic() + SHRINKING_S
    shrinks = True
    while shrinks:
        shrinks = False
        for smaller in _smaller(problem):
            if time.monotonic() > until:
                return problem, wrong
            subject.beat(f"a smaller problem than {problem.name}", patience=PYTORCH)
            try:
                check(smaller)
            except Wrong as found:
                problem, wrong, shrinks = smaller, found, True
                break
    return problem, wrong


def _mismatches(subject: Subject, name: str, problem: Problem, wrong: Wrong) -> list[str]:
    """The first of them, the box around them, and how many each tile has."""
    got, expected = wrong.got, wrong.expected
    if got is None or expected is None:
        return []
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    different = (got != expected) & ~(got.isnan() & expected.isnan())
    places = different.nonzero()
    if not len(places):
        return ["the numbers agree"]
    lines = [f"{len(places)} of {different.numel()} numbers differ; (n, c, h, w): expected, got"]
    for place in places[:MOST_LINES].tolist():
        at = tuple(place)
        lines.append(f"  {at}: {expected[at].item():g}, {got[at].item():g}")
    box = zip(places.min(0).values.tolist(), places.max(0).values.tolist(), strict=True)
    lines.append("between " + " x ".join(f"[{low}, {high}]" for low, high in box))
    if different.dim() == 4:
        by_pixel = different.permute(0, 2, 3, 1).flatten(0, 2)
        lines.append(f"in tiles of {PIXELS} pixels: {_counts(by_pixel.sum(1), PIXELS)}")
        lines.append(f"in tiles of {CHANNELS} channels: {_counts(by_pixel.sum(0), CHANNELS)}")
    return lines


def _counts(numbers: Tensor, width: int) -> str:
    """Of every so many neighbours the sum, where it is not zero."""
    sums = [int(part.sum()) for part in numbers.split(width)]
    shown = [f"{place}: {count}" for place, count in enumerate(sums) if count]
    return ", ".join(shown[: 2 * MOST_LINES]) + ", ..." * (len(shown) > 2 * MOST_LINES)


def _integers(subject: Subject, name: str, problem: Problem) -> tuple[Op, Any]:
    op = OPS[name]
    return op, op.make(problem, subject.dtype, integer=True, device=subject.device)


def _wrong_numbers(subject: Subject, op: Op, arguments: Any) -> int:
    got, exact = outputs(subject.call(op)(*arguments)), oracle_of(op, arguments)
    return sum(int((g != e.to(g.dtype)).sum()) for g, e in zip(got, exact, strict=True))


def _blocks_of_k(subject: Subject, name: str, problem: Problem, wrong: Wrong) -> list[str]:
    """How many numbers are wrong where the first argument has values in few channels alone."""
    if name not in OPS or problem.shape[1] <= CHANNELS:
        return []
    op, arguments = _integers(subject, name, problem)
    counts = []
    for begin in range(0, arguments[0].size(1), CHANNELS):
        image = torch.zeros_like(arguments[0])
        own = slice(begin, begin + CHANNELS)
        image[:, own] = arguments[0][:, own]
        count = _wrong_numbers(subject, op, (image, *arguments[1:]))
        counts.append(f"{begin // CHANNELS}: {count}")
    return [f"wrong by blocks of {CHANNELS} channels of the first argument: {', '.join(counts)}"]


def _repeats(subject: Subject, name: str, problem: Problem, wrong: Wrong) -> list[str]:
    if name not in OPS:
        return []
    op, arguments = _integers(subject, name, problem)
    try:
        checks.check_repeats(subject.call(op), arguments, 5)
    except Wrong as other:
        return [f"five repeats differ, as in a race: {other}"]
    return ["five repeats agree, as with a wrong address or mask"]


def _plan(subject: Subject, name: str, problem: Problem, wrong: Wrong) -> list[str]:
    """What the planner makes of it, for the tile that most of the kernels have."""
    from .. import _plan

    n, c, h, w = problem.shape
    branches = [
        _plan.Branch(kernel=b.kernel, rate=b.rate, out_channels=b.out_channels)
        for b in problem.branches
    ]
    depth = 128 // subject.dtype.itemsize
    on_gpu = subject.device.startswith("cuda")
    workers = (
        torch.cuda.get_device_properties(subject.device).multi_processor_count if on_gpu else 8
    )
    pass_: Any = PASSES.get(name, "forward" if name.startswith("pyramid") else "separable")
    tile = _plan.Tile(128, 128, depth, tail=64)
    planned = _plan.work_list(
        _plan.Problem(n, h, w, branches, in_channels=c), pass_, tile=tile, workers=workers
    )
    units = len(planned.launch_order) // 4
    return [
        f"plan of {pass_} with tiles of 128x128x{depth}: {units} units, {planned.tiles} tiles, "
        f"{planned.partials} slices of sums, {planned.workers} of {workers} processors"
    ]
