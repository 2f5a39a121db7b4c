// SPDX-License-Identifier: BSD-3-Clause
// Regions: rectangles of the map, each with the taps that are live in it.
#pragma once

#include <vector>

#include "problem.h"

namespace aspp::plan {

// One tap of one branch: weight[:, :, row, col] meets the pixel at (y + dy, x + dx).
struct Tap {
  Index branch = 0;
  Index row = 0;
  Index col = 0;
  Index dy = 0;
  Index dx = 0;
  friend constexpr auto operator<=>(const Tap&, const Tap&) = default;
};

// The taps rows x cols of one branch. The first of them reads at `first`, the next in its row at
// first.w + step.w, the next row at first.h + step.h: all that a kernel or a TMA descriptor needs.
struct TapBlock {
  Index branch = 0;
  Interval rows;
  Interval cols;
  Extent first;
  Extent step;

  constexpr Index size() const { return rows.size() * cols.size(); }
  friend constexpr auto operator<=>(const TapBlock&, const TapBlock&) = default;
};

// A rectangle and the taps to take in it, in raster order, branch by branch. Where `padded` is
// false each of them reads inside the map at every pixel and no padding is tested; where it is true
// (merged regions, linear order) what falls outside counts as zero.
struct Region {
  Interval rows;
  Interval cols;
  std::vector<TapBlock> live;
  bool padded = false;
  // > 0: what a pixel is thought to cost, in taps, by a kernel that passes over those dead at it;
  // 0: all of them.
  Index paid_taps = 0;

  Index area() const { return rows.size() * cols.size(); }
  Index tap_count() const;
  friend auto operator<=>(const Region&, const Region&) = default;
};

// The taps of a region one by one, in order.
std::vector<Tap> taps(const Region& region);

// `rows` x `cols` of one branch as a block, with the offsets that `pass` reads at.
TapBlock tap_block(const Problem& problem, Index branch, Pass pass, Interval rows, Interval cols);

// The rectangle `rows` x `cols` with every tap of the group that is live somewhere in it.
Region region_at(const Problem& problem, const Group& group, Interval rows, Interval cols);

// Where the live taps of a group change: the lines that all its regions lie between.
struct Grid {
  std::vector<Index> rows;
  std::vector<Index> cols;
};

Grid grid(const Problem& problem, const Group& group);

// The coarsest rectangles with no padding inside, in raster order: at most nine for one 3x3 branch,
// 49 for three 3x3 rates together.
std::vector<Region> exact_regions(const Problem& problem, const Group& group);

// For the gradient of the weights: per (branch, tap), the rectangle of output pixels where the tap
// is live. A tap that is dead everywhere keeps its place with an area of zero: its gradient is 0.
std::vector<Region> tap_rectangles(const Problem& problem);

}  // namespace aspp::plan
