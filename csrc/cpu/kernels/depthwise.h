// SPDX-License-Identifier: BSD-3-Clause
// Depthwise convolution of rows of pixels, padding-free: a row is cut where the set of live taps
// changes, and inside a piece every tap is a plain load. Taps form a grid (live rows x live
// columns).
#pragma once

#include "vector.h"

namespace aspp::ASPP_ISA {

inline constexpr int kMaxTaps = 64;  // of one axis; kMaxKernel in the binding keeps kernels below

// Taps i of an odd kernel with lo <= position + (i - kernel / 2) * rate < hi.
struct LiveTaps {
  ptrdiff_t first, count;
};
inline LiveTaps live_taps(ptrdiff_t position, ptrdiff_t kernel, ptrdiff_t rate, ptrdiff_t size) {
  const ptrdiff_t half = kernel / 2;
  const ptrdiff_t before = position / rate < half ? position / rate : half;
  const ptrdiff_t room = (size - 1 - position) / rate;
  const ptrdiff_t after = room < half ? room : half;
  return {half - before, before + after + 1};
}

// One past the last position, at most `end`, that has the same live taps as `position`.
inline ptrdiff_t same_taps_until(ptrdiff_t position, ptrdiff_t end, ptrdiff_t kernel,
                                 ptrdiff_t rate, ptrdiff_t size) {
  const ptrdiff_t half = kernel / 2;
  ptrdiff_t until = end;
  const ptrdiff_t before = position / rate;
  if (before < half && (before + 1) * rate < until) until = (before + 1) * rate;
  const ptrdiff_t room = (size - 1 - position) / rate;
  const ptrdiff_t after = room < half ? room : half;
  if (after > 0 && size - after * rate < until) until = size - after * rate;
  return until;
}

// S stores the pixels (T, or bfloat16 where products are bfloat16); T is what is computed in.
template <typename T, typename S>
struct Piece {                          // one run of pixels with the same live taps
  const S* const* rows;                 // [row_taps] pixel x = 0 of each live row
  const ptrdiff_t* columns;             // [column_taps] element offset of each live column
  const T* weights;                     // weight of the first live tap
  ptrdiff_t weight_row, weight_column;  // element steps from tap to tap
  ptrdiff_t pixel_stride;               // of the rows
  ptrdiff_t count;
  const T* scale;  // between, or null
  const T* shift;
  bool relu;
  bool accumulate;
  S* out;
  ptrdiff_t out_stride;
};

template <typename T, bool kBetween>
inline Vec<T> finish(Vec<T> v, Vec<T> scale, Vec<T> shift, bool relu) {
  if constexpr (kBetween) {
    v = v * scale + shift;
    if (relu) v = at_least<T>(v, Vec<T>{});
  }
  return v;
}

// Channels [c, c + lanes) of the piece, with the weights of the tap grid in registers.
template <int kRows, int kColumns, bool kBetween, typename T, typename S>
inline void run_grid(const Piece<T, S>& p, ptrdiff_t c) {
  Vec<T> w[kRows][kColumns];
  const S* row[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    row[i] = p.rows[i] + c;
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      w[i][j] = load(p.weights + i * p.weight_row + j * p.weight_column + c);
    }
  }
  ptrdiff_t column[kColumns];
  for (int j = 0; j < kColumns; ++j) column[j] = p.columns[j];
  const Vec<T> scale = kBetween ? load(p.scale + c) : Vec<T>{};
  const Vec<T> shift = kBetween ? load(p.shift + c) : Vec<T>{};
  S* out = p.out + c;
  for (ptrdiff_t x = 0; x < p.count; ++x) {
    Vec<T> acc = p.accumulate ? load_as<T>(out) : Vec<T>{};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) acc += w[i][j] * load_as<T>(row[i] + column[j]);
      row[i] += p.pixel_stride;
    }
    store_as<T>(out, finish<T, kBetween>(acc, scale, shift, p.relu));
    out += p.out_stride;
  }
}

template <bool kBetween, typename T, typename S>
inline void run_any(const Piece<T, S>& p, ptrdiff_t c, ptrdiff_t row_taps, ptrdiff_t column_taps) {
  const Vec<T> scale = kBetween ? load(p.scale + c) : Vec<T>{};
  const Vec<T> shift = kBetween ? load(p.shift + c) : Vec<T>{};
  for (ptrdiff_t x = 0; x < p.count; ++x) {
    S* out = p.out + x * p.out_stride + c;
    Vec<T> acc = p.accumulate ? load_as<T>(out) : Vec<T>{};
    for (ptrdiff_t i = 0; i < row_taps; ++i) {
      for (ptrdiff_t j = 0; j < column_taps; ++j) {
        acc += load(p.weights + i * p.weight_row + j * p.weight_column + c) *
               load_as<T>(p.rows[i] + x * p.pixel_stride + p.columns[j] + c);
      }
    }
    store_as<T>(out, finish<T, kBetween>(acc, scale, shift, p.relu));
  }
}

template <bool kBetween, typename T, typename S>
void run_piece(const Piece<T, S>& p, ptrdiff_t channels, ptrdiff_t row_taps,
               ptrdiff_t column_taps) {
  const ptrdiff_t grid = row_taps <= 3 && column_taps <= 3 ? row_taps * 4 + column_taps : 0;
  for (ptrdiff_t c = 0; c < channels; c += kLanes<T>) {
    switch (grid) {
      case 1 * 4 + 1: run_grid<1, 1, kBetween>(p, c); break;
      case 1 * 4 + 2: run_grid<1, 2, kBetween>(p, c); break;
      case 1 * 4 + 3: run_grid<1, 3, kBetween>(p, c); break;
      case 2 * 4 + 1: run_grid<2, 1, kBetween>(p, c); break;
      case 2 * 4 + 2: run_grid<2, 2, kBetween>(p, c); break;
      case 2 * 4 + 3: run_grid<2, 3, kBetween>(p, c); break;
      case 3 * 4 + 1: run_grid<3, 1, kBetween>(p, c); break;
      case 3 * 4 + 2: run_grid<3, 2, kBetween>(p, c); break;
      case 3 * 4 + 3: run_grid<3, 3, kBetween>(p, c); break;
      default: run_any<kBetween>(p, c, row_taps, column_taps); break;
    }
  }
}

// A depthwise convolution over rows that the caller has laid out as pixels.
template <typename T>
struct DepthwiseRows {
  const T* weights;  // [kh * kw, weight_stride], channel 0 of the block
  ptrdiff_t weight_stride;
  ptrdiff_t kernel_h, kernel_w, rate_h, rate_w;
  ptrdiff_t height, width;
  bool flipped;        // use tap (kh - 1 - i, kw - 1 - j): the gradient of the input
  ptrdiff_t channels;  // whole vectors
  ptrdiff_t pixel_stride;
  const T* scale;
  const T* shift;
  bool relu;
  bool accumulate;
};

// Pixels [x0, x1) of row y -> out[(x - x0) * out_stride + c]. `row_of(y)` is pixel x = 0 of row y.
template <typename T, typename S, typename RowOf>
inline void depthwise_row(const DepthwiseRows<T>& d, ptrdiff_t y, ptrdiff_t x0, ptrdiff_t x1,
                          const RowOf& row_of, S* out, ptrdiff_t out_stride) {
  const LiveTaps vertical = live_taps(y, d.kernel_h, d.rate_h, d.height);
  const S* rows[kMaxTaps];
  for (ptrdiff_t i = 0; i < vertical.count; ++i) {
    rows[i] = row_of(y + (vertical.first + i - d.kernel_h / 2) * d.rate_h);
  }
  for (ptrdiff_t x = x0; x < x1;) {
    const LiveTaps across = live_taps(x, d.kernel_w, d.rate_w, d.width);
    const ptrdiff_t until = same_taps_until(x, x1, d.kernel_w, d.rate_w, d.width);
    ptrdiff_t columns[kMaxTaps];
    for (ptrdiff_t j = 0; j < across.count; ++j) {
      columns[j] = (x + (across.first + j - d.kernel_w / 2) * d.rate_w) * d.pixel_stride;
    }
    const ptrdiff_t tap = vertical.first * d.kernel_w + across.first;
    const ptrdiff_t first = d.flipped ? d.kernel_h * d.kernel_w - 1 - tap : tap;
    const ptrdiff_t step = d.flipped ? -d.weight_stride : d.weight_stride;
    const Piece<T, S> piece{rows,
                            columns,
                            d.weights + first * d.weight_stride,
                            d.kernel_w * step,
                            step,
                            d.pixel_stride,
                            until - x,
                            d.scale,
                            d.shift,
                            d.relu,
                            d.accumulate,
                            out + (x - x0) * out_stride,
                            out_stride};
    if (d.scale != nullptr) {
      run_piece<true>(piece, d.channels, vertical.count, across.count);
    } else {
      run_piece<false>(piece, d.channels, vertical.count, across.count);
    }
    x = until;
  }
}

}  // namespace aspp::ASPP_ISA
