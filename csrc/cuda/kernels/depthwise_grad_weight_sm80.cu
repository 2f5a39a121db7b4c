// SPDX-License-Identifier: BSD-3-Clause
// The gradient of a branch's depthwise weights. A block adds up, over some tiles of pixels, what
// three by three taps of the window get; its threads keep their sums in registers until the end.
// Blocks: [parts, groups of taps, tiles of channels].
#include "../ptx/launch.cuh"
#include "depthwise.cuh"

namespace aspp::cuda {
namespace sm80 {
namespace {

constexpr int kSide = kDepthwiseGroup;  // of a group of taps

__host__ __device__ constexpr int ceil_div(int value, int step) {
  return value / step + (value % step != 0);
}

template <Math kMath>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_grad_weight_kernel(const __grid_constant__ DepthwiseGradWeightParams p) {
  using E = Elements<kMath>;
  using Sum = typename E::Sum;
  char* const shared = ptx::shared_memory();
  auto* const places = reinterpret_cast<Place*>(shared);
  const TapWindow window(p.branch, p.shape);
  const int rows = 2 * window.rows + 1, columns = 2 * window.columns + 1;
  const int column_tiles = depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  const int of_row = ceil_div(columns, kSide), groups = ceil_div(rows, kSide) * of_row;
  const int column_tile = blockIdx.x % column_tiles, rest = blockIdx.x / column_tiles;
  const int group = rest % groups, part = rest / groups;
  const int first_row = group / of_row * kSide, first_column = group % of_row * kSide;
  const DepthwiseThread<kMath> thread(p.shape, column_tile, threadIdx.x);
  const Phases phases(p.shape.height, p.shape.width, p.branch.rate_h);

  const int64_t pixel_bytes = p.x_pitch * E::kBytes, row_bytes = p.shape.width * pixel_bytes;
  const int64_t step = p.branch.rate_w * pixel_bytes;
  const int64_t first_dx = (first_column - window.columns) * step;

  Sum sums[kSide * kSide * E::kCount] = {};
  const int64_t tiles = depthwise_tiles(p.shape);
  const auto end = int32_t(tiles * (part + 1) / p.parts);
  for (auto tile = int32_t(tiles * part / p.parts); tile < end; ++tile) {
    ptx::sync_block();
    find_places(p.shape, phases, tile, places, threadIdx.x);
    ptx::sync_block();
    if (!thread.inside) continue;
#pragma unroll 1
    for (int i = 0; i < kDepthwiseShare; ++i) {
      const Place place = places[thread.row + i * kDepthwiseRows];
      if (place.index < 0) break;  // and so are those behind it
      typename E::Values grad;
      E::load(thread.at(p.grad, place.index, p.grad_pitch), grad);
      const char* const from = thread.at(p.x, place.index, p.x_pitch);
      bool live[kSide];
#pragma unroll
      for (int column = 0; column < kSide; ++column) {
        const int32_t number = first_column + column - window.columns;
        live[column] = number <= window.columns &&
                       uint32_t(place.x + number * p.branch.rate_w) < uint32_t(p.shape.width);
      }
#pragma unroll
      for (int row = 0; row < kSide; ++row) {
        const int32_t number = first_row + row - window.rows;
        if (number > window.rows) continue;
        const int32_t dy = number * p.branch.rate_h;
        if (uint32_t(place.y + dy) >= uint32_t(p.shape.height)) continue;
        const char* const of_row = from + dy * row_bytes + first_dx;
        ptx::Chunk loaded[kSide];
#pragma unroll
        for (int column = 0; column < kSide; ++column) {
          loaded[column] = {};
          if (live[column]) loaded[column] = ptx::load_chunk(of_row + column * step);
        }
#pragma unroll
        for (int column = 0; column < kSide; ++column) {
          if (!live[column]) continue;
          typename E::Values values;
          E::widen(loaded[column], values);
#pragma unroll
          for (int e = 0; e < E::kCount; ++e)
            sums[(row * kSide + column) * E::kCount + e] += values[e] * grad[e];
        }
      }
    }
  }
  ptx::sync_block();
  auto* const of_warps = reinterpret_cast<Sum*>(shared);  // the places are done with
  sum_over_rows(sums, of_warps, threadIdx.x, [&](int lane, int i, Sum total) {
    const int tap = i / E::kCount, row = first_row + tap / kSide,
              column = first_column + tap % kSide;
    const int64_t channel = int64_t(column_tile) * Elements<kMath>::kColumns + lane * E::kCount;
    if (channel >= p.shape.pitch || row >= rows || column >= columns) return;
    const int64_t place = (int64_t(part) * rows + row) * columns + column;
    ptx::store<Sum>(p.sums, place * p.shape.pitch + channel + i % E::kCount, total);
  });
}

template <Math kMath>
cudaError_t launch(const DepthwiseGradWeightParams& p, cudaStream_t stream) {
  const int64_t blocks = depthwise_groups(p.shape, p.branch) * p.parts *
                         depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const size_t sums = kDepthwiseWarps * kSide * kSide * Elements<kMath>::kColumns *
                      sizeof(typename Elements<kMath>::Sum);
  return ptx::launch(depthwise_grad_weight_kernel<kMath>, "depthwise_grad_weight_kernel",
                     int(blocks), kDepthwiseThreads, sums, stream, p);
}

}  // namespace
}  // namespace sm80

cudaError_t launch_depthwise_grad_weight_sm80(Math math, const DepthwiseGradWeightParams& params,
                                              cudaStream_t stream) {
  switch (math) {
    case Math::bfloat16: return sm80::launch<Math::bfloat16>(params, stream);
    case Math::float16: return sm80::launch<Math::float16>(params, stream);
    case Math::float64: return sm80::launch<Math::float64>(params, stream);
    default: return sm80::launch<Math::float32>(params, stream);
  }
}

}  // namespace aspp::cuda
