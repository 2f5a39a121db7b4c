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

}  // namespace aspp::cuda::ptx
