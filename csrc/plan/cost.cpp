// SPDX-License-Identifier: BSD-3-Clause
#include "cost.h"

#include "merge.h"

namespace aspp::plan {
namespace {

// The same geometry with one channel: a tap is then one k block, work is paid pixels * taps.
Problem without_channels(const Problem& problem) {
  std::vector<Branch> branches = problem.branches;
  for (Branch& branch : branches) branch.out_channels = 1;
  return Problem(problem.batch, problem.height, problem.width, std::move(branches));
}

Index tap_count(const Problem& problem) {
  Index count = 0;
  for (const Branch& branch : problem.branches) count += branch.kernel.h * branch.kernel.w;
  return count;
}

// The 1x1s that follow the taps, in taps.
Index pointwise_taps(const Problem& problem, Pass pass) {
  return pass == Pass::separable ? problem.branch_count() * kPointwiseTaps : 0;
}

double live_pixels(const Problem& problem) {
  Index live = 0;
  for (Index b = 0; b < problem.branch_count(); ++b) live += live_pixel_taps(problem, b);
  return static_cast<double>(live * problem.batch);
}

double product(Index a, Index b) { return static_cast<double>(a) * static_cast<double>(b); }

double share(Index pixels, Index per_tile) {
  return static_cast<double>(pixels) / static_cast<double>(per_tile);
}

}  // namespace

Cost cost(const Problem& channelled, Pass pass, Index pixels, Index tail) {
  require(pass != Pass::grad_weight,
          "cost must be asked for 'forward', 'grad_input' or 'separable' (see weight_cost) but "
          "pass is 'grad_weight'");
  const Tile whole{pixels, 1, 1, pixels};
  const Tile tails{pixels, 1, 1, tail};
  check_tile(tails);
  const Problem problem = without_channels(channelled);
  Cost cost;
  const Index products = pointwise_taps(problem, pass);
  cost.dense = product(ceil_div(problem.pixels(), pixels), tap_count(problem) + products);
  cost.ideal =
      (live_pixels(problem) + product(problem.pixels(), products)) / static_cast<double>(pixels);
  for (const Group& group : groups(problem, pass)) {
    const std::vector<Region> exact = exact_regions(problem, group);
    const auto of = [&](const std::vector<Region>& regions, const Tile& tile) {
      return share(work(problem, pass, regions, tile), pixels);
    };
    cost.linear += share(work(problem, pass, linear_tiling(problem, group, whole), whole), pixels);
    cost.regions += of(exact, whole);
    cost.regions_tails += of(exact, tails);
    cost.merged += of(merged_regions(problem, group, whole), whole);
    cost.merged_tails += of(merged_regions(problem, group, tails), tails);
  }
  return cost;
}

WeightCost weight_cost(const Problem& problem, Index pixels) {
  require(pixels >= 1, "a block must have >= 1 pixels but has ", pixels);
  WeightCost cost;
  cost.dense = static_cast<double>(ceil_div(problem.pixels(), pixels) * tap_count(problem));
  cost.ideal = live_pixels(problem) / static_cast<double>(pixels);
  for (const Region& region : tap_rectangles(problem))
    cost.live += static_cast<double>(ceil_div(problem.batch * region.area(), pixels));
  return cost;
}

}  // namespace aspp::plan
