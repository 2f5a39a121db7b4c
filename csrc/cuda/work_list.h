// SPDX-License-Identifier: BSD-3-Clause
// A plan as the kernels read it: flat, 32 bits wide, with no pointer and no dtype, so that one copy
// on the device serves every call of the same shape.
#pragma once

#include <cstdint>
#include <vector>

#include "../plan/plan.h"

namespace aspp::cuda {

// One tap of a region: A's row moves by (dy, dx) pixels, B's weight element is `index`.
struct WorkTap {
  int32_t branch;
  int32_t index;  // kernel row * kernel width + kernel column
  int32_t dy, dx;
  int32_t first_block;  // k blocks of the region's taps before this one
  int32_t blocks;       // k blocks of this one
};

// A rectangle of the map. Its pixels are numbered column, row, image.
struct WorkRegion {
  int32_t y, x, height, width;
  int32_t tap_begin, tap_end;  // grad_weight: one tap
  int32_t padded;              // 1: a tap may read outside the map, where it reads zero
  int32_t branch;              // whose output this is; grad_input: 0
};

// What a block does at a time: rows [m_begin, +m_count) x columns [n_begin, +n_count) of one
// output, summed over k blocks [k_begin, k_end). An empty sum writes zeros.
struct WorkUnit {
  int32_t region;
  int32_t m_begin, m_count, n_begin, n_count, k_begin, k_end;
  int32_t first_tap, first_block;  // where k_begin is: an index of taps, a k block of that tap
  int32_t slice, slices;           // of the sum
  int32_t partial;  // slices > 1: the tile's sums go to partials [partial, partial + slices)
  int32_t counter;  // slices > 1: the tile's own counter
  int32_t tile;     // number of the output tile; those of one branch are neighbours, rows first
};

// The output tiles of a branch; in grad_input, of all branches.
struct TileRange {
  int32_t first = 0, count = 0;
};

struct WorkList {
  std::vector<WorkUnit> units;        // worker by worker
  std::vector<int32_t> worker_begin;  // worker w has units [worker_begin[w], worker_begin[w + 1])
  std::vector<WorkRegion> regions;
  std::vector<WorkTap> taps;
  int32_t partials = 0;  // tiles of sums that the slices need
  int32_t counters = 0;
  int32_t tiles = 0;  // output tiles
  std::vector<TileRange> branch_tiles;

  int32_t workers() const { return static_cast<int32_t>(worker_begin.size()) - 1; }
};

// Throws std::invalid_argument with a sentence where a number does not fit in 32 bits.
WorkList make_work_list(const plan::Problem& problem, plan::Pass pass, const plan::Options& options,
                        plan::Index workers);

}  // namespace aspp::cuda
