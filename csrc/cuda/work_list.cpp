// SPDX-License-Identifier: BSD-3-Clause
#include "work_list.h"

#include <limits>

namespace aspp::cuda {
namespace {

using plan::Index;

int32_t narrow(Index value, const char* what) {
  constexpr Index kLimit = std::numeric_limits<int32_t>::max();
  plan::require(value >= -kLimit && value <= kLimit, what, " must fit in 32 bits but is ", value);
  return static_cast<int32_t>(value);
}

// Numbers that would only turn up after much work, or in products of others.
void check_sizes(const plan::Problem& problem) {
  narrow(problem.pixels(), "batch * height * width");
  narrow(problem.in_channels, "in_channels");
  Index outputs = 0;
  for (const plan::Branch& branch : problem.branches)
    outputs = plan::add(outputs, branch.out_channels, "the output channels of all branches");
  narrow(outputs, "the output channels of all branches");
}

class Translation {
 public:
  Translation(const plan::Problem& problem, const plan::Plan& plan)
      : problem_(problem),
        plan_(plan) {}

  WorkList run(Index workers) {
    Index taps = 0;
    for (const plan::Region& region : plan_.regions) taps += region.tap_count();
    plan::require(taps <= plan::kMaxEntries, "a work list must have at most ", plan::kMaxEntries,
                  " taps of regions but has ", taps);
    for (const plan::Region& region : plan_.regions) add_region(region);
    number_tiles();
    number_slices();
    const auto units = static_cast<Index>(plan_.units.size());
    list_.worker_begin.push_back(0);
    if (units == 0) return std::move(list_);
    const plan::Schedule schedule = plan::make_schedule(plan_, busy_workers(workers, units));
    for (const Index unit : schedule.units) add_unit(plan_.units[unit]);
    for (Index w = 1; w <= schedule.workers(); ++w)
      list_.worker_begin.push_back(narrow(schedule.begin[w], "the units of a plan"));
    return std::move(list_);
  }

 private:
  void add_region(const plan::Region& region) {
    const bool joint = plan_.pass == plan::Pass::grad_input;
    const auto begin = static_cast<int32_t>(list_.taps.size());
    Index block = 0;
    for (const plan::Tap& tap : plan::taps(region)) {
      const Index blocks = plan_.pass == plan::Pass::grad_weight
                               ? plan::k_blocks(problem_, plan_.pass, region, plan_.tile)
                               : plan::channel_blocks(problem_, tap.branch, plan_.pass, plan_.tile);
      // A tap that is dead everywhere keeps an empty region; what it would read may be far away.
      const bool dead = region.area() == 0;
      list_.taps.push_back(
          {narrow(tap.branch, "the branches"),
           narrow(tap.row * problem_.branches[tap.branch].kernel.w + tap.col, "the taps"),
           narrow(dead ? 0 : tap.dy, "the offset of a tap"),
           narrow(dead ? 0 : tap.dx, "the offset of a tap"), narrow(block, "the k blocks"),
           narrow(blocks, "the k blocks")});
      block += blocks;
    }
    narrow(block, "the k blocks");
    list_.regions.push_back(
        {narrow(region.rows.begin, "height"), narrow(region.cols.begin, "width"),
         narrow(region.rows.size(), "height"), narrow(region.cols.size(), "width"), begin,
         static_cast<int32_t>(list_.taps.size()), region.padded ? 1 : 0,
         joint ? 0 : narrow(region.live.front().branch, "the branches")});
  }

  // Without those that would have nothing to do.
  Index busy_workers(Index workers, Index units) const {
    const bool shared = plan_.shares > 0 && plan_.shares <= workers;
    return shared ? plan_.shares : std::min(workers, units);
  }

  // A branch's tiles are neighbours, so that their range grows by one at a time.
  void number_tiles() {
    list_.branch_tiles.resize(problem_.branches.size());
    for (const plan::Unit& unit : plan_.units) {
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
    for (const plan::Unit& unit : plan_.units) slices[unit.tile] = narrow(unit.slices, "slices");
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

  void add_unit(const plan::Unit& unit) {
    const WorkRegion& region = list_.regions[unit.region];
    const int32_t k_begin = narrow(unit.k.begin, "the k blocks");
    const auto first = list_.taps.begin() + region.tap_begin;
    const auto behind =
        std::upper_bound(first + 1, list_.taps.begin() + region.tap_end, k_begin,
                         [](int32_t k, const WorkTap& each) { return k < each.first_block; });
    const auto tap = static_cast<int32_t>(behind - list_.taps.begin()) - 1;
    list_.units.push_back({narrow(unit.region, "the regions"), narrow(unit.m.begin, "m"),
                           narrow(unit.m.size(), "m"), narrow(unit.n.begin, "n"),
                           narrow(unit.n.size(), "n"), k_begin, narrow(unit.k.end, "the k blocks"),
                           tap, k_begin - list_.taps[tap].first_block, narrow(unit.slice, "slices"),
                           narrow(unit.slices, "slices"), partial_[unit.tile], counter_[unit.tile],
                           narrow(unit.tile, "the tiles")});
  }

  const plan::Problem& problem_;
  const plan::Plan& plan_;
  WorkList list_;
  std::vector<int32_t> partial_, counter_;  // per tile
};

}  // namespace

WorkList make_work_list(const plan::Problem& problem, plan::Pass pass, const plan::Options& options,
                        plan::Index workers) {
  check_sizes(problem);
  return Translation(problem, plan::make_plan(problem, pass, options)).run(workers);
}

}  // namespace aspp::cuda
