// SPDX-License-Identifier: BSD-3-Clause
// CUDA C++ as far as the kernels speak it. There is no __shared__: ptx/block.cuh has the memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "warp_operations.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::aspp::cuda::emulation::current("threadIdx").index)
#define blockIdx (::aspp::cuda::emulation::current("blockIdx").block->index)
#define blockDim (::aspp::cuda::emulation::current("blockDim").block->launch->block)
#define gridDim (::aspp::cuda::emulation::current("gridDim").block->launch->grid)

inline void __syncthreads() { aspp::cuda::emulation::sync_block(); }
inline void __threadfence() { aspp::cuda::emulation::fence(); }

inline void __syncwarp(unsigned mask = ~0u) {
  if (mask != ~0u) aspp::cuda::emulation::fail("__syncwarp: only the full mask is modelled");
  aspp::cuda::emulation::sync_warp();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  namespace emulation = aspp::cuda::emulation;
  if (mask != ~0u) emulation::fail("__shfl_sync: only the full mask is modelled");
  emulation::Exchange exchange{0, unsigned(lane), 0};
  std::memcpy(&exchange.value, &value, sizeof value);
  emulation::together(emulation::kShuffle, &exchange);
  std::memcpy(&value, &exchange.result, sizeof value);
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, int(aspp::cuda::emulation::current("shuffle").lane) ^ lanes);
}

inline unsigned atomicAdd(unsigned* word, unsigned value) {
  return aspp::cuda::emulation::atomic_add(word, value);
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

using std::max;
using std::min;
