// SPDX-License-Identifier: BSD-3-Clause
// C[i, j] (+)= sum_k A[i, k] * B[k, j] on operands that lie in cache. A is read by broadcast through
// free strides, so pixels, transposes and K-major weights are all just addresses; B and C rows are
// contiguous in j and padded to whole vectors, so no lane is ever masked.
#pragma once

#include "vector.h"

namespace aspp::ASPP_ISA {

template <typename T>
struct Gemm {
  const T* a;
  ptrdiff_t a_i, a_k;
  const T* b;
  ptrdiff_t b_k;
  T* c;
  ptrdiff_t c_i;
  ptrdiff_t m, n, k;  // n is a multiple of the vector's lanes
  bool accumulate;
};

template <typename T, int kRows, int kVectors>
__attribute__((noinline)) void tile(const Gemm<T>& g, const T* a, const T* b, T* c) {
  constexpr int n = kLanes<T>;
  const ptrdiff_t a_i = g.a_i, a_k = g.a_k, b_k = g.b_k, k_count = g.k;
  Vec<T> acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      acc[i][j] = g.accumulate ? load(c + i * g.c_i + j * n) : Vec<T>{};
    }
  }
  for (ptrdiff_t k = 0; k < k_count; ++k) {
    Vec<T> right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + j * n);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> left = broadcast(a[i * a_i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] += left * right[j];
    }
    a += a_k;
    b += b_k;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(c + i * g.c_i + j * n, acc[i][j]);
  }
}

template <typename T, int kVectors, int kRows>
inline void row_tail(const Gemm<T>& g, ptrdiff_t rows, const T* a, const T* b, T* c) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      tile<T, kRows, kVectors>(g, a, b, c);
    } else {
      row_tail<T, kVectors, kRows - 1>(g, rows, a, b, c);
    }
  }
}

template <typename T, int kVectors>
inline void column_panel(const Gemm<T>& g, ptrdiff_t j) {
  ptrdiff_t i = 0;
  for (; i + kTileRows <= g.m; i += kTileRows) {
    tile<T, kTileRows, kVectors>(g, g.a + i * g.a_i, g.b + j, g.c + i * g.c_i + j);
  }
  row_tail<T, kVectors, kTileRows - 1>(g, g.m - i, g.a + i * g.a_i, g.b + j, g.c + i * g.c_i + j);
}

// Panels of B outermost: a panel of up to 128 rows stays in the first-level cache while A streams.
template <typename T>
inline void gemm(const Gemm<T>& g) {
  constexpr int n = kLanes<T>;
  ptrdiff_t j = 0;
  for (; j + kTileVectors * n <= g.n; j += kTileVectors * n) column_panel<T, kTileVectors>(g, j);
  if constexpr (kTileVectors == 4) {
    if (j + 2 * n <= g.n) {
      column_panel<T, 2>(g, j);
      j += 2 * n;
    }
  }
  if (j < g.n) column_panel<T, 1>(g, j);
}

}  // namespace aspp::ASPP_ISA
