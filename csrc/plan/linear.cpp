// SPDX-License-Identifier: BSD-3-Clause
#include "linear.h"

#include <map>

namespace aspp::plan {
namespace {

void check_tile_count(Index count) {
  require(count <= kMaxEntries, "the output must have at most ", kMaxEntries,
          " tiles of pixels but has ", count);
}

// Takes the pixels [begin, end) of the batch apart into rectangles of images: visit(rows, cols).
template <class Visit>
void for_each_piece(const Problem& problem, Interval pixels, Visit&& visit) {
  const Index width = problem.width;
  const Index image = problem.height * width;
  for (Index begin = pixels.begin; begin < pixels.end;) {
    const Index origin = begin / image * image;
    const Index end = std::min(pixels.end, origin + image);
    const Interval first{(begin - origin) / width, (begin - origin) % width};  // (row, column)
    const Interval last{(end - 1 - origin) / width, (end - 1 - origin) % width};
    begin = end;
    if (first.begin == last.begin) {
      visit(Interval{first.begin, first.begin + 1}, Interval{first.end, last.end + 1});
      continue;
    }
    visit(Interval{first.begin, first.begin + 1}, Interval{first.end, width});
    if (first.begin + 1 < last.begin)
      visit(Interval{first.begin + 1, last.begin}, Interval{0, width});
    visit(Interval{last.begin, last.begin + 1}, Interval{0, last.end + 1});
  }
}

// The taps of the group that are live at one pixel at least of `pixels`.
std::vector<TapBlock> live_blocks(const Problem& problem, const Group& group, Interval pixels) {
  std::vector<TapBlock> blocks;
  for (const Index branch : group.branches) {
    const Axis y = row_axis(problem, branch, group.pass);
    const Axis x = col_axis(problem, branch, group.pass);
    std::vector<Interval> tap_cols(y.kernel);  // per tap row; intervals, as all hold the centre
    for_each_piece(problem, pixels, [&](Interval rows, Interval cols) {
      const Interval taps = live_taps(y, rows);
      for (Index row = taps.begin; row < taps.end; ++row)
        tap_cols[row] = hull(tap_cols[row], live_taps(x, cols));
    });
    for (Index row = 0, end = 0; row < y.kernel; row = end) {
      for (end = row + 1; end < y.kernel && tap_cols[end] == tap_cols[row];) ++end;
      if (!tap_cols[row].empty())
        blocks.push_back(tap_block(problem, branch, group.pass, {row, end}, tap_cols[row]));
    }
  }
  return blocks;
}

}  // namespace

Tiling region_tiling(const Problem& problem, std::vector<Region> regions, const Tile& tile) {
  Tiling tiling{std::move(regions), {}};
  Index count = 0;
  for (const Region& region : tiling.regions)
    count += ceil_div(problem.batch * region.area(), tile.m);
  check_tile_count(count);
  for (Index r = 0; r < static_cast<Index>(tiling.regions.size()); ++r) {
    const Index pixels = problem.batch * tiling.regions[r].area();
    for (Index begin = 0; begin < pixels; begin += tile.m)
      tiling.tiles.push_back({r, {begin, begin + std::min(tile.m, pixels - begin)}});
  }
  return tiling;
}

Tiling linear_tiling(const Problem& problem, const Group& group, const Tile& tile) {
  const Region map{{0, problem.height}, {0, problem.width}, {}, true};
  Tiling tiling = region_tiling(problem, {map}, tile);
  tiling.regions.clear();
  std::map<std::vector<TapBlock>, Index> known;
  for (PixelTile& each : tiling.tiles) {
    const auto next = static_cast<Index>(tiling.regions.size());
    const auto [entry, is_new] = known.emplace(live_blocks(problem, group, each.pixels), next);
    if (is_new) tiling.regions.push_back({map.rows, map.cols, entry->first, true});
    each.region = entry->second;
  }
  return tiling;
}

Index work(const Problem& problem, Pass pass, const Tiling& tiling, const Tile& tile) {
  Index sum = 0;
  for (const auto& [region, pixels] : tiling.tiles)
    sum = add(sum, work(problem, pass, tiling.regions[region], pixels.size(), tile),
              "the work of all tiles");
  return sum;
}

}  // namespace aspp::plan
