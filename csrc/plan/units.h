// SPDX-License-Identifier: BSD-3-Clause
// The work list of a launch.
#pragma once

#include <string_view>
#include <vector>

#include "linear.h"

namespace aspp::plan {

// Which regions to compute in; cheapest compares merged (exact regions among them) with linear.
// phases, of separable alone: one region, the map, for a kernel that walks its rows phase by phase
// (those of one remainder by the rate after those of another), keeps what they share and passes
// over dead taps pixel by pixel.
enum class Order { regions, merged, linear, cheapest, phases };

std::string_view name(Order order);
Order order_named(std::string_view name);

// What one block does at a time: one output tile, or a slice of its sum.
//               m (rows of the tile)             n                       k (blocks of tile.k)
//   forward     pixels of the region             output channels         taps x input channels
//   grad_input  pixels of the region             input channels          taps x output channels
//   grad_weight output channels of the branch    input channels          live pixels of the batch
//   separable   pixels of the region             output channels         input channels
// Pixels are in the region's linear order: column, row (by phases: in their order), image. Units of
// the same `tile` add up, in the order of `slice`. A unit with an empty k writes zeros.
struct Unit {
  Index region = 0;
  Index tile = 0;
  Index slice = 0;
  Index slices = 1;
  Interval m;
  Interval n;
  Interval k;
  Index worker = -1;  // whose share it is, where the plan is cut into shares
};

struct Options {
  Order order = Order::cheapest;
  Tile tile;
  Index processors = 0;      // SMs to balance for; 0 neither splits K nor reorders the last waves
  Index shortest_slice = 8;  // k blocks below which splitting K does not pay
  Index cut_overhead = 8;    // products: what a cut costs, whose sums are written, read and added
};

// Image by image, so that one image and the weights stay in cache; the last waves longest first.
struct Plan {
  Pass pass = Pass::forward;
  Tile tile;
  std::vector<Region> regions;
  std::vector<Unit> units;
  Index shares = 0;  // > 0: every unit has a worker, of so many, and each worker has a unit

  Index longest() const;  // k blocks of the longest unit
  Index total() const;    // k blocks of all units
};

// What filling the pipeline and writing a tile cost, in products of a whole tile with a k block.
inline constexpr Index kUnitOverhead = 4;

// The part of every unit's time that does not grow with it.
Index unit_overhead(const Plan& plan);

// Time of a unit, in paid rows * k blocks * block_cost.
Index unit_cost(const Plan& plan, const Unit& unit);

// The regions of one group of branches in the order asked for.
Tiling tiling(const Problem& problem, const Group& group, Order order, const Tile& tile);

// Everything a launch needs; a pure function of its arguments.
Plan make_plan(const Problem& problem, Pass pass, const Options& options);

}  // namespace aspp::plan
