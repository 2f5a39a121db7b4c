// SPDX-License-Identifier: BSD-3-Clause
// What a CPU kernel is told: plain pointers, strides in elements and sizes. No torch, no
// allocation, no threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aspp {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A [N, C, H, W] tensor in any memory format.
struct Image {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t n_stride = 0, c_stride = 0, y_stride = 0, x_stride = 0;
};

// One branch. Everything is in the compute type T (double for float64 tensors, float otherwise),
// but `weight` in bfloat16 where Kernels::bfloat16_products says so.
struct BranchParams {
  const void* depthwise =
      nullptr;  // [kh * kw, padded C] or null: the branch is a plain convolution
  const void* between_scale =
      nullptr;  // [padded C] or null: nothing between depthwise and pointwise
  const void* between_shift = nullptr;  // [padded C]
  bool between_relu = false;
  // weight[tap * weight_tap + c * weight_row + o] of the pointwise or dense weight;
  // o runs to padded(out_channels), zeros behind. One tap when depthwise, else kh * kw.
  const void* weight = nullptr;
  int64_t weight_tap = 0, weight_row = 0;
  int64_t kernel_h = 1, kernel_w = 1, rate_h = 1, rate_w = 1;
  int64_t out_channels = 0;
  int64_t column = 0;   // where the branch's padded columns begin among everybody's
  int64_t channel = 0;  // where its output channels begin
};

// Pixels [x0, x1) of a row.
struct Run {
  int64_t y = 0, x0 = 0, x1 = 0;
};

// Forward of all branches, and optionally the folded head behind them (aspp_inference).
struct PyramidParams {
  Image x;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  const BranchParams* branches = nullptr;
  int64_t branch_count = 0;
  int64_t columns = 0;  // the sum of the branches' padded out_channels
  // No chunk has more pixels, nor more rows than one of whole rows would have that begins at the
  // end of a row; in wide images (W >= this) none leaves its row, or spans more of it.
  int64_t chunk_pixels = 0;

  const void* scale = nullptr;  // [columns] T or null
  const void* shift = nullptr;  // [shift_batch, columns] T or null
  int64_t shift_n_stride = 0;   // 0: one shift for the batch
  bool relu = false;
  const void* residual = nullptr;  // [N, H * W, columns] T or null: added first of all
  Image out;                       // [N, sum O, H, W]; unused when there is a projection
  bool accumulate = false;  // add to what out holds; out is T then, with stride 1 over channels

  // Projection: raw[n, pixel, :] = activated branches @ project, still without bias; T
  const void* project = nullptr;  // [columns, project_row]
  int64_t project_row = 0;
  int64_t project_columns = 0;  // padded
  void* raw = nullptr;          // [N, H * W, project_columns]
  // Sums of x for the caller to add up, or null: [N * H, padded C], one of each image row
  // (sum_rows), or in wide images [chunks of the batch, padded C].
  void* pixel_sums = nullptr;
  bool sum_rows = false;
};

struct SeparableBackwardParams {
  Image x, grad_x;  // grad_x.data may be null
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  const BranchParams* branches = nullptr;  // depthwise in [taps, padded C]; weight unused
  int64_t branch_count = 0;
  const void* grad = nullptr;  // [N, H * W, grad_stride] T, branch b at .column
  int64_t grad_stride = 0;
  const Image* pointwise = nullptr;  // per branch [O, C]: n_stride over O, c_stride over C
  // Outputs in T, one per branch; null where not asked for.
  void* const* grad_depthwise = nullptr;      // [taps, padded C]
  void* const* grad_pointwise = nullptr;      // [C, padded O]
  void* const* grad_between_scale = nullptr;  // [padded C]
  void* const* grad_between_shift = nullptr;  // [padded C]
};

// The last pass of aspp_inference: out = act(raw + bias[n]) in the output's format and dtype.
struct FinishParams {
  const void* raw = nullptr;  // [N, H * W, raw_stride] T
  int64_t raw_stride = 0;
  const void* bias = nullptr;  // [N, raw_stride] T
  Image out;
  int64_t height = 0, width = 0, channels = 0;
  bool relu = false;
};

// Round up to whole vectors of the widest ISA, so that buffers fit every kernel.
inline constexpr int64_t kPad = 16;
inline constexpr int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

}  // namespace aspp
