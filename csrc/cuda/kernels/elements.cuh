// SPDX-License-Identifier: BSD-3-Clause
// The 16 bytes of channels that a thread of the depthwise kernels has, as sums are computed.
#pragma once

#include "../ptx/convert.cuh"
#include "../ptx/memory.cuh"
#include "warp_math.cuh"

namespace aspp::cuda::sm80 {

// A chunk's elements as sums are.
template <Math kMath>
struct Elements {
  using Memory = typename Element<kMath>::Memory;
  using Sum = typename Element<kMath>::Sum;
  static constexpr int kCount = chunk_of(kMath);
  static constexpr int kBytes = bytes_of(kMath);
  static constexpr int kColumns = 128 / kBytes;  // of 8 chunks
  using Values = Sum[kCount];

  __device__ __forceinline__ static void widen(const ptx::Chunk& chunk, Values& values) {
    if constexpr (sizeof(Memory) == 2) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2)
        ptx::unpack<Memory>(chunk.words[i / 2], values[i], values[i + 1]);
    } else {
      memcpy(values, &chunk, sizeof chunk);
    }
  }

  __device__ __forceinline__ static ptx::Chunk rounded(const Values& values) {
    ptx::Chunk chunk;
    if constexpr (sizeof(Memory) == 2) {
#pragma unroll
      for (int i = 0; i < kCount; i += 2)
        chunk.words[i / 2] = ptx::pack<Memory>(values[i], values[i + 1]);
    } else {
      memcpy(&chunk, values, sizeof chunk);
    }
    return chunk;
  }

  __device__ __forceinline__ static void load(const void* from, Values& values) {
    widen(ptx::load_chunk(from), values);
  }

  // Values of type Sum.
  __device__ __forceinline__ static void load_sums(const Sum* from, Values& values) {
#pragma unroll
    for (int i = 0; i < kCount; i += 16 / int(sizeof(Sum))) {
      const ptx::Chunk chunk = ptx::load_chunk(from + i);
      memcpy(values + i, &chunk, sizeof chunk);
    }
  }
};

template <class Sum>
__device__ __forceinline__ Sum relu(Sum value) {
  return value < Sum(0) ? Sum(0) : value;  // a NaN stays
}

}  // namespace aspp::cuda::sm80
