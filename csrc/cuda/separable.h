// SPDX-License-Identifier: BSD-3-Clause
// The separable pyramid in one launch: what it is told.
#pragma once

#include "fused_layout.h"
#include "launch.h"

namespace aspp::cuda {

struct SeparableBranch {
  const void* filter;    // [taps, weight_channels]; null: a plain 1x1
  const void* affine;    // scale and shift [2, weight_channels] of the type of the sums; null: none
  const void* weight;    // of the 1x1 [O, weight_channels]
  int32_t out_channels;  // O
  int32_t out_channel;   // the branch's first channel in `out`, in scale and in shift
};

// Of Pass::separable in the order of phases. As in forward, `a` is x.
struct SeparableParams : WorkParams {
  int32_t halo_pixels;   // of the widest halo
  int32_t most_taps;     // live ones of a branch
  int32_t between_relu;  // where something is between
  SeparableBranch branches[kMaxBranches];
};

static_assert(sizeof(SeparableParams) <= 4096, "kernel parameters have 4 KB");

// params.workers blocks of tile_shape(math, shape). Not for float64.
cudaError_t launch_separable_sm80(Math math, int shape, const SeparableParams& params,
                                  cudaStream_t stream);

}  // namespace aspp::cuda
