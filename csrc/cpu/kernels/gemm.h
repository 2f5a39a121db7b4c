// SPDX-License-Identifier: BSD-3-Clause
// C[i, j] (+)= sum_k A[i, k] * B[k, j] on operands that lie in cache. A is read by broadcast
// through free strides, so pixels, transposes and K-major weights are all just addresses; B and C
// rows are contiguous in j and padded to whole vectors, so no lane is ever masked.
#pragma once

#include "vector.h"

namespace aspp::ASPP_ISA {

inline constexpr ptrdiff_t kLine = 64;  // bytes

// E is the operands' element: T itself, or a pair of bfloat16 that counts as one step of k.
template <typename T, typename E = T>
struct Gemm {
  const E* a;
  ptrdiff_t a_i, a_k;
  const E* b;
  ptrdiff_t b_k;
  T* c;
  ptrdiff_t c_i;
  ptrdiff_t m, n, k;  // n is a multiple of the vector's lanes
  bool accumulate;
  // Fetched into the second-level cache meanwhile: the right operand of the product to come. It
  // may lie beyond what is allocated, a prefetch never faults.
  const void* next = nullptr;
  ptrdiff_t next_bytes = 0;
  // Steps of k that are summed up before they meet C: shorter chains lose fewer digits.
  ptrdiff_t chain = PTRDIFF_MAX;
};

template <typename E>
struct Product {  // of plain numbers
  using Left = Vec<E>;
  using Right = Vec<E>;
  static Right right(const E* b) { return load(b); }
  static Left left(const E* a) { return broadcast(*a); }
  static Vec<E> add(Vec<E> acc, Left l, Right r) { return acc + l * r; }
};

#if defined(__AVX512BF16__)
template <>
struct Product<BFloat16Pair> {
  using Left = __m512bh;
  using Right = __m512bh;
  static Right right(const BFloat16Pair* b) {
    return reinterpret_cast<Right>(_mm512_loadu_si512(b));
  }
  static Left left(const BFloat16Pair* a) {
    return reinterpret_cast<Left>(_mm512_set1_epi32(int(a->bits)));
  }
  static Vec<float> add(Vec<float> acc, Left l, Right r) {
    return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), l, r));
  }
};
#endif

template <typename T, typename E, int kRows, int kVectors>
__attribute__((noinline)) void tile(const Gemm<T, E>& g, const E* a, const E* b, T* c,
                                    const char* ahead) {
  using P = Product<E>;
  constexpr int n = kLanes<T>;
  const ptrdiff_t a_i = g.a_i, a_k = g.a_k, b_k = g.b_k;
  // Sums start at zero and meet C at the end: long sums are added in blocks, which keeps them
  // accurate, and C has the whole product's time to arrive.
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = Vec<T>{};
      __builtin_prefetch(c + i * g.c_i + j * n, 1);
    }
  }
  bool accumulate = g.accumulate;
  for (ptrdiff_t rest = g.k; rest > 0; rest -= g.chain) {
    for (ptrdiff_t k = rest < g.chain ? rest : g.chain; k > 0; --k) {
      typename P::Right right[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) right[j] = P::right(b + j * n);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const typename P::Left left = P::left(a + i * a_i);
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) acc[i][j] = P::add(acc[i][j], left, right[j]);
      }
      __builtin_prefetch(ahead, 0, 2);
      ahead += kLine;
      a += a_k;
      b += b_k;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        T* at = c + i * g.c_i + j * n;
        store(at, accumulate ? load(at) + acc[i][j] : acc[i][j]);
        acc[i][j] = Vec<T>{};
      }
    }
    accumulate = true;
  }
}

template <int kVectors, int kRows, typename T, typename E>
inline void rows_of(const Gemm<T, E>& g, ptrdiff_t rows, const E* a, const E* b, T* c,
                    const char* ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      tile<T, E, kRows, kVectors>(g, a, b, c, ahead);
    } else {
      rows_of<kVectors, kRows - 1>(g, rows, a, b, c, ahead);
    }
  }
}

// Tiles of nearly equal height: 33 rows are 3 of 6 and 3 of 5, since one of 3 would wait for its
// own sums and take almost as long as one of 6.
template <int kVectors, typename T, typename E>
inline void column_panel(const Gemm<T, E>& g, ptrdiff_t j) {
  const ptrdiff_t tiles = (g.m + kTileRows - 1) / kTileRows;
  for (ptrdiff_t t = 0, i = 0; t < tiles; ++t) {
    const ptrdiff_t rows = (g.m - i + tiles - t - 1) / (tiles - t);
    // A tile fetches a line in each step of k; when all have been, what is here already.
    const bool more = t * g.k * kLine < g.next_bytes;
    const void* ahead = more ? g.next : g.b;
    rows_of<kVectors, kTileRows>(g, rows, g.a + i * g.a_i, g.b + j, g.c + i * g.c_i + j,
                                 static_cast<const char*>(ahead) + (more ? t * g.k * kLine : 0));
    i += rows;
  }
}

// Panels of B outermost: a panel of up to 128 rows stays in the first-level cache while A streams.
template <typename T, typename E>
inline void gemm(const Gemm<T, E>& g) {
  constexpr int n = kLanes<T>;
  ptrdiff_t j = 0;
  for (; j + kTileVectors * n <= g.n; j += kTileVectors * n) column_panel<kTileVectors>(g, j);
  if constexpr (kTileVectors == 4) {
    if (j + 2 * n <= g.n) {
      column_panel<2>(g, j);
      j += 2 * n;
    }
  }
  if (j < g.n) column_panel<1>(g, j);
}

}  // namespace aspp::ASPP_ISA
