// SPDX-License-Identifier: BSD-3-Clause
#include "work_list.h"

#include <limits>
#include <numeric>

namespace aspp::plan {
namespace {

int32_t narrow(Index value, const char* what) {
  constexpr Index kLimit = std::numeric_limits<int32_t>::max();
  require(value >= -kLimit && value <= kLimit, what, " must fit in 32 bits but is ", value);
  return static_cast<int32_t>(value);
}

// Numbers that would only turn up after much work, or in products of others.
void check_sizes(const Problem& problem) {
  narrow(problem.pixels(), "batch * height * width");
  narrow(problem.in_channels, "in_channels");
  Index outputs = 0;
  for (const Branch& branch : problem.branches)
    outputs = add(outputs, branch.out_channels, "the output channels of all branches");
  narrow(outputs, "the output channels of all branches");
}

class Translation {
 public:
  Translation(const Problem& problem, const Plan& plan) : problem_(problem), plan_(plan) {}

  WorkList run(Index workers) {
    Index taps = 0;
    for (const Region& region : plan_.regions) taps += region.tap_count();
    require(taps <= kMaxEntries, "a work list must have at most ", kMaxEntries,
            " taps of regions but has ", taps);
    for (const Region& region : plan_.regions) add_region(region);
    number_tiles();
    number_slices();
    const auto units = static_cast<Index>(plan_.units.size());
    list_.worker_begin.push_back(0);
    if (units == 0) return std::move(list_);
    const Schedule schedule = make_schedule(plan_, busy_workers(workers, units));
    for (const Index unit : schedule.units) add_unit(plan_.units[unit]);
    order_launch(schedule);
    for (Index w = 1; w <= schedule.workers(); ++w)
      list_.worker_begin.push_back(narrow(schedule.begin[w], "the units of a plan"));
    return std::move(list_);
  }

 private:
  void add_region(const Region& region) {
    const bool joint = plan_.pass == Pass::grad_input;
    const bool side_by_side = plan_.pass == Pass::separable;
    const auto begin = static_cast<int32_t>(list_.taps.size());
    Index block = 0;
    for (const Tap& tap : taps(region)) {
      const Index blocks = plan_.pass == Pass::grad_weight
                               ? k_blocks(problem_, plan_.pass, region, plan_.tile)
                               : channel_blocks(problem_, tap.branch, plan_.pass, plan_.tile);
      // A tap that is dead everywhere keeps an empty region; what it would read may be far away.
      const bool dead = region.area() == 0;
      list_.taps.push_back(
          {narrow(tap.branch, "the branches"),
           narrow(tap.row * problem_.branches[tap.branch].kernel.w + tap.col, "the taps"),
           narrow(dead ? 0 : tap.dy, "the offset of a tap"),
           narrow(dead ? 0 : tap.dx, "the offset of a tap"), narrow(block, "the k blocks"),
           narrow(blocks, "the k blocks")});
      if (!side_by_side) block += blocks;
    }
    narrow(block, "the k blocks");
    const auto first_run = static_cast<int32_t>(list_.runs.size());
    const WorkTap* next = list_.taps.data() + begin;
    for (const TapBlock& taps : region.live) add_run(region, taps, next);
    list_.regions.push_back(
        {narrow(region.rows.begin, "height"), narrow(region.cols.begin, "width"),
         narrow(region.rows.size(), "height"), narrow(region.cols.size(), "width"), begin,
         static_cast<int32_t>(list_.taps.size()), region.padded ? 1 : 0,
         joint ? 0 : narrow(region.live.front().branch, "the branches"), first_run,
         static_cast<int32_t>(list_.runs.size())});
  }

  // The next of the region's runs; `next` moves on to the first of the taps behind it.
  void add_run(const Region& region, const TapBlock& taps, const WorkTap*& next) {
    const bool dead = region.area() == 0;
    const auto step = [&](Index value, Index steps) {
      return narrow(dead || steps == 1 ? 0 : value, "the offset of a tap");
    };
    list_.runs.push_back({next->branch, next->index, next->dy, next->dx,
                          narrow(taps.cols.size(), "the taps"),
                          narrow(problem_.branches[taps.branch].kernel.w, "the taps"),
                          step(taps.step.h, taps.rows.size()), step(taps.step.w, taps.cols.size()),
                          next->first_block, next->blocks, narrow(taps.size(), "the taps")});
    next += taps.size();
  }

  void order_launch(const Schedule& schedule) {
    std::vector<Index> place(plan_.units.size());  // of the plan's units in the list
    for (std::size_t i = 0; i < place.size(); ++i) place[schedule.units[i]] = static_cast<Index>(i);
    std::vector<Index> order(place.size());
    std::iota(order.begin(), order.end(), Index{0});
    if (plan_.shares > 0)
      std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
        return unit_cost(plan_, plan_.units[a]) > unit_cost(plan_, plan_.units[b]);
      });
    for (const Index unit : order)
      list_.launch_order.push_back(narrow(place[unit], "the units of a plan"));
  }

  // Without those that would have nothing to do.
  Index busy_workers(Index workers, Index units) const {
    const bool shared = plan_.shares > 0 && plan_.shares <= workers;
    return shared ? plan_.shares : std::min(workers, units);
  }

  // A branch's tiles are neighbours, so that their range grows by one at a time.
  void number_tiles() {
    list_.branch_tiles.resize(problem_.branches.size());
    for (const Unit& unit : plan_.units) {
      const int32_t tile = narrow(unit.tile, "the tiles");
      list_.tiles = std::max(list_.tiles, tile + 1);
      TileRange& range = list_.branch_tiles[list_.regions[unit.region].branch];
      if (range.count == 0) range.first = tile;
      const int32_t end = std::max(range.first + range.count, tile + 1);
      range.first = std::min(range.first, tile);
      range.count = end - range.first;
    }
  }

  // Tiles in order of their number: the slices of one are neighbours.
  void number_slices() {
    std::vector<int32_t> slices(list_.tiles, 1);
    for (const Unit& unit : plan_.units) slices[unit.tile] = narrow(unit.slices, "slices");
    partial_.resize(list_.tiles);
    counter_.resize(list_.tiles);
    Index partials = 0;
    for (int32_t tile = 0; tile < list_.tiles; ++tile) {
      if (slices[tile] == 1) continue;
      partial_[tile] = narrow(partials, "the slices");
      counter_[tile] = list_.counters++;
      partials += slices[tile];
    }
    list_.partials = narrow(partials, "the slices");
  }

  void add_unit(const Unit& unit) {
    const WorkRegion& region = list_.regions[unit.region];
    const int32_t k_begin = narrow(unit.k.begin, "the k blocks");
    const auto taps = list_.taps.begin();
    const auto at = std::partition_point(
        taps + region.tap_begin, taps + region.tap_end - 1,
        [&](const WorkTap& each) { return each.first_block + each.blocks <= k_begin; });
    const auto tap = static_cast<int32_t>(at - taps);
    list_.units.push_back({narrow(unit.region, "the regions"), narrow(unit.m.begin, "m"),
                           narrow(unit.m.size(), "m"), narrow(unit.n.begin, "n"),
                           narrow(unit.n.size(), "n"), k_begin, narrow(unit.k.end, "the k blocks"),
                           tap, k_begin - list_.taps[tap].first_block, narrow(unit.slice, "slices"),
                           narrow(unit.slices, "slices"), partial_[unit.tile], counter_[unit.tile],
                           narrow(unit.tile, "the tiles")});
  }

  const Problem& problem_;
  const Plan& plan_;
  WorkList list_;
  std::vector<int32_t> partial_, counter_;  // per tile
};

}  // namespace

WorkList make_work_list(const Problem& problem, Pass pass, const Options& options, Index workers) {
  check_workers(workers);
  check_sizes(problem);
  return Translation(problem, make_plan(problem, pass, options)).run(workers);
}

}  // namespace aspp::plan
