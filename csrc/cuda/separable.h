// SPDX-License-Identifier: BSD-3-Clause
// The separable pyramid in one launch: what it is told.
#pragma once

#include "fused_layout.h"
#include "launch.h"

namespace aspp::cuda {

// As PyramidParams of Pass::separable: a = x, weights are pointwise ones [O, weight_channels].
struct SeparableParams : PyramidParams {
  int32_t pixels, taps;  // of the widest halo, of the branch with most
  uint64_t between;      // bit b: branch b has something between
  int32_t between_relu;
  // Per branch [taps, weight_channels], null for a plain 1x1; and where something is between
  // [2, weight_channels] in the type of the sums. Zero beyond the channels.
  const void* filters[kMaxBranches];
  const void* affines[kMaxBranches];

  void set_branch(int branch, const void* filter, const void* affine) {
    filters[branch] = filter;
    affines[branch] = affine;
    between |= uint64_t(affine != nullptr) << branch;
  }
  // By a branch with this halo and so many live taps.
  void widen(int32_t halo_pixels, int32_t live_taps) {
    pixels = pixels < halo_pixels ? halo_pixels : pixels;
    taps = taps < live_taps ? live_taps : taps;
  }
};

static_assert(sizeof(SeparableParams) <= 4096, "kernel parameters have 4 KB");
static_assert(kMaxBranches <= 64, "branches are bits of a word");

// params.workers blocks of tile_shape(math, shape). Not for float64.
cudaError_t launch_separable_sm80(Math math, int shape, const SeparableParams& params,
                                  cudaStream_t stream);

}  // namespace aspp::cuda
