// SPDX-License-Identifier: BSD-3-Clause
#include "units.h"

#include "merge.h"

namespace aspp::plan {
namespace {

constexpr std::string_view kOrderNames[] = {"regions", "merged", "linear", "cheapest"};

Index count(const std::vector<Unit>& units) { return static_cast<Index>(units.size()); }

void push(std::vector<Unit>& units, const Unit& unit) {
  require(count(units) < kMaxEntries, "a plan must have at most ", kMaxEntries,
          " units but has more");
  units.push_back(unit);
}

// Appends a unit per `tile_m` x tile.n block of [m] x [0, n).
void add_tiles(Plan& plan, Index region, Interval m, Index n, Index k) {
  const Tile& tile = plan.tile;
  for (Index row = m.begin; row < m.end; row += std::min(tile.m, m.end - row))
    for (Index col = 0; col < n; col += std::min(tile.n, n - col))
      push(plan.units, {region,
                        count(plan.units),
                        0,
                        1,
                        {row, row + std::min(tile.m, m.end - row)},
                        {col, col + std::min(tile.n, n - col)},
                        {0, k}});
}

void add_group(Plan& plan, const Problem& problem, const Group& group, Order order) {
  Tiling part = tiling(problem, group, order, plan.tile);
  const auto base = static_cast<Index>(plan.regions.size());
  const Index n = group.pass == Pass::forward
                      ? problem.branches[group.branches.front()].out_channels
                      : problem.in_channels;
  for (const auto& [region, pixels] : part.tiles)
    add_tiles(plan, base + region, pixels, n,
              k_blocks(problem, group.pass, part.regions[region], plan.tile));
  plan.regions.insert(plan.regions.end(), part.regions.begin(), part.regions.end());
}

void add_weight_tiles(Plan& plan, const Problem& problem) {
  plan.regions = tap_rectangles(problem);
  for (Index r = 0; r < static_cast<Index>(plan.regions.size()); ++r) {
    const Region& region = plan.regions[r];
    add_tiles(plan, r, {0, problem.branches[region.live.front().branch].out_channels},
              problem.in_channels, k_blocks(problem, plan.pass, region, plan.tile));
  }
}

void longest_first(std::vector<Unit>& units, Index first, const Tile& tile) {
  std::stable_sort(units.begin() + first, units.end(),
                   [&](const Unit& a, const Unit& b) { return work(a, tile) > work(b, tile); });
}

void arrange(Plan& plan, Index processors) {
  if (plan.pass == Pass::grad_weight) {  // every unit reads all images: no locality to keep
    if (processors > 0) longest_first(plan.units, 0, plan.tile);
    return;
  }
  const auto image = [&](const Unit& unit) {
    return unit.m.begin / plan.regions[unit.region].area();
  };
  std::stable_sort(plan.units.begin(), plan.units.end(),
                   [&](const Unit& a, const Unit& b) { return image(a) < image(b); });
  if (processors > 0)
    longest_first(plan.units, std::max<Index>(0, count(plan.units) - processors), plan.tile);
}

}  // namespace

std::string_view name(Order order) { return kOrderNames[static_cast<int>(order)]; }

Order order_named(std::string_view name) {
  for (const Order order : {Order::regions, Order::merged, Order::linear, Order::cheapest})
    if (plan::name(order) == name) return order;
  throw std::invalid_argument(sentence(
      "plan: order must be 'regions', 'merged', 'linear' or 'cheapest' but is '", name, "'"));
}

Index work(const Unit& unit, const Tile& tile) {
  return multiply(paid_pixels(unit.m.size(), tile), unit.k.size(), "the work of a unit");
}

Index Plan::longest() const {
  Index result = 0;
  for (const Unit& unit : units) result = std::max(result, unit.k.size());
  return result;
}

Index Plan::total() const {
  Index result = 0;
  for (const Unit& unit : units) result = add(result, unit.k.size(), "the k blocks of a plan");
  return result;
}

Tiling tiling(const Problem& problem, const Group& group, Order order, const Tile& tile) {
  check_tile(tile);
  if (order == Order::linear) return linear_tiling(problem, group, tile);
  Tiling regions = region_tiling(problem,
                                 order == Order::regions ? exact_regions(problem, group)
                                                         : merged_regions(problem, group, tile),
                                 tile);
  if (order != Order::cheapest) return regions;
  Tiling linear = linear_tiling(problem, group, tile);
  const bool linear_wins =
      work(problem, group.pass, linear, tile) < work(problem, group.pass, regions, tile);
  return linear_wins ? linear : regions;
}

std::vector<Unit> split_long(std::vector<Unit> units, const Tile& tile, Index processors,
                             Index shortest_slice) {
  Index total = 0;
  for (const Unit& unit : units) total = add(total, work(unit, tile), "the work of a plan");
  const Index limit = std::max<Index>(1, total / processors / 2);
  std::vector<Unit> result;
  for (Unit unit : units) {
    const Index k = unit.k.size();
    unit.slices =
        std::max<Index>(1, std::min(ceil_div(work(unit, tile), limit), k / shortest_slice));
    for (unit.slice = 0; unit.slice < unit.slices; ++unit.slice) {
      const auto start = [&](Index slice) {
        return k / unit.slices * slice + std::min(slice, k % unit.slices);
      };
      unit.k = {start(unit.slice), start(unit.slice + 1)};
      push(result, unit);
    }
  }
  return result;
}

Plan make_plan(const Problem& problem, Pass pass, const Options& options) {
  check_tile(options.tile);
  require(options.processors >= 0, "processors must be >= 0 but is ", options.processors);
  require(options.shortest_slice >= 1, "shortest_slice must be >= 1 but is ",
          options.shortest_slice);
  Plan plan{pass, options.tile, {}, {}};
  if (pass == Pass::grad_weight)
    add_weight_tiles(plan, problem);
  else
    for (const Group& group : groups(problem, pass)) add_group(plan, problem, group, options.order);
  if (options.processors > 0)
    plan.units =
        split_long(std::move(plan.units), plan.tile, options.processors, options.shortest_slice);
  arrange(plan, options.processors);
  return plan;
}

}  // namespace aspp::plan
