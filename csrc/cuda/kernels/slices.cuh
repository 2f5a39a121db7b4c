// SPDX-License-Identifier: BSD-3-Clause
// Sums that several blocks share: each writes its slice, the last to finish adds all of them in the
// order of the slices. Whoever that is, the bits are the same, and nobody waits.
#pragma once

#include "../ptx/block.cuh"
#include "../ptx/memory.cuh"
#include "config.cuh"

namespace aspp::cuda::sm80 {

template <class C>
struct Slices {
  using Sum = typename C::Sum;
  using WarpSums = typename C::WarpSums;
  static constexpr int kSums = C::kTile.warp_m * C::kTile.warp_n / 32;  // per thread
  static constexpr int64_t kPartial = int64_t(kSums) * C::kThreads;     // C::kTile.m * C::kTile.n

  // Whether this block is the last of the tile's; then `sums` are complete. `flag` is a word of
  // shared memory. Called by the whole block; the sums of warps that are not `active` are neither
  // written nor read.
  __device__ __forceinline__ static bool combine(const WorkParams& p, const WorkUnit& unit,
                                                 WarpSums& sums, uint32_t* flag, int thread,
                                                 bool active) {
    Sum* partials = static_cast<Sum*>(p.partials) + unit.partial * kPartial + thread;
    Sum* flat = &sums[0][0][0];
    if (active) {
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        ptx::store<Sum>(partials, unit.slice * kPartial + s * C::kThreads, flat[s]);
    }
    ptx::sync_block();
    if (thread == 0) {  // for the whole block, whose writes and reads the barriers order with this
      ptx::fence_device();
      *flag = ptx::atomic_increment(p.counters + unit.counter) + 1 == uint32_t(unit.slices);
      ptx::fence_device();
    }
    ptx::sync_block();
    if (*flag == 0) return false;
    if (active) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) flat[s] = 0;
      for (int32_t slice = 0; slice < unit.slices; ++slice)
#pragma unroll
        for (int s = 0; s < kSums; ++s)
          flat[s] += ptx::load_volatile(partials + slice * kPartial + s * C::kThreads);
    }
    return true;
  }
};

}  // namespace aspp::cuda::sm80
