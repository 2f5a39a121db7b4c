// SPDX-License-Identifier: BSD-3-Clause
// Vectors as GCC and Clang spell them: one source, compiled once per instruction set.
// Nothing from the standard library is instantiated here: an inline function compiled for AVX-512
// could be the copy the linker keeps for everyone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace aspp::ASPP_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kTileRows = 6;  // 6 x 4 accumulators of 32 registers
inline constexpr int kTileVectors = 4;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kTileRows = 6;  // 6 x 2 of 16
inline constexpr int kTileVectors = 2;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kTileRows = 4;  // 4 x 2 of 16, and of the 32 an Arm core has
inline constexpr int kTileVectors = 2;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VectorOf<T>::type;

inline constexpr int64_t kStretch = 32;  // terms summed in one chain: longer ones lose digits

template <typename T>
inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
// Past the caches, to an address of whole vectors; `flush_streams` before others may read it.
template <typename T>
inline void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  store(p, v);
#endif
}
inline void flush_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
template <typename T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}
// NaN stays NaN, as in torch.relu.
template <typename T>
inline Vec<T> at_least(Vec<T> v, Vec<T> low) {
  return v < low ? low : v;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct BFloat16Pair {  // channels 2k (low) and 2k + 1
  uint32_t bits;
};

inline float to_float(float v) { return v; }
inline double to_float(double v) { return v; }
inline float to_float(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(Half v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16;
  const uint32_t exponent = (v.bits >> 10) & 0x1f, mantissa = v.bits & 0x3ff;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {  // zero and subnormal: mantissa * 2^-24 is exact in float
    const float tiny = float(mantissa) * 0x1p-24f;
    std::memcpy(&bits, &tiny, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

inline void convert(float v, float& out) { out = v; }
inline void convert(double v, double& out) { out = v; }
inline void convert(float v, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = nan ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
inline void convert(float v, Half& out) {
#if defined(__F16C__)
  out.bits = uint16_t(_cvtss_sh(v, 0));
#else
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: round to nearest even on 13 dropped bits
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  } else {  // subnormal: adding 0.5 lets the float unit round at 2^-24
    float f;
    std::memcpy(&f, &magnitude, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000u;
  }
  out.bits = uint16_t(sign | half);
#endif
}

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// One vector of T from storage elements S, and back.
template <typename T, typename S>
inline Vec<T> load_as(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load(reinterpret_cast<const T*>(p));
  } else if constexpr (__is_same(S, BFloat16)) {
    const HalfWords high = *reinterpret_cast<const HalfWords*>(p);
    return reinterpret_cast<Vec<T>>(__builtin_convertvector(high, Words) << 16);
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(S, Half)) {
      return reinterpret_cast<Vec<T>>(
          _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
    }
#elif defined(__AVX2__)
    if constexpr (__is_same(S, Half)) {
      return reinterpret_cast<Vec<T>>(
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
#endif
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = to_float(p[i]);
    return v;
  }
}
template <typename T, typename S>
inline void store_as(S* p, Vec<T> v) {
  if constexpr (sizeof(S) == sizeof(T)) {
    store(reinterpret_cast<T*>(p), v);
  } else if constexpr (__is_same(S, BFloat16)) {
    const Words bits = reinterpret_cast<Words>(v);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = Words{} + 0x7fc0u;
    *reinterpret_cast<HalfWords*>(p) =
        __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, HalfWords);
  } else {
#if defined(__AVX512F__)
    if constexpr (__is_same(S, Half)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                          _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), 0));
      return;
    }
#elif defined(__AVX2__)
    if constexpr (__is_same(S, Half)) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                       _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
      return;
    }
#endif
    for (int i = 0; i < kLanes<T>; ++i) convert(v[i], p[i]);
  }
}

// The perfect shuffle of two vectors: a0 b0 a1 b1 ...; `kHigh` takes the upper halves.
template <typename T, bool kHigh>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  typedef decltype(a < b) Mask;
  constexpr int n = kLanes<T>;
  Mask mask;
  for (int i = 0; i < n; ++i) mask[i] = (kHigh ? n / 2 : 0) + i / 2 + (i % 2) * n;
#if defined(__clang__)
  Vec<T> out;
  for (int i = 0; i < n; ++i) out[i] = mask[i] < n ? a[mask[i]] : b[mask[i] - n];
  return out;
#else
  return __builtin_shuffle(a, b, mask);
#endif
}

// rows[i][j] <-> rows[j][i], in log2(lanes) rounds of perfect shuffles.
template <typename T>
inline void transpose(Vec<T>* rows) {
  constexpr int n = kLanes<T>;
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = interleave<T, false>(rows[i], rows[i + n / 2]);
      next[2 * i + 1] = interleave<T, true>(rows[i], rows[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace aspp::ASPP_ISA
