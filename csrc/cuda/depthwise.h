// SPDX-License-Identifier: BSD-3-Clause
// The depthwise kernels: what a launch of them is told, and their launches. Plain data, as in
// params.h. What a branch's 1x1 reads is
//   e = depthwise taps of x     z = e * scale + shift     relu(z), z or, with nothing between, e
// Images are rows [P, pitch] of pixels with their channels side by side, as operands.h makes them;
// sums and what is between are of the type Sum: float64 for Math::float64, else float32.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace aspp::cuda {

// A branch in front of its 1x1.
struct DepthwiseBranch {
  const void* filter;  // [taps, padded C] in the tensors' dtype; null: a plain branch, taps is 0
  const void* affine;  // scale and shift [2, padded C], of type Sum; null: nothing between
  int32_t kernel_h, kernel_w;
  int32_t rate_h, rate_w;
  int32_t taps;  // kernel_h * kernel_w
};

// Weights [C, taps] of every branch become [taps, padded C], with zeros in the padding.
struct PackFiltersParams {
  int32_t channels, pitch;  // C, padded C
  int32_t branches;
  int32_t most_taps;  // of a branch
  struct {
    const void* weight;
    void* out;
    int32_t taps;
  } branch[kMaxBranches];
};

// Scale and shift [C] of every branch become [2, padded C] of type Sum, with zeros in the padding.
struct PackAffineParams {
  int32_t channels, pitch;  // C, padded C
  int32_t branches;
  int32_t of_sums;  // scale and shift are of type Sum, not of the tensors' dtype
  struct {
    const void* scale;
    const void* shift;
    void* out;
  } branch[kMaxBranches];
};

// A batch as the kernels see it.
struct DepthwiseShape {
  int32_t batch, height, width;
  int32_t channels;  // C
  int32_t pitch;     // C rounded up to a chunk: of filters, affines and sums
};

// Pixels of a tile, channels of one in bytes: kernels with results per tile have one such row each.
inline constexpr int kDepthwisePixels = 128;
inline constexpr int kDepthwiseBytes = 128;

constexpr int depthwise_columns(Math math) { return kDepthwiseBytes / bytes_of(math); }

__host__ __device__ constexpr int64_t depthwise_tiles(const DepthwiseShape& shape) {
  const int64_t pixels = int64_t(shape.batch) * shape.height * shape.width;
  return (pixels + kDepthwisePixels - 1) / kDepthwisePixels;
}

__host__ __device__ constexpr int32_t depthwise_column_tiles(const DepthwiseShape& shape,
                                                             int columns) {
  return (shape.pitch + columns - 1) / columns;
}

// What the 1x1s of branches with depthwise taps read, and statistics of e.
struct DepthwiseParams {
  DepthwiseShape shape;
  const void* x;
  int64_t x_pitch, out_pitch;  // elements
  int32_t relu;                // where something is between
  int32_t branches;

  // Null for none: of the rounded e, as WorkParams::tile_* with one row of
  // depthwise_columns(math) channels per tile. Tiles are numbered [branches, depthwise_tiles,
  // tiles of channels].
  void* tile_means;
  void* tile_squares;
  int32_t* tile_counts;

  struct {
    DepthwiseBranch taps;
    void* out;  // [P, out_pitch], null for none
  } branch[kMaxBranches];
};

// The gradient of what is between. back [P, back_pitch] is that of what the 1x1 reads; with z as
// above and masked = relu ? (z <= 0 ? 0 : back) : back
//   of e      masked * scale, or masked * scale + a + b * e with a correction
//   of scale  the sum of masked * e        of shift  the sum of masked
// Where what is between is a batch norm of this batch, one launch makes the sums, of which its
// gradient's a and b are made, and a second one writes.
struct BetweenGradParams {
  DepthwiseShape shape;
  const void* x;
  int64_t x_pitch;
  const void* back;
  int64_t back_pitch;
  DepthwiseBranch branch;
  int32_t relu;
  void* grad;  // null for none: of e, [P, back_pitch]; may be back
  void* out;   // null for none: what the 1x1 reads, [P, out_pitch]
  int64_t out_pitch;
  void* sums;  // null for none: per tile of pixels, of scale and of shift [tiles, 2, pitch]
  const void* correction;  // null for none: a and b [2, pitch], of type Sum; excludes sums
};

// The gradient of depthwise weights: sums over parts of the pixels, of the taps that are inside the
// map somewhere, [parts, window_taps, pitch].
struct DepthwiseGradWeightParams {
  DepthwiseShape shape;
  const void* x;
  int64_t x_pitch;
  const void* grad;  // of e
  int64_t grad_pitch;
  DepthwiseBranch branch;
  int32_t parts;
  void* sums;
};

// out[row, channel]: the sum of sums[part, window row, channel] over all parts, in their order. The
// rows are a kernel's taps; those outside the map have no sums and are zero.
struct SumPartsParams {
  const void* sums;  // [parts, window_h * window_w, pitch], parts part_step apart
  int64_t parts, part_step;
  int32_t kernel_h, kernel_w, window_h, window_w;
  int32_t channels, pitch;
  void* out;  // in the tensors' dtype, or of type Sum
  int32_t out_is_sum;
  int64_t channel_step;  // in out; rows are neighbours
};

// out[p] = sum over branches and their taps of filter[tap] * grad[p - tap].
struct DepthwiseGradInputParams {
  DepthwiseShape shape;
  int64_t grad_pitch;
  void* out;  // [P, out_pitch]; only C channels are written, wherever rows begin
  int64_t out_pitch;
  int32_t phase;  // the rate by which rows are walked, see kernels/phases.cuh
  int32_t branches;
  struct {
    DepthwiseBranch taps;
    const void* grad;  // [P, grad_pitch]: of e; of x for a plain branch
  } branch[kMaxBranches];
};

// Of a kernel's taps on one axis, those whose offset is less than the map's size: this many on each
// side of the centre.
__host__ __device__ constexpr int32_t depthwise_reach(int32_t kernel, int32_t rate, int32_t size) {
  const int32_t inside = (size - 1) / rate;
  return inside < kernel / 2 ? inside : kernel / 2;
}

// Of the gradient of weights: a block adds up so many by so many taps of the window.
inline constexpr int kDepthwiseGroup = 3;

__host__ __device__ constexpr int64_t depthwise_groups(const DepthwiseShape& shape,
                                                       const DepthwiseBranch& branch) {
  const int64_t rows = 2 * int64_t(depthwise_reach(branch.kernel_h, branch.rate_h, shape.height));
  const int64_t columns = 2 * int64_t(depthwise_reach(branch.kernel_w, branch.rate_w, shape.width));
  return (rows / kDepthwiseGroup + 1) * (columns / kDepthwiseGroup + 1);
}

cudaError_t launch_pack_filters_sm80(Math math, const PackFiltersParams& params,
                                     cudaStream_t stream);
cudaError_t launch_pack_affine_sm80(Math math, const PackAffineParams& params, cudaStream_t stream);
cudaError_t launch_depthwise_sm80(Math math, const DepthwiseParams& params, cudaStream_t stream);
cudaError_t launch_between_grad_sm80(Math math, const BetweenGradParams& params,
                                     cudaStream_t stream);
cudaError_t launch_depthwise_grad_weight_sm80(Math math, const DepthwiseGradWeightParams& params,
                                              cudaStream_t stream);
cudaError_t launch_depthwise_grad_input_sm80(Math math, const DepthwiseGradInputParams& params,
                                             cudaStream_t stream);
cudaError_t launch_sum_parts_sm80(Math math, const SumPartsParams& params, cudaStream_t stream);

}  // namespace aspp::cuda
