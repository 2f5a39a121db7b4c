// SPDX-License-Identifier: BSD-3-Clause
// The pyramid on mma.sync and cp.async: sm_80 and everything after it. One block per worker walks
// the worker's units; loads run ahead of the products through a ring of stages and do not stop
// where a unit ends.
#pragma once

#include "../ptx/launch.cuh"
#include "epilogue.cuh"
#include "loaders.cuh"
#include "slices.cuh"
#include "statistics.cuh"

namespace aspp::cuda::sm80 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kTile.blocks)
    pyramid_kernel(const __grid_constant__ PyramidParams p) {
  char* const ring = ptx::shared_memory();
  char* const table = ring + C::kRingBytes;
  auto* const flag = reinterpret_cast<uint32_t*>(table + 1024 - 16);
  const int thread = threadIdx.x, worker = blockIdx.x, warp = thread / 32, lane = thread % 32;
  const WarpPlace place{warp / C::kWarpColumns * C::kTile.warp_m,
                        warp % C::kWarpColumns * C::kTile.warp_n, lane / 4, lane % 4};

  const typename C::Warp products(place.row, place.column, lane);

  Loader<C> loader(p, table, worker, thread);
  loader.prepare();
  for (int stage = 0; stage < C::kStages - 1; ++stage) {
    if constexpr (Loader<C>::kPrepares) ptx::sync_block();
    loader.load(ring + stage * C::kStageBytes);
    ptx::cp_async_commit();
    loader.prepare();
  }

  int ready = 0;  // where the oldest stage begins; the one before it in the ring is the empty one
  for (int32_t u = p.worker_begin[worker]; u < p.worker_begin[worker + 1]; ++u) {
    const WorkUnit& unit = p.units[u];  // not a copy: registers are what this kernel is short of
    // A short tile leaves the warps beyond its end idle: half of the products for half of the rows.
    const bool active = place.row < unit.m_count && place.column < unit.n_count;
    typename C::WarpSums sums = {};
    for (int32_t left = unit.k_end - unit.k_begin; left > 0; --left) {
      ptx::cp_async_wait<C::kStages - 2>();
      ptx::sync_block();  // all have this stage, and have done with the one before it
      loader.load(ring + (ready == 0 ? C::kRingBytes : ready) - C::kStageBytes);
      ptx::cp_async_commit();
      loader.prepare();
      if (active) products.multiply(sums, ring + ready, ring + ready + C::TileA::kSize);
      ready = ready + C::kStageBytes == C::kRingBytes ? 0 : ready + C::kStageBytes;
    }
    if (unit.slices > 1 && !Slices<C>::combine(p, unit, sums, flag, thread, active)) continue;
    if constexpr (C::kPass == Pass::forward) Statistics<C>::write(p, unit, sums, place);
    if (!active) continue;
    if constexpr (C::kPass == Pass::forward) Epilogue<C>::transform(p, unit, sums, place);
    Epilogue<C>::store(p, unit, sums, place);
  }
}

template <class C>
cudaError_t launch_config(const PyramidParams& params, cudaStream_t stream) {
  return ptx::launch(pyramid_kernel<C>, "pyramid_kernel", params.workers, C::kThreads,
                     C::kTile.shared_bytes(), stream, params);
}

template <Pass kPass, Math kMath>
cudaError_t launch_pass(int shape, const PyramidParams& params, cudaStream_t stream) {
  if constexpr (first_shape(kMath) == 0)
    if (shape == 0) return launch_config<Config<kPass, kMath, 0>>(params, stream);
  return launch_config<Config<kPass, kMath, 1>>(params, stream);
}

// Instantiated by one file each, so that they compile side by side.
template <Math kMath>
cudaError_t launch_math(Pass pass, int shape, const PyramidParams& params, cudaStream_t stream) {
  switch (pass) {
    case Pass::forward: return launch_pass<Pass::forward, kMath>(shape, params, stream);
    case Pass::grad_input: return launch_pass<Pass::grad_input, kMath>(shape, params, stream);
    default: return launch_pass<Pass::grad_weight, kMath>(shape, params, stream);
  }
}

extern template cudaError_t launch_math<Math::bfloat16>(Pass, int, const PyramidParams&,
                                                        cudaStream_t);
extern template cudaError_t launch_math<Math::float16>(Pass, int, const PyramidParams&,
                                                       cudaStream_t);
extern template cudaError_t launch_math<Math::tf32>(Pass, int, const PyramidParams&, cudaStream_t);
extern template cudaError_t launch_math<Math::float32>(Pass, int, const PyramidParams&,
                                                       cudaStream_t);
extern template cudaError_t launch_math<Math::float64>(Pass, int, const PyramidParams&,
                                                       cudaStream_t);

}  // namespace aspp::cuda::sm80
