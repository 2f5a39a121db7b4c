// SPDX-License-Identifier: BSD-3-Clause
// The gradient of the input from those of all branches' depthwise results: every tap, mirrored,
// rounded once. Blocks: [tiles, tiles of channels].
#include "../ptx/launch.cuh"
#include "depthwise.cuh"

namespace aspp::cuda {
namespace sm80 {
namespace {

// sums[i] += image of pixel i
template <Math kMath>
__device__ __forceinline__ void add_plain(DepthwiseSums<kMath>& sums,
                                          const DepthwiseThread<kMath>& thread, const void* image,
                                          int64_t pitch, const Place* places) {
  using E = Elements<kMath>;
#pragma unroll
  for (int i = 0; i < kDepthwiseShare; ++i) {
    const int32_t pixel = places[thread.row + i * kDepthwiseRows].index;
    if (pixel < 0 || !thread.inside) continue;
    typename E::Values values;
    E::load(thread.at(image, pixel, pitch), values);
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) sums[i][e] += values[e];
  }
}

// As a whole where that is possible, else one by one.
template <Math kMath>
__device__ __forceinline__ void store(void* out, const typename Elements<kMath>::Values& values,
                                      int32_t channels) {
  using E = Elements<kMath>;
  using Memory = typename E::Memory;
  const ptx::Chunk chunk = E::rounded(values);
  if (channels >= E::kCount && reinterpret_cast<uintptr_t>(out) % 16 == 0)
    return ptx::store_chunk(out, chunk);
  Memory elements[E::kCount];
  memcpy(elements, &chunk, sizeof chunk);
#pragma unroll
  for (int e = 0; e < E::kCount; ++e)
    if (e < channels) ptx::store<Memory>(out, e, elements[e]);
}

template <Math kMath>
__global__ void __launch_bounds__(kDepthwiseThreads, 2)
    depthwise_grad_input_kernel(const __grid_constant__ DepthwiseGradInputParams p) {
  using E = Elements<kMath>;
  auto* const places = reinterpret_cast<Place*>(ptx::shared_memory());
  const int column_tiles = depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  const int column_tile = blockIdx.x % column_tiles, tile = blockIdx.x / column_tiles;
  const DepthwiseThread<kMath> thread(p.shape, column_tile, threadIdx.x);
  find_places(p.shape, Phases(p.shape.height, p.shape.width, p.phase), tile, places, threadIdx.x);
  ptx::sync_block();

  DepthwiseSums<kMath> sums = {};
  for (int b = 0; b < p.branches; ++b) {
    const DepthwiseBranch& branch = p.branch[b].taps;
    const void* const grad = p.branch[b].grad;
    if (branch.filter == nullptr) {
      add_plain<kMath>(sums, thread, grad, p.grad_pitch, places);
    } else if constexpr (E::kBytes == 2) {
      add_taps<kMath, true>(sums, thread, p.shape, branch, grad, p.grad_pitch, places);
    } else {
      // One long sum of all taps would round worse than PyTorch's sums of sums.
      DepthwiseSums<kMath> own = {};
      add_taps<kMath, true>(own, thread, p.shape, branch, grad, p.grad_pitch, places);
#pragma unroll
      for (int i = 0; i < kDepthwiseShare; ++i)
#pragma unroll
        for (int e = 0; e < E::kCount; ++e) sums[i][e] += own[i][e];
    }
  }
#pragma unroll
  for (int i = 0; i < kDepthwiseShare; ++i) {
    const int32_t pixel = places[thread.row + i * kDepthwiseRows].index;
    if (pixel >= 0 && thread.inside)
      store<kMath>(thread.at(p.out, pixel, p.out_pitch), sums[i],
                   p.shape.channels - thread.channel);
  }
}

template <Math kMath>
cudaError_t launch(const DepthwiseGradInputParams& p, cudaStream_t stream) {
  const int64_t blocks =
      depthwise_tiles(p.shape) * depthwise_column_tiles(p.shape, Elements<kMath>::kColumns);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return ptx::launch(depthwise_grad_input_kernel<kMath>, "depthwise_grad_input_kernel", int(blocks),
                     kDepthwiseThreads, kPlaceBytes, stream, p);
}

}  // namespace
}  // namespace sm80

cudaError_t launch_depthwise_grad_input_sm80(Math math, const DepthwiseGradInputParams& params,
                                             cudaStream_t stream) {
  switch (math) {
    case Math::bfloat16: return sm80::launch<Math::bfloat16>(params, stream);
    case Math::float16: return sm80::launch<Math::float16>(params, stream);
    case Math::float64: return sm80::launch<Math::float64>(params, stream);
    default: return sm80::launch<Math::float32>(params, stream);
  }
}

}  // namespace aspp::cuda
