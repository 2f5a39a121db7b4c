# SPDX-License-Identifier: BSD-3-Clause
"""Plans carried out unit by unit in numpy, on integers, against the passes' definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from aspp_ext import _plan

PASSES = ("forward", "grad_input", "grad_weight", "separable")
TILE = _plan.Tile(m=8, n=3, k=2, tail=4)
POISON = 99999


class Pyramid:
    """Integer data for a problem: x [N, C, H, W], w[b] [O, C, kh, kw], g[b] [N, O, H, W].

    Separable has the products of depthwise[b] [C, kh, kw] and pointwise[b] [O, C] for weights.
    """

    def __init__(self, problem: _plan.Problem) -> None:
        rng = np.random.default_rng(0)
        self.problem = problem
        self.plane = (problem.height, problem.width)
        self.x = rng.integers(-4, 5, (problem.batch, problem.in_channels, *self.plane))
        self.w = [
            rng.integers(-4, 5, (branch.out_channels, problem.in_channels, *branch.kernel))
            for branch in problem.branches
        ]
        shapes = [w.shape for w in self.w]
        self.depthwise = [rng.integers(-4, 5, (c, kh, kw)) for _, c, kh, kw in shapes]
        self.pointwise = [rng.integers(-4, 5, (o, c)) for o, c, _, _ in shapes]
        self.g = [rng.integers(-4, 5, (problem.batch, len(w), *self.plane)) for w in self.w]

    def definition(self) -> dict[str, list[np.ndarray]]:
        """The results of the passes, by shifting zero-padded maps."""
        height, width = self.plane
        y = [np.zeros_like(g) for g in self.g]
        separable = [np.zeros_like(g) for g in self.g]
        grad_x = np.zeros_like(self.x)
        grad_w = [np.zeros_like(w) for w in self.w]
        for b, branch in enumerate(self.problem.branches):
            top, left = (k // 2 * r for k, r in zip(branch.kernel, branch.rate, strict=True))
            padded = np.pad(self.x, [(0, 0), (0, 0), (top, top), (left, left)])
            padded_grad = np.zeros_like(padded)
            for i, j in itertools.product(*map(range, branch.kernel)):
                row, col = i * branch.rate[0], j * branch.rate[1]
                here = np.s_[:, :, row : row + height, col : col + width]
                tap = self.w[b][:, :, i, j]
                y[b] += np.einsum("ncyx,oc->noyx", padded[here], tap)
                of_pair = self.depthwise[b][:, i, j] * self.pointwise[b]
                separable[b] += np.einsum("ncyx,oc->noyx", padded[here], of_pair)
                padded_grad[here] += np.einsum("noyx,oc->ncyx", self.g[b], tap)
                grad_w[b][:, :, i, j] = np.einsum("ncyx,noyx->oc", padded[here], self.g[b])
            grad_x += padded_grad[:, :, top : top + height, left : left + width]
        return {
            "forward": y,
            "grad_input": [grad_x],
            "grad_weight": grad_w,
            "separable": separable,
        }

    def executed(self, plan: _plan.Plan) -> list[np.ndarray]:
        """The result of the plan's pass; the first slice of a tile writes, the others add."""
        like = {"grad_input": [self.x], "grad_weight": self.w}
        result = [np.full_like(each, POISON) for each in like.get(plan.pass_, self.g)]
        for unit in sorted(plan.units, key=lambda unit: (unit.tile, unit.slice)):
            region = plan.regions[unit.region]
            if plan.pass_ == "grad_weight":
                (tap,) = region.taps
                value, where = self.weight_product(plan, unit, region, tap)
                target = result[tap.branch]
            else:
                separable = plan.pass_ == "separable"
                product = self.depthwise_product if separable else self.pixel_product
                value, where = product(plan, unit, region)
                branch = 0 if plan.pass_ == "grad_input" else region.live[0].branch
                target = result[branch].transpose(0, 2, 3, 1)
            assert (target[where] == POISON).all() == (unit.slice == 0)
            target[where] = value if unit.slice == 0 else target[where] + value
        return result

    def pixel_product(self, plan, unit, region):
        """[m, n] of forward or grad_input, and where it goes in a [N, H, W, channels] map."""
        forward = plan.pass_ == "forward"
        image, y, x = pixels(region, unit.m)
        value = np.zeros((unit.m.size, unit.n.size), dtype=int)
        steps = []
        for tap in region.taps:
            depth = self.problem.in_channels if forward else len(self.w[tap.branch])
            steps += [(tap, np.s_[k : k + plan.tile.k]) for k in range(0, depth, plan.tile.k)]
        for tap, k in steps[unit.k.begin : unit.k.end]:
            weight = self.w[tap.branch][:, :, tap.row, tap.col]
            weight = weight.T if forward else weight
            source = self.x if forward else self.g[tap.branch]
            values = self.read(region, source, (image, y + tap.dy, x + tap.dx))
            value += values[:, k] @ weight[k, unit.n.begin : unit.n.end]
        return value, (image[:, None], y[:, None], x[:, None], np.arange(*unit.n))

    def depthwise_product(self, plan, unit, region):
        """The same of separable: per block of channels all taps, then one product."""
        image, y, x = pixels(region, unit.m)
        value = np.zeros((unit.m.size, unit.n.size), dtype=int)
        (branch,) = {tap.branch for tap in region.taps}
        assert unit.k.end * plan.tile.k < self.problem.in_channels + plan.tile.k
        for block in range(*unit.k):
            k = np.s_[block * plan.tile.k : (block + 1) * plan.tile.k]
            between = 0
            for tap in region.taps:
                values = self.read(region, self.x, (image, y + tap.dy, x + tap.dx))
                between = between + values[:, k] * self.depthwise[branch][k, tap.row, tap.col]
            value += between @ self.pointwise[branch][unit.n.begin : unit.n.end, k].T
        return value, (image[:, None], y[:, None], x[:, None], np.arange(*unit.n))

    def read(self, region, source, place):
        """[pixels, channels] of a map at (image, row, column), zero outside."""
        image, row, col = place
        inside = (row >= 0) & (row < self.plane[0]) & (col >= 0) & (col < self.plane[1])
        assert region.padded or inside.all()
        return source[image, :, row * inside, col * inside] * inside[:, None]

    def weight_product(self, plan, unit, region, tap):
        """[m, n] of grad_weight, and where it goes in the branch's [O, C, kh, kw]."""
        end = self.problem.batch * region.area
        span = (min(k * plan.tile.k, end) for k in unit.k)
        image, y, x = pixels(region, span)
        out_channels, in_channels = np.arange(*unit.m), np.arange(*unit.n)
        grad = self.g[tap.branch][image, :, y, x][:, out_channels]
        values = self.x[image, :, y + tap.dy, x + tap.dx][:, in_channels]
        return grad.T @ values, (out_channels[:, None], in_channels, tap.row, tap.col)


def pixels(region: _plan.Region, span) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, y, x) of the pixels [begin, end) in the region's linear order."""
    image, rest = np.divmod(np.arange(*span), region.area)
    row, col = np.divmod(rest, region.cols.size)
    return image, region.rows.begin + row, region.cols.begin + col


def pyramid(batch: int, height: int, width: int, *rates, **channels: int) -> _plan.Problem:
    branches = [_plan.Branch(1, 1, 2), *(_plan.Branch(3, rate, 5) for rate in rates)]
    return _plan.Problem(batch, height, width, branches, **channels)


PROBLEMS = {
    "square": pyramid(1, 9, 9, 2, 3, 5, in_channels=7),
    "rates differ": pyramid(3, 7, 10, 1, (2, 4), 6, in_channels=4),
    "rate beyond the map": pyramid(2, 1, 13, 20, in_channels=1),
    "tiles across images": pyramid(5, 2, 3, 1, 2, in_channels=3),
    "empty batch": pyramid(0, 4, 4, 2, in_channels=3),
    "kernels differ": _plan.Problem(
        2, 8, 5, [_plan.Branch((5, 3), (2, 1), 4), _plan.Branch((1, 7), (3, 2), 1)], 5
    ),
}


@pytest.mark.parametrize("processors", [0, 40])
@pytest.mark.parametrize("order", ["regions", "merged", "linear", "cheapest"])
@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_executed_plan(problem: _plan.Problem, pass_: str, order: str, processors: int) -> None:
    data = Pyramid(problem)
    plan = problem.plan(pass_, order, TILE, processors, shortest_slice=2)
    assert plan.pass_ == pass_
    for want, have in zip(data.definition()[pass_], data.executed(plan), strict=True):
        np.testing.assert_array_equal(have, want)
