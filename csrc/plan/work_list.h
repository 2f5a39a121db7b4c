// SPDX-License-Identifier: BSD-3-Clause
// A plan as the kernels read it: flat, 32 bits wide, with no pointer and no dtype, so that one copy
// on the device serves every call of the same shape.
#pragma once

#include <cstdint>
#include <vector>

#include "schedule.h"

namespace aspp::plan {

// One tap of a region: A's row moves by (dy, dx) pixels, B's weight element is `index`.
struct WorkTap {
  int32_t branch;
  int32_t index;  // kernel row * kernel width + kernel column
  int32_t dy, dx;
  int32_t first_block;  // k blocks of the region's taps before this one; separable: 0
  int32_t blocks;       // k blocks of this one; separable: those of the region
};

// A rectangle of taps of one branch, `count` of them in rows of `columns`: tap (i, j) has the
// weight element index + i * index_step + j and reads (dy + i * dy_step, dx + j * dx_step) away.
// The same taps as the region's, for kernels that would rather count than read a list.
struct WorkRun {
  int32_t branch;
  int32_t index;
  int32_t dy, dx;
  int32_t columns;
  int32_t index_step, dy_step, dx_step;
  int32_t first_block;  // k blocks of the region's runs before this one
  int32_t blocks;       // k blocks of a tap
  int32_t count;
};

// A rectangle of the map. Its pixels are numbered column, row, image.
struct WorkRegion {
  int32_t y, x, height, width;
  int32_t tap_begin, tap_end;  // grad_weight: one tap
  int32_t padded;              // 1: a tap may read outside the map, where it reads zero
  int32_t branch;              // whose output this is; grad_input: 0
  int32_t run_begin, run_end;
};

// What a block does at a time: rows [m_begin, +m_count) x columns [n_begin, +n_count) of one
// output, summed over k blocks [k_begin, k_end). An empty sum writes zeros.
struct WorkUnit {
  int32_t region;
  int32_t m_begin, m_count, n_begin, n_count, k_begin, k_end;
  int32_t first_tap, first_block;  // where k_begin is: an index of taps, a k block of that tap;
                                   // separable: the region's first tap, k_begin
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
  std::vector<WorkRun> runs;
  // Indices of units in the order to start them in where a device gives each to whoever is free:
  // that of the plan, or the longest first where it is cut into shares.
  std::vector<int32_t> launch_order;
  int32_t partials = 0;  // tiles of sums that the slices need
  int32_t counters = 0;
  int32_t tiles = 0;  // output tiles
  std::vector<TileRange> branch_tiles;

  int32_t workers() const { return static_cast<int32_t>(worker_begin.size()) - 1; }
};

// The units of the problem's plan for `workers` workers, of which fewer may get some. Throws
// std::invalid_argument with a sentence where a number does not fit in 32 bits.
WorkList make_work_list(const Problem& problem, Pass pass, const Options& options, Index workers);

}  // namespace aspp::plan
