// SPDX-License-Identifier: BSD-3-Clause
#include "units.h"

#include "merge.h"
#include "schedule.h"
#include "shares.h"

namespace aspp::plan {
namespace {

constexpr Order kOrders[] = {Order::regions, Order::merged, Order::linear, Order::cheapest,
                             Order::phases};
constexpr std::string_view kOrderNames[] = {"regions", "merged", "linear", "cheapest", "phases"};

// The whole map. A tile of its pixels has rows of one phase or two, from all over the map, so that
// each costs about what the average does.
Tiling phase_tiling(const Problem& problem, const Group& group, const Tile& tile) {
  require(group.pass == Pass::separable,
          "order 'phases' is of pass 'separable' alone but pass is '", name(group.pass), "'");
  Region map = region_at(problem, group, {0, problem.height}, {0, problem.width});
  const Index live = live_pixel_taps(problem, group.branches.front());
  map.paid_taps = ceil_div(live, problem.height * problem.width);
  return region_tiling(problem, {std::move(map)}, tile);
}

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
  const Index n = group.pass == Pass::grad_input
                      ? problem.in_channels
                      : problem.branches[group.branches.front()].out_channels;
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

void longest_first(Plan& plan, Index first) {
  const auto longer = [&](const Unit& a, const Unit& b) {
    return unit_cost(plan, a) > unit_cost(plan, b);
  };
  std::stable_sort(plan.units.begin() + first, plan.units.end(), longer);
}

void image_by_image(Plan& plan) {
  const auto image = [&](const Unit& unit) {
    return unit.m.begin / plan.regions[unit.region].area();
  };
  std::stable_sort(plan.units.begin(), plan.units.end(),
                   [&](const Unit& a, const Unit& b) { return image(a) < image(b); });
}

// The order in which whole units keep all processors busy to the end.
void order_units(Plan& plan, Index processors) {
  constexpr Index kWaves = 2;  // more would keep too many images in use
  const Index tail = plan.pass == Pass::grad_weight ? count(plan.units) : kWaves * processors;
  longest_first(plan, std::max<Index>(0, count(plan.units) - tail));
}

// Whole units, or equal shares where those take less time. Shares make all images be in use at
// once, which costs little only where there are few units.
void balance(Plan& plan, const Options& options) {
  constexpr Index kFewWaves = 4;
  const Index processors = options.processors;
  Plan cut = plan;
  order_units(plan, processors);
  if (plan.units.empty() || count(plan.units) / kFewWaves >= processors) return;
  cut.units = cut_into_shares(cut, processors, options.shortest_slice);
  cut.shares = cut.units.back().worker + 1;
  if (cut.units.size() == plan.units.size()) return;  // nothing is in need of a cut
  const Index penalty =
      multiply(plan.tile.m, options.cut_overhead * product_cost(plan.pass), "the cost of a cut");
  if (make_schedule(cut, processors).makespan() <
      make_schedule(plan, processors).makespan() - penalty)
    plan = std::move(cut);
}

}  // namespace

std::string_view name(Order order) { return kOrderNames[static_cast<int>(order)]; }

Order order_named(std::string_view name) {
  for (const Order order : kOrders)
    if (plan::name(order) == name) return order;
  throw std::invalid_argument(
      sentence("plan: order must be 'regions', 'merged', 'linear', 'cheapest' or 'phases' but is '",
               name, "'"));
}

Index unit_overhead(const Plan& plan) {
  return multiply(plan.tile.m, kUnitOverhead * product_cost(plan.pass), "the cost of a unit");
}

Index unit_cost(const Plan& plan, const Unit& unit) {
  const Index depth = multiply(unit.k.size(), block_cost(plan.pass, plan.regions[unit.region]),
                               "the work of a unit");
  const Index work = multiply(paid_pixels(unit.m.size(), plan.tile), depth, "the work of a unit");
  return add(work, unit_overhead(plan), "the cost of a unit");
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
  if (order == Order::phases) return phase_tiling(problem, group, tile);
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

Plan make_plan(const Problem& problem, Pass pass, const Options& options) {
  check_tile(options.tile);
  require(options.processors >= 0, "processors must be >= 0 but is ", options.processors);
  require(options.shortest_slice >= 1, "shortest_slice must be >= 1 but is ",
          options.shortest_slice);
  Plan plan{pass, options.tile, {}, {}, 0};
  if (pass == Pass::grad_weight)
    add_weight_tiles(plan, problem);
  else
    for (const Group& group : groups(problem, pass)) add_group(plan, problem, group, options.order);
  if (pass != Pass::grad_weight) image_by_image(plan);
  if (options.processors > 0) balance(plan, options);
  return plan;
}

}  // namespace aspp::plan
