// SPDX-License-Identifier: BSD-3-Clause
// What the threads of a block share.
#pragma once

#include <cuda_runtime.h>

namespace aspp::cuda::ptx {

#if defined(ASPP_EMULATE)

inline void sync_block() { emulation::sync_block(); }
inline char* shared_memory() { return emulation::current("shared_memory").block->shared; }

#else

__device__ __forceinline__ void sync_block() { __syncthreads(); }

// The launch's dynamic shared memory, at a multiple of 1024 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char aspp_shared_memory[];
  return aspp_shared_memory;
}

#endif

// threadIdx.x, read anew: what is computed from it is not kept in registers meanwhile.
__device__ __forceinline__ int thread_again() {
#if defined(ASPP_EMULATE)
  return int(threadIdx.x);
#else
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#endif
}

}  // namespace aspp::cuda::ptx
