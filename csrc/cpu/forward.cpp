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

constexpr int64_t kDensePixels = 576, kSeparablePixels = 288, kTileRows = 6;

int64_t in_tiles(int64_t pixels) { return (pixels + kTileRows - 1) / kTileRows * kTileRows; }

// Fills chunks of up to `length` pixels with runs of an image, cut where they have to be.
class ChunkCutter {
 public:
  ChunkCutter(Schedule& schedule, int64_t width, int64_t n, int64_t length)
      : s_(schedule),
        wide_(width >= schedule.chunk_pixels),
        rows_(wide_ ? 1 : (width + schedule.chunk_pixels - 2) / width + 1),
        n_(n),
        length_(length) {}

  void add(Run run) {
    while (run.x0 < run.x1) {
      const bool same_row = taken_ > 0 && s_.runs.back().y == run.y;
      if (taken_ == 0 || taken_ == length_ || (!same_row && used_rows_ == rows_) ||
          (wide_ && run.x0 - first_x_ >= length_)) {
        s_.chunks.push_back({n_, s_.runs.size(), 0});
        taken_ = used_rows_ = 0;
        first_x_ = run.x0;
      }
      if (taken_ == 0 || !same_row) ++used_rows_;
      const int64_t end = wide_ ? first_x_ + length_ : run.x0 + length_ - taken_;
      const Run part{run.y, run.x0, std::min(run.x1, end)};
      s_.runs.push_back(part);
      ++s_.chunks.back().run_count;
      taken_ += part.x1 - part.x0;
      run.x0 = part.x1;
    }
  }

 private:
  Schedule& s_;
  const bool wide_;
  const int64_t rows_, n_, length_;
  int64_t taken_ = 0, used_rows_ = 0, first_x_ = 0;  // of the last chunk
};

// Of what is marked in [N, H, W].
Schedule schedule_of_marked(const BranchParams& branch, const std::vector<char>& marked,
                            int64_t batch, int64_t height, int64_t width) {
  Schedule s;
  s.chunk_pixels = kDensePixels;
  // Few pixels are shared by the threads, too, but not to the last: each chunk reads all weights.
  constexpr int64_t kLeast = 24;
  const int64_t count = std::count(marked.begin(), marked.end(), char(true));
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const int64_t chunks = std::max((count + kDensePixels - 1) / kDensePixels, threads);
  const int64_t length = std::clamp(in_tiles((count + chunks - 1) / chunks), kLeast, kDensePixels);
  const std::vector<int64_t> order = order_rows({branch}, height);
  for (int64_t n = 0; n < batch; ++n) {
    ChunkCutter cutter(s, width, n, length);
    for (const int64_t y : order) {
      const char* row = marked.data() + (n * height + y) * width;
      for (const char* end = row; end < row + width;) {
        const char* begin = std::find(end, row + width, char(true));
        end = std::find(begin, row + width, char(false));
        cutter.add({y, begin - row, end - row});
      }
    }
  }
  return s;
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
  const int64_t target = dense ? kDensePixels : kSeparablePixels;
  Schedule s;
  s.chunk_pixels = target;
  int64_t length;
  if (width >= target) {
    // Wide rows: a chunk never leaves its row, so that only a window of the row is staged.
    const int64_t pieces = (width + target - 1) / target;
    length = in_tiles((width + pieces - 1) / pieces);
  } else {
    const int64_t pixels = height * width;
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    int64_t chunks = (pixels + target - 1) / target;
    if (batch < threads) chunks = (chunks + threads - 1) / threads * threads;
    length = in_tiles((pixels + chunks - 1) / chunks);
  }
  const std::vector<int64_t> order = order_rows(branches, height);
  for (int64_t n = 0; n < batch; ++n) {
    ChunkCutter cutter(s, width, n, length);
    for (const int64_t y : order) cutter.add({y, 0, width});
  }
  s.chunks_per_image = int64_t(s.chunks.size()) / batch;
  return s;
}

void run_forward(PyramidParams params, const Schedule& schedule, bool double_precision) {
  params.chunk_pixels = schedule.chunk_pixels;
  params.sum_rows = params.width < schedule.chunk_pixels;
  const Kernels& k = kernels();
  run_tasks(int64_t(schedule.chunks.size()), k.forward_scratch(params, double_precision),
            [&](int64_t task, void* scratch) {
              const auto& [n, first, count] = schedule.chunks[size_t(task)];
              k.forward_chunk(params, n, task, &schedule.runs[first], int64_t(count), scratch,
                              double_precision);
            });
}

void run_marked(PyramidParams params, const BranchParams& branch, const std::vector<char>& marked,
                bool double_precision) {
  params.branches = &branch;
  params.branch_count = 1;
  const Schedule schedule =
      schedule_of_marked(branch, marked, params.batch, params.height, params.width);
  run_forward(params, schedule, double_precision);
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
