// SPDX-License-Identifier: BSD-3-Clause
// Launches a kernel of one parameter struct.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace aspp::cuda::ptx {

// What a launch may take without asking for more.
inline constexpr size_t kPlainSharedBytes = 48 << 10;

// No blocks: nothing to do. `name` is what the emulation calls the kernel.
template <class Params>
cudaError_t launch(void (*kernel)(Params), [[maybe_unused]] const char* name, int blocks,
                   int threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  static_assert(sizeof(Params) <= 4096, "kernel parameters have 4 KB");
  if (blocks == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kPlainSharedBytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
#if defined(ASPP_EMULATE)
    error = emulation::launch(kernel, name, blocks, threads, shared_bytes, stream, params);
#else
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads),
                             arguments, shared_bytes, stream);
#endif
  }
  // The caller has the error; the next check of another's launch must not find it.
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace aspp::cuda::ptx
