// SPDX-License-Identifier: BSD-3-Clause
// The gradient of what is between a branch's two convolutions. e is computed again, which is less
// than reading it would be. Blocks: [tiles, tiles of channels].
#include "../ptx/launch.cuh"
#include "depthwise.cuh"

namespace aspp::cuda {
namespace sm80 {
namespace {

template <Math kMath, bool kCorrected>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    between_grad_kernel(const __grid_constant__ BetweenGradParams p) {
  using E = Elements<kMath>;
  using Sum = typename E::Sum;
  char* const shared = ptx::shared_memory();
  auto* const places = reinterpret_cast<Place*>(shared);
  const int column_tiles = depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  const int column_tile = blockIdx.x % column_tiles, tile = blockIdx.x / column_tiles;
  const DepthwiseThread<kMath> thread(p.shape, column_tile, threadIdx.x);
  find_places(p.shape, Phases(p.shape.height, p.shape.width, p.branch.rate_h), tile, places,
              threadIdx.x);
  ptx::sync_block();
  DepthwiseSums<kMath> sums = {};
  add_taps<kMath, false>(sums, thread, p.shape, p.branch, p.x, p.x_pitch, places);

  const Affine<kMath> affine(p.branch.affine, p.shape, thread);
  const Affine<kMath> correction(kCorrected ? p.correction : nullptr, p.shape, thread);
  Sum of_between[2 * E::kCount] = {};  // of scale, of shift
#pragma unroll
  for (int i = 0; i < kDepthwiseShare; ++i) {
    const int32_t pixel = places[thread.row + i * kDepthwiseRows].index;
    if (pixel < 0 || !thread.inside) continue;
    typename E::Values back, values;
    E::load(thread.at(p.back, pixel, p.back_pitch), back);
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) {
      const Sum z = sums[i][e] * affine.scale[e] + affine.shift[e];
      values[e] = p.relu != 0 ? relu(z) : z;
      if (p.relu != 0 && z <= Sum(0)) back[e] = 0;  // where z is a NaN the gradient goes through
      of_between[e] += back[e] * sums[i][e];
      of_between[E::kCount + e] += back[e];
      back[e] *= affine.scale[e];
      if constexpr (kCorrected) back[e] += correction.scale[e] + correction.shift[e] * sums[i][e];
    }
    if (p.grad != nullptr)
      ptx::store_chunk(thread.at(p.grad, pixel, p.back_pitch), E::rounded(back));
    if (p.out != nullptr)
      ptx::store_chunk(thread.at(p.out, pixel, p.out_pitch), E::rounded(values));
  }
  if (kCorrected || p.sums == nullptr) return;
  auto* const of_warps = reinterpret_cast<Sum*>(shared + kPlaceBytes);
  sum_over_rows(of_between, of_warps, threadIdx.x, [&](int lane, int i, Sum total) {
    const int64_t channel = int64_t(column_tile) * Elements<kMath>::kColumns + lane * E::kCount;
    const int64_t row = int64_t(tile) * 2 + i / E::kCount;
    if (channel < p.shape.pitch)
      ptx::store<Sum>(p.sums, row * p.shape.pitch + channel + i % E::kCount, total);
  });
}

template <Math kMath>
cudaError_t launch(const BetweenGradParams& p, cudaStream_t stream) {
  const int64_t blocks =
      depthwise_tiles(p.shape) * depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const size_t bytes = kPlaceBytes + kDepthwiseWarps * 2 * Elements<kMath>::kColumns *
                                         sizeof(typename Elements<kMath>::Sum);
  if (p.correction != nullptr && p.sums != nullptr) return cudaErrorInvalidValue;
  const auto kernel = p.correction != nullptr ? between_grad_kernel<kMath, true>
                                              : between_grad_kernel<kMath, false>;
  return ptx::launch(kernel, "between_grad_kernel", int(blocks), kDepthwiseThreads, bytes, stream,
                     p);
}

}  // namespace
}  // namespace sm80

cudaError_t launch_between_grad_sm80(Math math, const BetweenGradParams& params,
                                     cudaStream_t stream) {
  switch (math) {
    case Math::bfloat16: return sm80::launch<Math::bfloat16>(params, stream);
    case Math::float16: return sm80::launch<Math::float16>(params, stream);
    case Math::float64: return sm80::launch<Math::float64>(params, stream);
    default: return sm80::launch<Math::float32>(params, stream);
  }
}

}  // namespace aspp::cuda
