// SPDX-License-Identifier: BSD-3-Clause
// Whether a separable pyramid is computed by the fused kernel or through memory: a pure function
// that says why. Nothing of torch, nothing of CUDA.
#pragma once

#include <string>

#include "../plan/plan.h"
#include "fused_layout.h"

namespace aspp::cuda {

// What writing depthwise results to memory and reading them again costs, in taps of depthwise work
// (as plan::kPointwiseTaps): an estimate.
inline constexpr double kStoredTaps = 4;

// Costs count taps of depthwise work on a pixel, its product with 256 output channels being
// kPointwiseTaps, summed over the branches. Fused, the taps are computed for each width of a tile.
//
// Where a training batch norm is between, the depthwise results' statistics come first. Either that
// pass stores nothing and the results are computed once more, in the way that costs less; or it
// stores them, and a further pass reads them, normalises them and writes what the 1x1s read.
struct FusedChoice {
  int shape = -1;                // of tile_shape; -1: through memory
  int32_t pixels = 0, taps = 0;  // of the widest halo, of the branch with most; 0 where not fused
  double fused = 0, stored = 0;  // costs; that of what cannot be fused is 0
  double recomputed_batch_norm = 0, stored_batch_norm = 0;
  std::string why_not;  // fused, in words; empty where it can be

  bool is_fused() const { return shape >= 0 && fused <= stored; }
  bool recomputes_in_batch_norm() const { return recomputed_batch_norm <= stored_batch_norm; }
};

inline FusedChoice choose_fused(Math math, const plan::Problem& problem, int64_t shared_bytes) {
  FusedChoice choice;
  const plan::Index area = problem.height * problem.width;
  int64_t widest = 0, pixels = 0, taps = 0;
  for (plan::Index b = 0; b < problem.branch_count(); ++b) {
    const plan::Axis y = row_axis(problem, b, plan::Pass::separable);
    const plan::Axis x = col_axis(problem, b, plan::Pass::separable);
    const int64_t rows = live_taps(y, {0, y.size}).size(),
                  columns = live_taps(x, {0, x.size}).size();
    constexpr int64_t kRows = tile_shape(Math::float32, 1).m;
    pixels = std::max(pixels, Halo::count(kRows, x.size, rows, columns, columns > 1 ? x.rate : 0));
    taps = std::max(taps, rows * columns);
    widest = std::max<int64_t>(widest, problem.branches[b].out_channels);
  }
  const auto fits = [&](int shape) {
    constexpr int64_t kMost = 1 << 16;
    return pixels <= kMost &&
           FusedLayout(tile_shape(math, shape), math, int32_t(pixels), int32_t(taps)).total <=
               shared_bytes;
  };
  const int wide = pick_shape(math, widest, INT32_MAX);
  if (math == Math::float64) {
    choice.why_not = "float64 has no fused kernel";
  } else if (taps > kMaxFusedTaps) {
    choice.why_not =
        plan::sentence("a branch has ", taps, " live taps, the fused kernel takes ", kMaxFusedTaps);
  } else {
    for (int shape = wide; shape < kShapes && choice.shape < 0; ++shape)
      if (fits(shape)) choice.shape = shape;
    if (choice.shape < 0)
      choice.why_not =
          plan::sentence("a tile's halo of ", pixels, " pixels does not fit in a block's ",
                         shared_bytes, " bytes of shared memory");
  }
  const bool fusible = choice.shape >= 0;
  if (fusible) {
    choice.pixels = int32_t(pixels);
    choice.taps = int32_t(taps);
  }
  // What paying for whole tiles of n columns makes of a branch's output channels.
  const auto widths = [](const plan::Branch& branch, int64_t n) {
    return double(plan::ceil_div(branch.out_channels, n));
  };
  const auto product = [&](const plan::Branch& branch, int64_t n) {
    return widths(branch, n) * double(n) / 256 * double(plan::kPointwiseTaps);
  };
  const int64_t n = tile_shape(math, fusible ? choice.shape : wide).n;
  const int64_t dense_n = tile_shape(math, wide).n;
  double statistics = 0;
  for (plan::Index b = 0; b < problem.branch_count(); ++b) {
    const plan::Branch& branch = problem.branches[b];
    if (branch.kernel.h * branch.kernel.w == 1) continue;  // the same both ways
    const double live = double(live_pixel_taps(problem, b)) / double(area);
    statistics += live;
    if (fusible) choice.fused += widths(branch, n) * live + product(branch, n);
    choice.stored += live + kStoredTaps + product(branch, dense_n);
    choice.stored_batch_norm += live + 2 * kStoredTaps + product(branch, dense_n);
  }
  choice.recomputed_batch_norm = statistics + (choice.is_fused() ? choice.fused : choice.stored);
  return choice;
}

}  // namespace aspp::cuda
