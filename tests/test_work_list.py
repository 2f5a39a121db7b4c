# SPDX-License-Identifier: BSD-3-Clause
"""Work lists as the kernels walk them, product by product (in C++), and as Python gets them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import programs
import pytest

from aspp_ext import _plan

PASSES = ("forward", "grad_input", "grad_weight", "separable")
FIELDS = {"units": 14, "regions": 10, "taps": 6, "runs": 11, "launch_order": 1, "worker_begin": 1}
PROBLEMS = {
    "slices": _plan.Problem(1, 5, 4, [_plan.Branch(1, 1, 16), _plan.Branch(3, 2, 32)], 48),
    "whole sums": _plan.Problem(3, 8, 5, [_plan.Branch((5, 3), (2, 1), 4), _plan.Branch()], 7),
    "empty batch": _plan.Problem(0, 4, 4, [_plan.Branch(3, 2, 8)], 3),
}
TILE = _plan.Tile(16, 16, 2, 4)
WORKERS = 40


@pytest.fixture
def program() -> Path:
    return programs.ready("work_list_check")


@pytest.mark.parametrize("mode", [[], ["--planted"]], ids=["agrees", "notices faults"])
def test_work_lists(program: Path, mode: list[str]) -> None:
    run = programs.run(program, *mode)
    assert run.returncode == 0, run.stdout + run.stderr


def records(work: _plan.WorkList, kind: str) -> list[list[int]]:
    return np.frombuffer(getattr(work, kind), np.int32).reshape(-1, FIELDS[kind]).tolist()


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_python_gets_the_structs_fields_in_order(program: Path, problem, pass_) -> None:
    sizes = [TILE.m, TILE.n, TILE.k, TILE.tail, WORKERS]
    sizes += [problem.batch, problem.height, problem.width, problem.in_channels]
    for branch in problem.branches:
        sizes += [*branch.kernel, *branch.rate, branch.out_channels]
    ran = programs.run(program, "--list", pass_, "cheapest", *sizes)
    assert ran.returncode == 0, ran.stderr
    printed: dict[str, list[list[int]]] = {}
    for line in ran.stdout.split("\n"):
        kind, *fields = line.split() or [""]
        printed.setdefault(kind, []).append([int(field) for field in fields])
    work = _plan.work_list(problem, pass_, "cheapest", TILE, WORKERS)
    for kind in FIELDS:
        assert records(work, kind) == printed.get(kind, [])
    assert work.branch_tiles == [tuple(fields) for fields in printed["branch_tiles"]]
    assert [work.workers, work.partials, work.counters, work.tiles] == printed["counts"][0]


@pytest.mark.parametrize("order", ["regions", "merged", "linear", "cheapest"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_it_is_the_plan(problem: _plan.Problem, pass_: str, order: str) -> None:
    work = _plan.work_list(problem, pass_, order, TILE, WORKERS)
    plan = problem.plan(pass_, order, TILE, processors=WORKERS)
    shares = plan.schedule(work.workers).workers if work.workers else []
    ends = itertools.accumulate((len(share) for share in shares), initial=0)
    assert records(work, "worker_begin") == [[end] for end in ends]
    units = [plan.units[u] for share in shares for u in share]
    taps = records(work, "taps")
    regions = records(work, "regions")
    for have, unit in zip(records(work, "units"), units, strict=True):
        assert have[0] == unit.region
        assert have[1:5] == [unit.m.begin, unit.m.size, unit.n.begin, unit.n.size]
        assert have[5:7] == list(unit.k)
        assert taps[have[7]][4] + have[8] == unit.k.begin
        assert have[9:11] == [unit.slice, unit.slices]
        assert have[13] == unit.tile
    for have, region in zip(regions, plan.regions, strict=True):
        assert have[:4] == [
            region.rows.begin,
            region.cols.begin,
            region.rows.size,
            region.cols.size,
        ]
        assert have[6] == region.padded
        live = [[tap.branch, tap.dy, tap.dx] for tap in region.taps]
        if region.area:
            assert [[tap[0], *tap[2:4]] for tap in taps[have[4] : have[5]]] == live
    split = {unit.tile for unit in units if unit.slices > 1}
    assert (work.counters, work.tiles) == (len(split), len({unit.tile for unit in units}))
    assert work.partials == sum(unit.slices > 1 for unit in units)
    assert repr(work) == (
        f"WorkList({len(units)} units on {work.workers} workers, {len(regions)} regions, "
        f"{len(taps)} taps, tiles={work.tiles}, partials={work.partials}, "
        f"counters={work.counters})"
    )


def test_some_of_them_have_slices() -> None:
    for pass_ in ("forward", "grad_input", "separable"):
        assert _plan.work_list(PROBLEMS["slices"], pass_, tile=TILE, workers=WORKERS).counters
    for pass_ in PASSES:
        assert not _plan.work_list(PROBLEMS["whole sums"], pass_, tile=TILE).counters


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("workers", [0, -1, 2**24 + 1])
def test_bad_workers(problem: _plan.Problem, workers: int) -> None:
    with pytest.raises(ValueError, match=rf"workers must be in \[1, 16777216\] but is {workers}"):
        _plan.work_list(problem, workers=workers)


def test_what_does_not_fit_is_refused() -> None:
    wide = _plan.Problem(1, 1, 1, [_plan.Branch()], 2**31)
    with pytest.raises(ValueError, match="in_channels must fit in 32 bits but is 2147483648"):
        _plan.work_list(wide)
    with pytest.raises(ValueError, match="'grad_weight' or 'separable' but is 'back'"):
        _plan.work_list(wide, "back")
