# SPDX-License-Identifier: BSD-3-Clause
"""The planner against tables computed once by another program.

One 1x1 branch and three 3x3 branches make 28 taps; a tile-tap is 128 pixels times one tap.
"""

from __future__ import annotations

from collections import Counter

import pytest

from aspp_ext import _plan

# map, then the live share of a 3x3 branch at rates 6 12 18 24 36
FRACTIONS = """
33x33 0.7723 0.5739 0.4050 0.2654 0.1111
65x65 0.8807 0.7690 0.6649 0.5683 0.3979
97x97 0.9192 0.8419 0.7679 0.6973 0.5664
64x128 0.9082 0.8203 0.7363 0.6562 0.5078
"""

# map, rate, number of regions, then count*area:taps of the regions
CLASSES = """
33x33 6 9 4*36:4 4*126:6 1*441:9
33x33 12 9 1*81:9 4*108:6 4*144:4
33x33 18 9 1*9:1 4*45:2 4*225:4
33x33 24 9 4*81:4 4*135:2 1*225:1
33x33 36 1 1*1089:1
65x65 6 9 4*36:4 4*318:6 1*2809:9
65x65 12 9 4*144:4 4*492:6 1*1681:9
65x65 18 9 4*324:4 4*522:6 1*841:9
65x65 24 9 1*289:9 4*408:6 4*576:4
65x65 36 9 1*49:1 4*203:2 4*841:4
97x97 6 9 4*36:4 4*510:6 1*7225:9
97x97 12 9 4*144:4 4*876:6 1*5329:9
97x97 18 9 4*324:4 4*1098:6 1*3721:9
97x97 24 9 4*576:4 4*1176:6 1*2401:9
97x97 36 9 1*625:9 4*900:6 4*1296:4
64x128 6 9 4*36:4 2*312:6 2*696:6 1*6032:9
64x128 12 9 4*144:4 2*480:6 2*1248:6 1*4160:9
64x128 18 9 4*324:4 2*504:6 2*1656:6 1*2576:9
64x128 24 9 2*384:6 4*576:4 1*1280:9 2*1920:6
64x128 36 9 2*288:2 1*448:3 4*1008:4 2*1568:6
"""

# map, rates, N, tile-taps: dense, linear, regions, with 64-row tails, ideal; the last four as a
# share of dense
FORWARD = """
33x33 6/12/18 1 252 198 191 166 142.6 0.786 0.758 0.659 0.566
33x33 6/12/18 2 504 399 332 318.5 285.2 0.792 0.659 0.632 0.566
33x33 6/12/18 8 1932 1579 1192 1171 1140.8 0.817 0.617 0.606 0.590
33x33 6/12/18 16 3836 3168 2342 2304 2281.5 0.826 0.611 0.601 0.595
33x33 12/24/36 1 252 126 117 105 81.3 0.500 0.464 0.417 0.323
33x33 12/24/36 2 504 254 210 184.5 162.6 0.504 0.417 0.366 0.323
33x33 12/24/36 8 1932 998 687 669 650.2 0.517 0.356 0.346 0.337
33x33 12/24/36 16 3836 1997 1338 1312 1300.5 0.521 0.349 0.342 0.339
65x65 6/12/18 1 952 829 805 760 720.6 0.871 0.846 0.798 0.757
65x65 6/12/18 2 1876 1651 1520 1482.5 1441.2 0.880 0.810 0.790 0.768
65x65 6/12/18 8 7420 6590 5824 5803 5764.8 0.888 0.785 0.782 0.777
65x65 6/12/18 16 14812 13207 11606 11552 11529.5 0.892 0.784 0.780 0.778
65x65 12/24/36 1 952 721 620 582 548.5 0.757 0.651 0.611 0.576
65x65 12/24/36 2 1876 1435 1164 1127 1096.9 0.765 0.620 0.601 0.585
65x65 12/24/36 8 7420 5719 4434 4412 4387.8 0.771 0.598 0.595 0.591
65x65 12/24/36 16 14812 11444 8824 8790 8775.5 0.773 0.596 0.593 0.592
97x97 6/12/18 1 2072 1910 1811 1786 1746.6 0.922 0.874 0.862 0.843
97x97 6/12/18 2 4144 3823 3572 3534.5 3493.2 0.923 0.862 0.853 0.843
97x97 6/12/18 8 16492 15275 14032 14011 13972.8 0.926 0.851 0.850 0.847
97x97 6/12/18 16 32956 30560 28022 27968 27945.5 0.927 0.850 0.849 0.848
97x97 12/24/36 1 2072 1747 1556 1508 1466.5 0.843 0.751 0.728 0.708
97x97 12/24/36 2 4144 3497 3016 2971 2932.9 0.844 0.728 0.717 0.708
97x97 12/24/36 8 16492 13967 11794 11756 11731.8 0.847 0.715 0.713 0.711
97x97 12/24/36 16 32956 27938 23512 23474 23463.5 0.848 0.713 0.712 0.712
64x128 6/12/18 1 1792 1576 1558 1516.5 1483.8 0.879 0.869 0.846 0.828
64x128 6/12/18 2 3584 3152 3033 2996 2967.5 0.879 0.846 0.836 0.828
64x128 6/12/18 8 14336 12608 11918 11878 11870.0 0.879 0.831 0.829 0.828
64x128 6/12/18 16 28672 25216 23756 23740 23740.0 0.879 0.829 0.828 0.828
64x128 12/24/36 1 1792 1360 1255 1225 1207.0 0.759 0.700 0.684 0.674
64x128 12/24/36 2 3584 2720 2450 2422 2414.0 0.759 0.684 0.676 0.674
64x128 12/24/36 8 14336 10880 9656 9656 9656.0 0.759 0.674 0.674 0.674
64x128 12/24/36 16 28672 21760 19312 19312 19312.0 0.759 0.674 0.674 0.674
"""

# map, rates, joint regions, share of dense: regions at N = 1 2 8 16, linear at N = 8, ideal
DGRAD = """
33x33 6/12/18 49 3.444 1.722 0.923 0.755 0.817 0.599
33x33 12/24/36 25 0.873 0.619 0.404 0.383 0.517 0.341
65x65 6/12/18 49 1.424 0.968 0.847 0.806 0.888 0.780
65x65 12/24/36 49 1.168 0.793 0.632 0.617 0.771 0.593
97x97 6/12/18 49 1.093 0.933 0.879 0.860 0.926 0.849
97x97 12/24/36 49 1.060 0.844 0.717 0.717 0.847 0.712
64x128 6/12/18 49 1.196 0.939 0.870 0.839 0.879 0.828
64x128 12/24/36 49 1.011 0.806 0.674 0.674 0.759 0.674
"""

# map, rates, share of dense: live blocks and ideal at N = 1, 2, 8, 16
WGRAD = """
33x33 6/12/18 0.587 0.566 0.596 0.582 0.600 0.595 0.599 0.597
33x33 12/24/36 0.341 0.323 0.343 0.332 0.343 0.339 0.342 0.340
65x65 6/12/18 0.774 0.768 0.778 0.774 0.780 0.778 0.780 0.779
65x65 12/24/36 0.593 0.585 0.593 0.589 0.594 0.592 0.594 0.593
97x97 6/12/18 0.846 0.843 0.847 0.846 0.849 0.848 0.849 0.848
97x97 12/24/36 0.711 0.708 0.712 0.710 0.713 0.712 0.713 0.712
64x128 6/12/18 0.830 0.828 0.829 0.828 0.828 0.828 0.828 0.828
64x128 12/24/36 0.675 0.674 0.674 0.674 0.674 0.674 0.674 0.674
"""

# map, rates, N, share of dense: row bands, regions, merged, merged with tails, ideal
MERGE = """
33x33 6/12/18 1 0.845 0.758 0.702 0.651 0.566
33x33 6/12/18 2 0.786 0.659 0.651 0.632 0.566
33x33 6/12/18 4 0.783 0.650 0.649 0.609 0.582
33x33 12/24/36 1 0.560 0.464 0.433 0.411 0.323
33x33 12/24/36 2 0.494 0.417 0.411 0.367 0.323
33x33 12/24/36 4 0.494 0.377 0.377 0.351 0.332
65x65 6/12/18 1 0.896 0.846 0.820 0.799 0.757
65x65 6/12/18 2 0.890 0.810 0.810 0.791 0.768
65x65 6/12/18 4 0.884 0.796 0.796 0.782 0.774
65x65 12/24/36 1 0.773 0.651 0.642 0.611 0.576
65x65 12/24/36 2 0.771 0.620 0.620 0.601 0.585
65x65 12/24/36 4 0.764 0.605 0.605 0.595 0.589
97x97 6/12/18 1 0.933 0.874 0.868 0.862 0.843
97x97 6/12/18 2 0.924 0.862 0.862 0.853 0.843
97x97 6/12/18 4 0.922 0.856 0.856 0.849 0.846
97x97 12/24/36 1 0.857 0.751 0.747 0.728 0.708
97x97 12/24/36 2 0.844 0.728 0.728 0.717 0.708
97x97 12/24/36 4 0.842 0.719 0.719 0.714 0.710
64x128 6/12/18 1 0.879 0.869 0.856 0.845 0.828
64x128 6/12/18 2 0.879 0.846 0.845 0.835 0.828
64x128 6/12/18 4 0.879 0.836 0.835 0.831 0.828
64x128 12/24/36 1 0.759 0.700 0.696 0.684 0.674
64x128 12/24/36 2 0.759 0.684 0.684 0.676 0.674
64x128 12/24/36 4 0.759 0.676 0.676 0.674 0.674
"""

# map, rates, N, share of dense: regions with tails of 8 16 32 64 128 pixels, ideal
TAILS = """
33x33 6/12/18 1 0.581 0.591 0.632 0.659 0.758 0.566
33x33 6/12/18 2 0.571 0.581 0.591 0.632 0.659 0.566
33x33 6/12/18 8 0.590 0.592 0.596 0.606 0.617 0.590
33x33 12/24/36 1 0.332 0.341 0.366 0.417 0.464 0.323
33x33 12/24/36 2 0.325 0.332 0.341 0.366 0.417 0.323
33x33 12/24/36 8 0.337 0.338 0.340 0.346 0.356 0.337
65x65 6/12/18 1 0.762 0.765 0.779 0.798 0.846 0.757
65x65 6/12/18 2 0.770 0.773 0.776 0.790 0.810 0.768
65x65 6/12/18 8 0.777 0.777 0.778 0.782 0.785 0.777
65x65 12/24/36 1 0.579 0.582 0.592 0.611 0.651 0.576
65x65 12/24/36 2 0.586 0.588 0.591 0.601 0.620 0.585
65x65 12/24/36 8 0.591 0.592 0.592 0.595 0.598 0.591
97x97 6/12/18 1 0.845 0.847 0.853 0.862 0.874 0.843
97x97 6/12/18 2 0.844 0.845 0.847 0.853 0.862 0.843
97x97 6/12/18 8 0.847 0.847 0.848 0.850 0.851 0.847
97x97 12/24/36 1 0.709 0.712 0.717 0.728 0.751 0.708
97x97 12/24/36 2 0.708 0.709 0.712 0.717 0.728 0.708
97x97 12/24/36 8 0.711 0.711 0.712 0.713 0.715 0.711
64x128 6/12/18 1 0.829 0.831 0.836 0.846 0.869 0.828
64x128 6/12/18 2 0.828 0.829 0.831 0.836 0.846 0.828
64x128 6/12/18 8 0.828 0.828 0.828 0.829 0.831 0.828
64x128 12/24/36 1 0.674 0.674 0.676 0.684 0.700 0.674
64x128 12/24/36 2 0.674 0.674 0.674 0.676 0.684 0.674
64x128 12/24/36 8 0.674 0.674 0.674 0.674 0.674 0.674
"""

# map, rates, N, units, k blocks of the longest, total / 132, their ratio
UNITS = """
33x33 6/12/18 1 47 288 46 6.22
33x33 6/12/18 2 80 288 80 3.58
33x33 6/12/18 4 153 288 154 1.86
33x33 6/12/18 8 284 288 289 1.00
33x33 6/12/18 16 558 288 568 0.51
33x33 12/24/36 1 45 288 28 10.15
33x33 12/24/36 2 82 288 51 5.66
33x33 12/24/36 4 149 288 89 3.22
33x33 12/24/36 8 283 288 167 1.73
33x33 12/24/36 16 554 288 324 0.89
65x65 6/12/18 1 149 288 195 1.48
65x65 6/12/18 2 280 288 368 0.78
65x65 6/12/18 4 545 288 719 0.40
65x65 6/12/18 8 1068 288 1412 0.20
65x65 6/12/18 16 2126 288 2814 0.10
65x65 12/24/36 1 148 288 150 1.92
65x65 12/24/36 2 280 288 282 1.02
65x65 12/24/36 4 542 288 546 0.53
65x65 12/24/36 8 1066 288 1075 0.27
65x65 12/24/36 16 2124 288 2139 0.13
97x97 6/12/18 1 307 288 439 0.66
97x97 6/12/18 2 604 288 866 0.33
97x97 6/12/18 4 1193 288 1714 0.17
97x97 6/12/18 8 2364 288 3402 0.08
97x97 6/12/18 16 4718 288 6793 0.04
97x97 12/24/36 1 312 288 377 0.76
97x97 12/24/36 2 604 288 731 0.39
97x97 12/24/36 4 1190 288 1440 0.20
97x97 12/24/36 8 2362 288 2859 0.10
97x97 12/24/36 16 4712 288 5700 0.05
64x128 6/12/18 1 270 288 378 0.76
64x128 6/12/18 2 525 288 735 0.39
64x128 6/12/18 4 1036 288 1453 0.20
64x128 6/12/18 8 2058 288 2889 0.10
64x128 6/12/18 16 4100 288 5759 0.05
64x128 12/24/36 1 267 288 304 0.95
64x128 12/24/36 2 520 288 594 0.48
64x128 12/24/36 4 1028 288 1174 0.25
64x128 12/24/36 8 2048 288 2341 0.12
64x128 12/24/36 16 4096 288 4682 0.06
"""

# Tiles of 128 x 256 of grad_input with 2048 channels; grad_weight has 448 at any size.
GRADIENT_UNITS = [
    ("33x33", 1, 72),
    ("33x33", 8, 552),
    ("65x65", 1, 272),
    ("65x65", 8, 2120),
    ("97x97", 1, 592),
    ("97x97", 8, 4712),
    ("64x128", 1, 512),
    ("64x128", 8, 4096),
]


def rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.strip().splitlines()]


def pyramid(
    size: str, rates: str, batch: int = 1, *, channels: tuple[int, int] = (1, 1)
) -> _plan.Problem:
    height, width = map(int, size.split("x"))
    in_channels, out_channels = channels
    branches = [_plan.Branch(1, 1, out_channels)]
    branches += [_plan.Branch(3, int(rate), out_channels) for rate in rates.split("/")]
    return _plan.Problem(batch, height, width, branches, in_channels)


def only(problem: _plan.Problem, branch: int) -> _plan.Problem:
    branches = [problem.branches[branch]]
    return _plan.Problem(problem.batch, problem.height, problem.width, branches)


def shares(dense: float, *values: float) -> list[str]:
    return [f"{value / dense:.3f}" for value in values]


@pytest.mark.parametrize("row", rows(FRACTIONS), ids=" ".join)
def test_live_share(row: list[str]) -> None:
    size, *published = row
    problem = pyramid(size, "6/12/18/24/36")
    assert [f"{problem.live_share(branch):.4f}" for branch in range(1, 6)] == published


@pytest.mark.parametrize("row", rows(CLASSES), ids=" ".join)
def test_regions(row: list[str]) -> None:
    size, rate, count, *published = row
    regions = pyramid(size, rate).regions(1)
    kinds = Counter((region.area, region.tap_count) for region in regions)
    assert len(regions) == int(count)
    assert [f"{n}*{area}:{taps}" for (area, taps), n in sorted(kinds.items())] == published


@pytest.mark.parametrize("row", rows(FORWARD), ids=" ".join)
def test_forward_cost(row: list[str]) -> None:
    size, rates, batch, *published = row
    cost = pyramid(size, rates, int(batch)).cost()
    counts = [cost.dense, cost.linear, cost.regions, cost.regions_tails]
    assert counts == [float(count) for count in published[:4]]
    assert f"{cost.ideal:.1f}" == published[4]
    assert shares(cost.dense, *counts[1:], cost.ideal) == published[5:]


@pytest.mark.parametrize("row", rows(DGRAD), ids=" ".join)
def test_grad_input_cost(row: list[str]) -> None:
    size, rates, count, *published = row
    costs = [pyramid(size, rates, batch).cost("grad_input") for batch in (1, 2, 8, 16)]
    assert len(pyramid(size, rates).joint_regions()) == int(count)
    got = [*(share for cost in costs for share in shares(cost.dense, cost.regions))]
    got += shares(costs[2].dense, costs[2].linear)
    got += [f"{pyramid(size, rates).live_share():.3f}"]
    assert got == published


@pytest.mark.parametrize("row", rows(WGRAD), ids=" ".join)
def test_grad_weight_cost(row: list[str]) -> None:
    size, rates, *published = row
    costs = [pyramid(size, rates, batch).weight_cost(64) for batch in (1, 2, 8, 16)]
    got = [share for cost in costs for share in shares(cost.dense, cost.live, cost.ideal)]
    assert got == published


@pytest.mark.parametrize("row", rows(MERGE), ids=" ".join)
def test_merged_cost(row: list[str]) -> None:
    size, rates, batch, *published = row
    problem = pyramid(size, rates, int(batch))
    cost = problem.cost()
    bands = cost.dense / 28  # the 1x1 branch is one band
    for branch in range(1, 4):
        for span in sorted({tuple(region.rows) for region in problem.regions(branch)}):
            band = problem.region_at(branch, span, (0, problem.width))
            bands += -(-problem.batch * band.area // 128) * band.tap_count
    # The published column gives tails to the 3x3 branches alone.
    pointwise = only(problem, 0).cost()
    tails = cost.merged_tails - pointwise.merged_tails + pointwise.merged
    got = shares(cost.dense, bands, cost.regions, cost.merged, tails, cost.ideal)
    assert got == published


@pytest.mark.parametrize("row", rows(TAILS), ids=" ".join)
def test_tails(row: list[str]) -> None:
    size, rates, batch, *published = row
    problem = pyramid(size, rates, int(batch))
    costs = [problem.cost(tail=tail) for tail in (8, 16, 32, 64, 128)]
    got = [share for cost in costs for share in shares(cost.dense, cost.regions_tails)]
    assert got + shares(costs[0].dense, costs[0].ideal) == published


@pytest.mark.parametrize("row", rows(UNITS), ids=" ".join)
def test_units(row: list[str]) -> None:
    size, rates, batch, *published = row
    plan = pyramid(size, rates, int(batch), channels=(2048, 256)).plan(order="regions")
    mean = plan.total / 132
    assert [str(len(plan.units)), str(plan.longest)] == published[:2]
    assert [f"{mean:.0f}", f"{plan.longest / mean:.2f}"] == published[2:]


@pytest.mark.parametrize(("size", "batch", "units"), GRADIENT_UNITS)
def test_gradient_units(size: str, batch: int, units: int) -> None:
    problem = pyramid(size, "6/12/18", batch, channels=(2048, 256))
    assert len(problem.plan("grad_input", order="linear").units) == units
    assert len(problem.plan("grad_weight").units) == 28 * 2 * 8
