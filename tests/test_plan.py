# SPDX-License-Identifier: BSD-3-Clause
"""The planner against brute force: every small problem (in C++), merges, work lists, bad input."""

from __future__ import annotations

import functools
import itertools

import programs
import pytest

from aspp_ext import _plan


def pyramid(batch: int, height: int, width: int, *rates, **channels: int) -> _plan.Problem:
    """A 1x1 branch and a 3x3 branch per rate."""
    branches = [_plan.Branch(1, 1, 2), *(_plan.Branch(3, rate, 5) for rate in rates)]
    return _plan.Problem(batch, height, width, branches, **channels)


@pytest.mark.parametrize("mode", [[], ["--planted"]], ids=["agrees", "notices faults"])
def test_exhaustive(mode: list[str]) -> None:
    run = programs.run(programs.ready("plan_exhaustive"), *mode)
    assert run.returncode == 0, run.stdout + run.stderr


# --- Merging


def cheapest_cover(
    problem: _plan.Problem, branch: int | None, tile: _plan.Tile, product: int = 0
) -> int:
    """The least cost of all partitions of the grid into rectangles, by trying them all."""
    regions = problem.regions(branch) if branch is not None else problem.joint_regions()
    rows = sorted({edge for region in regions for edge in region.rows})
    cols = sorted({edge for region in regions for edge in region.cols})
    cells = list(itertools.product(range(len(rows) - 1), range(len(cols) - 1)))
    choices = {cell: [] for cell in cells}
    for (top, left), (bottom, right) in itertools.product(cells, cells):
        if bottom < top or right < left:
            continue
        union = problem.region_at(
            branch, (rows[top], rows[bottom + 1]), (cols[left], cols[right + 1])
        )
        cost = cost_of(problem, [union], tile, product)
        held = frozenset(c for c in cells if top <= c[0] <= bottom and left <= c[1] <= right)
        choices[top, left].append((held, cost))

    @functools.cache
    def least(free: frozenset) -> int:
        if not free:
            return 0
        return min(cost + least(free - held) for held, cost in choices[min(free)] if held <= free)

    return least(frozenset(cells))


def cost_of(problem: _plan.Problem, regions: list, tile: _plan.Tile, product: int = 0) -> int:
    """Paid pixels * taps; separable's product counts as so many taps."""
    paid = [-(-problem.batch * region.area // tile.tail) * tile.tail for region in regions]
    taps = [region.tap_count + product for region in regions]
    return sum(a * b for a, b in zip(paid, taps, strict=True))


@pytest.mark.parametrize("tail", [8, 16, 64, 128])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    ("height", "width", "rate"),
    [(33, 33, 6), (33, 33, 12), (33, 33, 24), (13, 29, 5), (20, 9, (7, 2))],
)
def test_merge_is_the_best(height, width, rate, batch, tail) -> None:
    tile = _plan.Tile(m=128, tail=tail)
    problem = _plan.Problem(batch, height, width, [_plan.Branch(3, rate)])
    for branch in (0, None):
        chosen = (
            problem.joint_regions("merged", tile)
            if branch is None
            else problem.regions(branch, "merged", tile)
        )
        assert cost_of(problem, chosen, tile) == cheapest_cover(problem, branch, tile)
    separable = problem.plan("separable", "merged", tile).regions
    assert cost_of(problem, separable, tile, 4) == cheapest_cover(problem, 0, tile, 4)


def test_merge_finds_the_pinwheel() -> None:
    """33x33 at rate 12 is cheapest as four arms round a centre: no straight cut reaches it."""
    problem = _plan.Problem(1, 33, 33, [_plan.Branch(3, 12)])
    merged = problem.regions(0, "merged", _plan.Tile())
    assert sorted(region.area for region in merged) == [81, 252, 252, 252, 252]
    assert [region.area for region in merged if not region.padded] == [81]


# --- Work lists


def test_few_units_are_cut_into_equal_shares() -> None:
    problem = _plan.Problem(1, 33, 33, [_plan.Branch(3, 6, 256)], in_channels=2048)
    whole = problem.plan(order="regions")
    split = problem.plan(order="regions", processors=132)
    assert whole.longest == 288
    assert split.total == whole.total
    assert split.schedule(132).makespan < 1.1 * split.schedule(132).total / 132
    workers = [unit.worker for unit in split.units]
    assert workers == sorted(workers)
    assert set(workers) <= set(range(132))
    assert {unit.worker for unit in whole.units} == {-1}
    assert min(unit.k.size for unit in split.units) >= 8
    slices: dict[int, list] = {}
    for unit in split.units:
        slices.setdefault(unit.tile, []).append(unit)
    for units in slices.values():
        units.sort(key=lambda unit: unit.slice)
        assert [unit.slice for unit in units] == list(range(units[0].slices))
        assert len({(unit.region, unit.m, unit.n) for unit in units}) == 1
        assert units[0].k.begin == 0
        assert all(a.k.end == b.k.begin for a, b in itertools.pairwise(units))


def test_units_go_image_by_image_and_end_longest_first() -> None:
    problem = pyramid(8, 65, 65, 12, 24, 36, in_channels=64)
    plan = problem.plan(processors=50)
    images = [unit.m.begin // plan.regions[unit.region].area for unit in plan.units]
    assert images[:-100] == sorted(images[:-100])
    last = [(unit.m.size + 127) // 128 * unit.k.size for unit in plan.units[-100:]]
    assert last == sorted(last, reverse=True)
    assert repr(plan.units) == repr(problem.plan(processors=50).units)


def test_cheapest_is_never_dearer() -> None:
    for batch, rates in itertools.product((1, 8), ((6, 12, 18), (12, 24, 36))):
        problem = pyramid(batch, 33, 33, *rates, in_channels=64)
        for pass_ in ("forward", "grad_input", "separable"):
            totals = {}
            for order in ("regions", "merged", "linear", "cheapest"):
                plan = problem.plan(pass_, order)
                overhead = plan.tile.m * (16 if pass_ == "separable" else 4)
                totals[order] = plan.schedule(1).total - len(plan.units) * overhead
                assert pass_ == "separable" or totals[order] == plan.total * plan.tile.m
            assert totals["cheapest"] == min(totals.values())


def test_separable_has_forwards_regions_at_another_price() -> None:
    problem = pyramid(2, 33, 33, 6, 12, in_channels=100)
    tile = _plan.Tile(128, 4, 32)
    forward, plan = (problem.plan(pass_, "regions", tile) for pass_ in ("forward", "separable"))
    assert plan.regions == forward.regions
    where = [(unit.region, unit.m, unit.n) for unit in plan.units]
    assert where == [(unit.region, unit.m, unit.n) for unit in forward.units]
    assert {unit.k for unit in plan.units} == {_plan.Interval(0, 4)}
    cost, taps = problem.cost("separable"), problem.cost()
    products = 3 * 4  # a branch's product is worth four taps
    assert cost.dense == taps.dense + -(-2 * 33 * 33 // 128) * products
    assert cost.ideal == taps.ideal + 2 * 33 * 33 * products / 128
    assert cost.linear == taps.linear + -(-2 * 33 * 33 // 128) * products
    assert cost.merged <= cost.regions
    assert cost.merged_tails <= cost.regions_tails
    assert cost.regions > taps.regions + cost.ideal - taps.ideal  # its tails are paid for too


def test_a_dear_product_merges_what_taps_alone_would_not() -> None:
    problem = _plan.Problem(1, 33, 33, [_plan.Branch(3, 12, 256)], 2048)
    regions = {
        pass_: len(problem.plan(pass_, "merged", _plan.Tile(tail=64)).regions)
        for pass_ in ("forward", "separable")
    }
    assert regions["separable"] < regions["forward"]


# --- Sizes and words


def test_any_size() -> None:
    audio = _plan.Problem(4, 1, 10**12, [_plan.Branch((1, 31), (1, 10**10))])
    assert len(audio.regions(0)) == 31
    assert sum(region.area for region in audio.regions(0)) == 10**12
    point = _plan.Problem(1, 1, 1, [_plan.Branch(7, 10**9)])
    assert [region.tap_count for region in point.regions(0)] == [1]
    wide = _plan.Problem(1, 4096, 4096, [_plan.Branch(7, rate) for rate in (12, 24, 36)])
    assert len(wide.joint_regions()) == 13**2
    assert len(wide.joint_regions("merged")) <= 13**2
    assert wide.live_share() > 0.98


def test_axis() -> None:
    axis = _plan.Axis(33, 3, 12)
    assert [axis.live_positions(tap) for tap in range(3)] == [(12, 33), (0, 33), (0, 21)]
    assert axis.live_taps((0, 12)) == (1, 3)
    assert axis.live_taps((11, 13)) == (0, 3)
    assert axis.cuts() == [0, 12, 21, 33]
    assert _plan.Axis(33, 3, -12).live_taps((0, 12)) == (0, 2)
    assert tuple(axis.live_positions(0)) == (12, 33)


BAD = [
    (lambda: pyramid(-1, 3, 3), "batch must be >= 0 but is -1"),
    (lambda: pyramid(1, 0, 3), "height must be >= 1 but is 0"),
    (lambda: pyramid(1, 3, -5), "width must be >= 1 but is -5"),
    (lambda: pyramid(1, 3, 3, in_channels=0), "in_channels must be >= 1 but is 0"),
    (lambda: _plan.Problem(1, 3, 3, []), "branches must hold at least one branch but is empty"),
    (
        lambda: _plan.Problem(1, 3, 3, [_plan.Branch(), _plan.Branch((3, 4))]),
        "branches[1].kernel must be odd and >= 1 on each axis but is (3, 4)",
    ),
    (
        lambda: pyramid(1, 3, 3, (1, 0)),
        "branches[1].rate must be >= 1 on each axis but is (1, 0)",
    ),
    (
        lambda: _plan.Problem(1, 3, 3, [_plan.Branch(1, 1, 0)]),
        "branches[0].out_channels must be >= 1 but is 0",
    ),
    (lambda: pyramid(1, 3, 3, 2**63 - 1), "the padded height must fit in 64 bits but is"),
    (lambda: pyramid(2**31, 2**31, 2), "the multiply-adds of the batch must fit in 64 bits but is"),
    (
        lambda: _plan.Problem(1, 3, 3, [_plan.Branch(2001)]),
        "at most 1048576 taps together but have",
    ),
    (lambda: pyramid(1, 3, 3).regions(1), "branch must be in [0, 1) but is 1"),
    (lambda: pyramid(1, 3, 3).plan("back"), "'grad_weight' or 'separable' but is 'back'"),
    (lambda: pyramid(1, 3, 3).plan(order="best"), "'cheapest' or 'phases' but is 'best'"),
    (lambda: pyramid(1, 3, 3).cost("grad_weight"), "or 'separable' (see weight_cost) but pass is"),
    (lambda: pyramid(2**20, 2**10, 2**10).plan(), "at most 16777216 tiles of pixels but has"),
    (lambda: _plan.Tile(m=0), "a tile must be >= 1 on each side but is Tile(m=0"),
    (lambda: _plan.Tile(tail=48), "a tile's tail must divide its m = 128 but is 48"),
    (lambda: _plan.Axis(5, 2, 1), "kernel must be odd and >= 1 on each axis but is (1, 2)"),
    (lambda: _plan.Axis(5, 3, 1).live_taps((3, 6)), "positions must be a part of [0, 5)"),
]


@pytest.mark.parametrize(("call", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(call, words: str) -> None:
    with pytest.raises((ValueError, OverflowError, IndexError)) as error:
        call()
    assert words in str(error.value)


def test_everything_prints() -> None:
    problem = pyramid(1, 9, 9, 2, in_channels=3)
    assert repr(problem.regions(1)[0]) == (
        "Region(rows=[0, 2), cols=[0, 2), live=[TapBlock(branch=1, rows=[1, 3), cols=[1, 3), "
        "first=(0, 0), step=(2, 2))])"
    )
    plan = problem.plan("grad_weight")
    printed = [problem, problem.branches[1], plan, plan.units[0], plan.tile, problem.cost()]
    printed += [problem.weight_cost(), _plan.Axis(9, 3, 2), plan.regions[0].taps[0]]
    for value in printed:
        assert repr(value).startswith(f"{type(value).__name__}(")
