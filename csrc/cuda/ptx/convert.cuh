// SPDX-License-Identifier: BSD-3-Clause
// Between memory's formats and the float32 (or float64) that sums are in. To nearest, ties to even;
// every NaN becomes the one that PTX writes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#if defined(ASPP_EMULATE)
#include "../emulation/numbers.h"
#endif

namespace aspp::cuda::ptx {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ double to_float(double value) { return value; }

__device__ __forceinline__ float to_float(Bf16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}

__device__ __forceinline__ float to_float(F16 value) {
#if defined(ASPP_EMULATE)
  return emulation::half_to_float(value.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#endif
}

// from_float<T>(float) for every T, from_float<double>(double).
template <class T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, Bf16>) {
#if defined(ASPP_EMULATE)
    return {emulation::float_to_bfloat16(value)};
#else
    Bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#endif
  } else if constexpr (std::is_same_v<T, F16>) {
#if defined(ASPP_EMULATE)
    return {emulation::float_to_half(value)};
#else
    F16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#endif
  } else {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>);
    return T(value);
  }
}
template <class T, std::enable_if_t<std::is_same_v<T, double>, int> = 0>
__device__ __forceinline__ T from_float(double value) {
  return value;
}

// Two values in a word, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>);
#if defined(ASPP_EMULATE)
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
#else
  uint32_t result;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#endif
}

// The two values of a word.
template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, Bf16>) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    static_assert(std::is_same_v<T, F16>);
    low = to_float(F16{static_cast<uint16_t>(word)});
    high = to_float(F16{static_cast<uint16_t>(word >> 16)});
  }
}

// A float32's bits to the 10 bits of fraction that tensor cores read; ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
#if defined(ASPP_EMULATE)
  return emulation::round_to_tf32(bits);
#else
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(bits)));
  return result;
#endif
}

}  // namespace aspp::cuda::ptx
