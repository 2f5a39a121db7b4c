# SPDX-License-Identifier: BSD-3-Clause
"""Schedules: every unit once and in order, within the bound, better than taking turns."""

from __future__ import annotations

import itertools

import pytest

from aspp_ext import _plan

PASSES = ("forward", "grad_input", "grad_weight", "separable")
OVERHEAD = 4  # products of a k block and a whole tile
PRODUCT = 4  # taps, which separable counts in
ASPP = [  # batch, map, rates, in_channels: DeepLab's heads
    (1, 33, (6, 12, 18), 2048),
    (8, 33, (6, 12, 18), 2048),
    (1, 65, (12, 24, 36), 2048),
    (2, 65, (12, 24, 36), 2048),
    (8, 97, (12, 24, 36), 512),
]


def make_plan(batch: int, size: int, rates: tuple, channels: int, pass_: str, workers: int):
    branches = [_plan.Branch(1, 1, 256), *(_plan.Branch(3, rate, 256) for rate in rates)]
    problem = _plan.Problem(batch, size, size, branches, channels)
    tile = _plan.Tile(128, 128, 32, 32)
    return problem.plan(pass_, "cheapest", tile, processors=workers)


def cost(plan: _plan.Plan, unit: _plan.Unit) -> int:
    tile, product, block = plan.tile, 1, 1
    if plan.pass_ == "separable":
        product, block = PRODUCT, plan.regions[unit.region].tap_count + PRODUCT
    paid = -(-unit.m.size // tile.tail) * tile.tail
    return paid * unit.k.size * block + tile.m * OVERHEAD * product


def taking_turns(plan: _plan.Plan, workers: int) -> int:
    costs = [cost(plan, unit) for unit in plan.units]
    return max(sum(costs[w::workers]) for w in range(workers))


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("workers", [1, 7, 132, 5000])
def test_every_unit_once_in_order_and_within_the_bound(pass_, workers):
    plan = make_plan(2, 33, (6, 12, 18), 64, pass_, workers)
    schedule = plan.schedule(workers)
    assert sorted(itertools.chain(*schedule.workers)) == list(range(len(plan.units)))
    costs = [cost(plan, unit) for unit in plan.units]
    assert schedule.busy == [sum(costs[u] for u in units) for units in schedule.workers]
    assert all(units == sorted(units) for units in schedule.workers)
    assert schedule.total == sum(costs)
    assert schedule.makespan == max(schedule.busy) <= sum(costs) / workers + max(costs)
    assert repr(schedule) == (
        f"Schedule({len(costs)} units on {workers} workers, makespan={schedule.makespan}, "
        f"total={sum(costs)})"
    )


def test_a_unit_goes_to_the_worker_that_is_free_first_the_lowest_on_a_tie():
    plan = make_plan(2, 33, (6, 12, 18), 64, "forward", 5)
    assert all(unit.worker < 0 for unit in plan.units)
    busy, expected = [0] * 5, [[] for _ in range(5)]
    for index, unit in enumerate(plan.units):
        worker = busy.index(min(busy))
        busy[worker] += cost(plan, unit)
        expected[worker].append(index)
    assert plan.schedule(5).workers == expected


@pytest.mark.parametrize("workers", [108, 132, 264])
def test_better_than_taking_turns_on_the_shapes_of_aspp(workers):
    ratios = []
    for shape in ASPP:
        for pass_ in PASSES:
            plan = make_plan(*shape, pass_, workers)
            ours, turns = plan.schedule(workers).makespan, taking_turns(plan, workers)
            assert ours <= turns * 1.02, (shape, pass_)
            ratios.append(ours / turns)
    assert sum(ratios) / len(ratios) < 0.95


@pytest.mark.parametrize(("pass_", "workers"), [("forward", 132), ("separable", 108)])
def test_shares_keep_everyone_busy_where_units_are_few_or_long(pass_, workers):
    plan = make_plan(1, 33, (6, 12, 18), 2048, pass_, workers)
    schedule = plan.schedule(workers)
    assert schedule.workers == [
        [u for u, unit in enumerate(plan.units) if unit.worker == w] for w in range(workers)
    ]
    assert schedule.makespan < 1.05 * schedule.total / workers
    assert plan.schedule(workers - 1).makespan > schedule.makespan  # not its shares


def test_workers_beyond_the_units_have_none():
    plan = _plan.Problem(1, 4, 4, [_plan.Branch(3, 2, 8)]).plan()
    schedule = plan.schedule(6)
    assert schedule.workers[0] == [0]
    assert schedule.busy[len(plan.units) :] == [0] * (6 - len(plan.units))


def test_nothing_to_do():
    plan = _plan.Problem(0, 4, 4, [_plan.Branch(3, 2, 8)]).plan()
    schedule = plan.schedule(3)
    assert schedule.workers == [[], [], []]
    assert schedule.makespan == schedule.total == 0


@pytest.mark.parametrize("workers", [0, -1, 2**24 + 1])
def test_bad_workers(workers):
    plan = _plan.Problem(1, 4, 4, [_plan.Branch(3, 2, 8)]).plan()
    with pytest.raises(ValueError, match=rf"workers must be in \[1, 16777216\] but is {workers}"):
        plan.schedule(workers)
