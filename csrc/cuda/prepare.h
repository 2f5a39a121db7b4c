// SPDX-License-Identifier: BSD-3-Clause
// What is decided about a launch before there is an operand: the tile, how many blocks, which does
// what. Nothing of torch.
#pragma once

#include "fused_choice.h"
#include "launch.h"
#include "plan_cache.h"

namespace aspp::cuda {

struct Prepared {
  int shape = 0;  // of tile_shape
  SharedPlan plan;

  // Bytes that the sums of split tiles need.
  int64_t partial_bytes(Math math) const;
};

// For the current device. Throws std::exception with a sentence where the problem is too large or
// no tile fits the device.
cudaError_t prepare_pyramid(PlanCache& cache, plan::Pass pass, Math math,
                            const plan::Problem& problem, cudaStream_t stream, Prepared& prepared);

// The same for the separable pyramid, if `choice` says so: else there is no plan. `wish` is "fused"
// or "stored", or anything else for what costs less; fused where that is impossible is refused.
cudaError_t prepare_separable(PlanCache& cache, Math math, const plan::Problem& problem,
                              std::string_view wish, cudaStream_t stream, Prepared& prepared,
                              FusedChoice& choice);

}  // namespace aspp::cuda
