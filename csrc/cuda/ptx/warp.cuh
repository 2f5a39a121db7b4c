// SPDX-License-Identifier: BSD-3-Clause
// Full warps only: every lane takes part. T has 4 or 8 bytes.
#pragma once

#include <cuda_runtime.h>

namespace aspp::cuda::ptx {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Orders memory among the lanes, which shuffles, mma and ldmatrix do not.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// `value` of lane `lane` mod 32.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

// `value` of this lane's number xor `mask`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

}  // namespace aspp::cuda::ptx
