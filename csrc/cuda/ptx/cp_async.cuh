// SPDX-License-Identifier: BSD-3-Clause
// Copies from global to shared memory that go on while the thread computes.
#pragma once

#include <cuda_runtime.h>

namespace aspp::cuda::ptx {

// 16 bytes past L1, both addresses a multiple of 16; zeros where not `valid`, and `global` is not
// read then. Nobody may touch the bytes in shared memory from here to the wait.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#if defined(ASPP_EMULATE)
  emulation::copy_async(shared, global, valid);
#else
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Ends a group: this thread's copies since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if defined(ASPP_EMULATE)
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's groups but the last kPending. Other threads need a barrier as well.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(kPending >= 0);
#if defined(ASPP_EMULATE)
  emulation::wait_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace aspp::cuda::ptx
