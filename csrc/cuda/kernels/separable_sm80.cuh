// SPDX-License-Identifier: BSD-3-Clause
// The separable pyramid on mma.sync and cp.async: sm_80 and everything after it. One block per
// worker walks the worker's units. Of a unit's k blocks, 128 bytes of channels each, the pixels
// that all taps of the tile read are loaded once; depthwise sums of them, rounded, are the operand
// of the product. Between two barriers half of the warps compute the sums of the next block and
// then the product of this one, the other half first the product: on each quarter of a processor
// one warp uses the tensor cores while another uses the rest.
#pragma once

#include "../ptx/launch.cuh"
#include "epilogue.cuh"
#include "fused_rows.cuh"
#include "slices.cuh"

namespace aspp::cuda::sm80 {

template <class C>
__device__ __forceinline__ WarpPlace place_of(int thread) {
  const int warp = thread / 32, lane = thread % 32;
  return {warp / C::kWarpColumns * C::kTile.warp_m, warp % C::kWarpColumns * C::kTile.warp_n,
          lane / 4, lane % 4};
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    separable_kernel(const __grid_constant__ SeparableParams p) {
  const FusedMemory<C> memory(p);
  const int thread = threadIdx.x, worker = blockIdx.x;
  const int first_half = thread < C::kThreads / 2;
  const WarpPlace first = place_of<C>(thread);
  const typename C::Warp products(first.row, first.column, thread % 32);
  FusedLoads<C> loads(p, memory, thread);

  int32_t u = p.worker_begin[worker];
  const int32_t end = p.worker_begin[worker + 1];
  if (u < end) loads.begin(p.units[u], u & 1);
  for (; u < end; ++u) {
    const WorkUnit& unit = p.units[u];
    const int32_t blocks = unit.k_end - unit.k_begin;
    const bool active = first.row < unit.m_count && first.column < unit.n_count;
    typename C::WarpSums sums = {};
    {
      ptx::cp_async_wait<1>();
      ptx::sync_block();  // all have the first block's pixels, and the tables
      const FusedRows<C> rows(memory, u & 1, thread);
      rows.compute(0);
      for (int32_t block = 0; block < blocks; ++block) {
        ptx::cp_async_wait<0>();
        ptx::sync_block();  // all have A and B of this block and the next one's pixels
        loads.ahead_of(block);
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) {
          if (turn != first_half) {
            if (block + 1 < blocks) rows.compute(block + 1);
          } else if (active) {
            products.multiply(sums, memory.a(block & 1), memory.b(block & 1));
          }
        }
      }
    }
    const WarpPlace place = place_of<C>(ptx::thread_again());
    if (u + 1 < end) loads.begin(p.units[u + 1], (u + 1) & 1);
    if (unit.slices > 1 && !Slices<C>::combine(p, unit, sums, memory.flag(), thread, active))
      continue;
    if (!active) continue;
    Epilogue<C>::transform(p, unit, sums, place);
    Epilogue<C>::store(p, unit, sums, place, memory.row_pixels(u & 1));
  }
}

template <class C>
cudaError_t launch_fused(const SeparableParams& params, cudaStream_t stream) {
  const FusedLayout layout(C::kTile, C::kMath, params.halo_pixels, params.most_taps);
  return ptx::launch(separable_kernel<C>, "separable_kernel", params.workers, C::kThreads,
                     layout.total, stream, params);
}

// Instantiated by one file each, so that they compile side by side.
template <Math kMath>
cudaError_t launch_fused_math(int shape, const SeparableParams& params, cudaStream_t stream) {
  if constexpr (first_shape(kMath) == 0)
    if (shape == 0) return launch_fused<Config<Pass::separable, kMath, 0>>(params, stream);
  return launch_fused<Config<Pass::separable, kMath, 1>>(params, stream);
}

extern template cudaError_t launch_fused_math<Math::bfloat16>(int, const SeparableParams&,
                                                              cudaStream_t);
extern template cudaError_t launch_fused_math<Math::float16>(int, const SeparableParams&,
                                                             cudaStream_t);
extern template cudaError_t launch_fused_math<Math::tf32>(int, const SeparableParams&,
                                                          cudaStream_t);
extern template cudaError_t launch_fused_math<Math::float32>(int, const SeparableParams&,
                                                             cudaStream_t);

}  // namespace aspp::cuda::sm80
