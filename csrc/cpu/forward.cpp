// SPDX-License-Identifier: BSD-3-Clause
#include "forward.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"

namespace aspp {

namespace {

// Rows a rate apart share taps, so rows are taken by residue: with rates 12/24/36 the rows y, y+12,
// y+24, ... read nobody else's rows, whatever the rate.
std::vector<int64_t> order_rows(const std::vector<BranchParams>& branches, int64_t height) {
  int64_t step = 0;
  for (const BranchParams& b : branches) {
    if (b.kernel_h > 1) step = std::gcd(step, b.rate_h);
  }
  step = std::clamp<int64_t>(step, 1, height);
  std::vector<int64_t> order;
  order.reserve(size_t(height));
  for (int64_t residue = 0; residue < step; ++residue) {
    for (int64_t y = residue; y < height; y += step) order.push_back(y);
  }
  return order;
}

}  // namespace

Schedule schedule_of(const std::vector<BranchParams>& branches, int64_t batch, int64_t height,
                     int64_t width) {
  // Accumulators of a chunk live in the second-level cache; dense weights are worth longer chunks,
  // since each chunk streams all of them.
  bool dense = false;
  for (const BranchParams& b : branches) {
    dense = dense || (b.depthwise == nullptr && b.kernel_h * b.kernel_w > 1);
  }
  const int64_t target = dense ? 576 : 288;
  constexpr int64_t kTileRows = 6;
  Schedule s;
  s.row_order = order_rows(branches, height);
  if (width >= target) {
    // Wide rows: a chunk never leaves its row, so that only a window of the row is staged.
    const int64_t pieces = (width + target - 1) / target;
    const int64_t length = ((width + pieces - 1) / pieces + kTileRows - 1) / kTileRows * kTileRows;
    for (int64_t row = 0; row < height; ++row) {
      for (int64_t x = 0; x < width; x += length) {
        s.begin.push_back(row * width + x);
        s.end.push_back(row * width + std::min(x + length, width));
      }
    }
  } else {
    const int64_t pixels = height * width;
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    int64_t chunks = (pixels + target - 1) / target;
    if (batch < threads) chunks = (chunks + threads - 1) / threads * threads;
    const int64_t length = ((pixels + chunks - 1) / chunks + kTileRows - 1) / kTileRows * kTileRows;
    for (int64_t q = 0; q < pixels; q += length) {
      s.begin.push_back(q);
      s.end.push_back(std::min(q + length, pixels));
    }
  }
  s.chunks_per_image = int64_t(s.begin.size());
  s.chunk_pixels = target;
  return s;
}

void run_forward(PyramidParams params, const Schedule& schedule, bool double_precision) {
  params.row_order = schedule.row_order.data();
  params.chunk_pixels = schedule.chunk_pixels;
  params.sum_rows = params.width < schedule.chunk_pixels;
  const Kernels& k = kernels();
  run_tasks(params.batch * schedule.chunks_per_image, k.forward_scratch(params, double_precision),
            [&](int64_t task, void* scratch) {
              const int64_t chunk = task % schedule.chunks_per_image;
              k.forward_chunk(params, task / schedule.chunks_per_image, task,
                              schedule.begin[size_t(chunk)], schedule.end[size_t(chunk)], scratch,
                              double_precision);
            });
}

PixelSums sums_of(const PyramidParams& params, const Schedule& schedule, bool wanted,
                  Operands& operands) {
  if (!wanted) return {};
  const int64_t parts =
      params.width < schedule.chunk_pixels ? params.height : schedule.chunks_per_image;
  return {operands.allocate(params.batch * parts * padded(params.channels)), parts};
}

PixelSums run_directly(PyramidParams params, const std::vector<size_t>& listed,
                       const std::vector<Tensor>& weights, Operands& operands, bool want_sums) {
  if (listed.empty()) return {};
  std::vector<BranchParams> branches;
  for (const size_t b : listed) {
    branches.push_back(params.branches[b]);
    set_weight(operands, branches.back(), weights[b]);
  }
  params.branches = branches.data();
  params.branch_count = int64_t(branches.size());
  const Schedule schedule = schedule_of(branches, params.batch, params.height, params.width);
  const PixelSums sums = sums_of(params, schedule, want_sums, operands);
  params.pixel_sums = sums.data;
  run_forward(params, schedule, operands.double_precision());
  return sums;
}

}  // namespace aspp
