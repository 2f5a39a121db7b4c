// SPDX-License-Identifier: BSD-3-Clause
// Global memory, and shared memory 16 bytes at a time. Kernels read and write operands, results and
// what is between by these alone, so that the emulation knows what has been written.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(ASPP_EMULATE)
#include "../emulation/unwritten.h"
#endif

namespace aspp::cuda::ptx {

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Element `index` of memory that holds elements of type T.
template <class T>
__device__ __forceinline__ T load(const void* memory, int64_t index) {
  const T* const p = static_cast<const T*>(memory) + index;
#if defined(ASPP_EMULATE)
  emulation::check_written(p, sizeof(T), "load");
#endif
  return *p;
}
template <class T>
__device__ __forceinline__ void store(void* memory, int64_t index, std::type_identity_t<T> value) {
  T* const p = static_cast<T*>(memory) + index;
#if defined(ASPP_EMULATE)
  emulation::note_written(p, sizeof(T));
#endif
  *p = value;
}

// `p` is a multiple of 16 bytes.
__device__ __forceinline__ Chunk load_chunk(const void* p) {
#if defined(ASPP_EMULATE)
  emulation::check_aligned(p, sizeof(Chunk), "load_chunk");
  emulation::check_written(p, sizeof(Chunk), "load_chunk");
  return *static_cast<const Chunk*>(p);
#else
  const uint4 v = *static_cast<const uint4*>(p);
  return {v.x, v.y, v.z, v.w};
#endif
}
__device__ __forceinline__ void store_chunk(void* p, const Chunk& chunk) {
#if defined(ASPP_EMULATE)
  emulation::check_aligned(p, sizeof(Chunk), "store_chunk");
  emulation::note_written(p, sizeof(Chunk));
  *static_cast<Chunk*>(p) = chunk;
#else
  *static_cast<uint4*>(p) =
      make_uint4(chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]);
#endif
}

// The compiler forgets how `value`, of 4 or 8 bytes, was made: it keeps it in a register and does
// not work it out again wherever it is used.
template <class T>
__device__ __forceinline__ void keep([[maybe_unused]] T& value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#if !defined(ASPP_EMULATE)
  if constexpr (sizeof(T) == 4)
    asm volatile("" : "+r"(value));
  else
    asm volatile("" : "+l"(value));
#endif
}

// Before an atomic: whoever reads that atomic's result sees what this thread wrote, and what it saw
// at its last barrier. After one: this thread sees what came before the atomics it read. No barrier
// may come between fence and atomic.
__device__ __forceinline__ void fence_device() { __threadfence(); }

// Returns the value before. Orders nothing by itself.
__device__ __forceinline__ uint32_t atomic_increment(uint32_t* counter) {
  return atomicAdd(counter, 1u);
}

// Past L1, which does not see other blocks' writes. T has 4, 8 or 16 bytes and is aligned to them.
template <class T>
__device__ __forceinline__ T load_volatile(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  static_assert(std::is_trivially_copyable_v<T>);
#if defined(ASPP_EMULATE)
  emulation::check_aligned(p, sizeof(T), "load_volatile");
  emulation::check_written(p, sizeof(T), "load_volatile");
  return *p;
#else
  T result;
  if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    memcpy(&result, &v, sizeof v);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t v;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    memcpy(&result, &v, sizeof v);
  } else {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    memcpy(&result, &v, sizeof v);
  }
  return result;
#endif
}

}  // namespace aspp::cuda::ptx
