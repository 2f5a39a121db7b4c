// SPDX-License-Identifier: BSD-3-Clause
// Runs a pyramid over chunks of output pixels on all threads.
#pragma once

#include <vector>

#include "kernels/kernels.h"

namespace aspp {

struct Schedule {
  int64_t chunks_per_image = 0;
  int64_t chunk_pixels = 0;         // no chunk is longer; decided by the problem alone
  std::vector<int64_t> begin, end;  // of each chunk of an image, in the order of row_order
  std::vector<int64_t> row_order;
};

Schedule schedule_of(const std::vector<BranchParams>& branches, int64_t batch, int64_t height,
                     int64_t width);

// Runs every chunk; row_order and chunk_pixels of params come from the schedule.
void run_forward(PyramidParams params, const Schedule& schedule, bool double_precision);

}  // namespace aspp
