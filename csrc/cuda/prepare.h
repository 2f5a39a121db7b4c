// SPDX-License-Identifier: BSD-3-Clause
// What is decided about a launch before there is an operand: the tile, how many blocks, which does
// what. Nothing of torch.
#pragma once

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

}  // namespace aspp::cuda
