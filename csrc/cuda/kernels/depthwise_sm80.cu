// SPDX-License-Identifier: BSD-3-Clause
// What the 1x1s of a separable pyramid read, for all branches in one launch, and what batch
// normalisation needs of the depthwise results. Blocks: [tiles, branches, tiles of channels], so
// that what is read by several branches is read at about the same time.
#include "../ptx/launch.cuh"
#include "depthwise.cuh"

namespace aspp::cuda {
namespace sm80 {
namespace {

template <Math kMath>
struct DepthwiseStatistics {
  using E = Elements<kMath>;
  using Sum = typename E::Sum;
  static constexpr int kColumns = E::kColumns;
  // Behind the places: warps' sums, then the means.
  static constexpr int kBytes = (kDepthwiseWarps + 1) * kColumns * int(sizeof(Sum));

  // Of the rounded sums of all pixels of the tile. Called by the whole block.
  __device__ __forceinline__ static void write(const DepthwiseParams& p, int64_t part,
                                               const DepthwiseSums<kMath>& sums,
                                               const DepthwiseThread<kMath>& thread,
                                               const Place* places, char* shared) {
    auto* const of_warps = reinterpret_cast<Sum*>(shared);
    Sum* const means = of_warps + kDepthwiseWarps * kColumns;
    int count = 0;
    for (int i = 0; i < kDepthwisePixels; ++i) count += places[i].index >= 0;
    const int column = thread.channel % kColumns;
    const auto over_pixels = [&](bool squared, auto&& visit) {
      typename E::Values totals = {};
#pragma unroll
      for (int i = 0; i < kDepthwiseShare; ++i) {
        if (places[thread.row + i * kDepthwiseRows].index < 0) continue;
        typename E::Values values;
        E::widen(E::rounded(sums[i]), values);
#pragma unroll
        for (int e = 0; e < E::kCount; ++e) {
          const Sum difference = squared ? values[e] - means[column + e] : values[e];
          totals[e] += squared ? difference * difference : difference;
        }
      }
      sum_over_rows(totals, of_warps, threadIdx.x,
                    [&](int lane, int e, Sum total) { visit(lane * E::kCount + e, total); });
      ptx::sync_block();
    };
    over_pixels(false, [&](int channel, Sum total) { means[channel] = total / Sum(count); });
    over_pixels(true, [&](int channel, Sum total) {
      ptx::store<Sum>(p.tile_means, part * kColumns + channel, means[channel]);
      ptx::store<Sum>(p.tile_squares, part * kColumns + channel, total);
    });
    if (threadIdx.x == 0) ptx::store<int32_t>(p.tile_counts, part, count);
  }
};

template <Math kMath>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_kernel(const __grid_constant__ DepthwiseParams p) {
  using E = Elements<kMath>;
  char* const shared = ptx::shared_memory();
  auto* const places = reinterpret_cast<Place*>(shared);
  const int column_tiles = depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  const int column_tile = blockIdx.x % column_tiles, rest = blockIdx.x / column_tiles;
  const int b = rest % p.branches, tile = rest / p.branches;
  const DepthwiseBranch& branch = p.branch[b].taps;
  const DepthwiseThread<kMath> thread(p.shape, column_tile, threadIdx.x);
  find_places(p.shape, Phases(p.shape.height, p.shape.width, branch.rate_h), tile, places,
              threadIdx.x);
  ptx::sync_block();
  DepthwiseSums<kMath> sums = {};
  add_taps<kMath, false>(sums, thread, p.shape, branch, p.x, p.x_pitch, places);
  if (p.tile_counts != nullptr) {
    const int64_t part = (int64_t(b) * depthwise_tiles(p.shape) + tile) * column_tiles;
    DepthwiseStatistics<kMath>::write(p, part + column_tile, sums, thread, places,
                                      shared + kPlaceBytes);
  }
  void* const out = p.branch[b].out;
  if (out == nullptr || !thread.inside) return;
  const Affine<kMath> affine(branch.affine, p.shape, thread);
  const bool cut = p.relu != 0 && branch.affine != nullptr;
#pragma unroll
  for (int i = 0; i < kDepthwiseShare; ++i) {
    const int32_t pixel = places[thread.row + i * kDepthwiseRows].index;
    if (pixel < 0) continue;
    typename E::Values values;
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) {
      const auto z = sums[i][e] * affine.scale[e] + affine.shift[e];
      values[e] = cut ? relu(z) : z;
    }
    ptx::store_chunk(thread.at(out, pixel, p.out_pitch), E::rounded(values));
  }
}

template <Math kMath>
cudaError_t launch(const DepthwiseParams& p, cudaStream_t stream) {
  const int64_t blocks = depthwise_tiles(p.shape) * p.branches *
                         depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int bytes = kPlaceBytes + DepthwiseStatistics<kMath>::kBytes;
  return ptx::launch(depthwise_kernel<kMath>, "depthwise_kernel", int(blocks), kDepthwiseThreads,
                     bytes, stream, p);
}

}  // namespace
}  // namespace sm80

cudaError_t launch_depthwise_sm80(Math math, const DepthwiseParams& params, cudaStream_t stream) {
  switch (math) {
    case Math::bfloat16: return sm80::launch<Math::bfloat16>(params, stream);
    case Math::float16: return sm80::launch<Math::float16>(params, stream);
    case Math::float64: return sm80::launch<Math::float64>(params, stream);
    default: return sm80::launch<Math::float32>(params, stream);
  }
}

}  // namespace aspp::cuda
