// SPDX-License-Identifier: BSD-3-Clause
// Runs a pyramid over chunks of output pixels on all threads.
#pragma once

#include <vector>

#include "branches.h"

namespace aspp {

struct Schedule {
  struct Chunk {
    int64_t n = 0;
    size_t first_run = 0, run_count = 0;
  };

  int64_t chunks_per_image = 0;
  int64_t chunk_pixels = 0;  // PyramidParams', decided by the problem alone
  std::vector<Run> runs;
  std::vector<Chunk> chunks;
};

// All pixels of the batch.
Schedule schedule_of(const std::vector<BranchParams>& branches, int64_t batch, int64_t height,
                     int64_t width);

// Runs every chunk; chunk_pixels of params comes from the schedule.
void run_forward(PyramidParams params, const Schedule& schedule, bool double_precision);

// The marked outputs, [N, H, W], of one dense branch with its weight, in place of those of params.
void run_marked(PyramidParams params, const BranchParams& branch, const std::vector<char>& marked,
                bool double_precision);

// Sums of x over parts of each image, [N, parts, padded C].
struct PixelSums {
  void* data = nullptr;
  int64_t parts = 0;
};

// Memory for the sums that a run by this schedule makes where they are wanted.
PixelSums sums_of(const PyramidParams& params, const Schedule& schedule, bool wanted,
                  Operands& operands);

// The branches of params that are listed, with these weights. Sums need at least one.
PixelSums run_directly(PyramidParams params, const std::vector<size_t>& listed,
                       const std::vector<Tensor>& weights, Operands& operands,
                       bool want_sums = false);

}  // namespace aspp
