// SPDX-License-Identifier: BSD-3-Clause
// The taps of a dense weight combined into the matrices of minimal filtering.
#pragma once

#include "gemm.h"
#include "polyphase_params.h"

namespace aspp::ASPP_ISA {

// The kernel's tap for the pair (i, j) of first, centre and last taps, or -1: a 1-tap axis has but
// the centre.
inline ptrdiff_t tap_index(const MinimalWeights& w, ptrdiff_t i, ptrdiff_t j) {
  if ((w.kernel_h == 1 && i != 1) || (w.kernel_w == 1 && j != 1)) return -1;
  const ptrdiff_t y = w.kernel_h == 1 ? 0 : w.flipped ? 2 - i : i;
  const ptrdiff_t x = w.kernel_w == 1 ? 0 : w.flipped ? 2 - j : j;
  return y * w.kernel_w + x;
}

// Output channels o, o + 1, ... of one tap and input channel.
template <typename T>
inline Vec<T> load_columns(const MinimalWeights& w, const T* row, ptrdiff_t o) {
  if (w.column_stride == 1) return load(row + o);
  Vec<T> v{};
  const ptrdiff_t left = w.out_channels - o;
  row += o * w.column_stride;
  if (left >= kLanes<T>) {
    for (int l = 0; l < kLanes<T>; ++l) v[l] = row[l * w.column_stride];
  } else {
    for (int l = 0; l < left; ++l) v[l] = row[l * w.column_stride];
  }
  return v;
}

// Channels [first, last) of one panel of every matrix.
template <typename T>
void combine_panel(const MinimalWeights& w, ptrdiff_t panel, ptrdiff_t first, ptrdiff_t last,
                   T* to) {
  constexpr int n = kLanes<T>;
  const ptrdiff_t matrix = w.channels * padded(w.out_channels);
  const ptrdiff_t width = panel_width(w.out_channels, panel);
  const ptrdiff_t first_o = panel * kPanel;
  const T* taps = static_cast<const T*>(w.taps);
  T* const panel_of_first = to + panel * kPanel * w.channels;
  for (ptrdiff_t c = first; c < last; ++c) {
    const T* taps_of_c = taps + c * w.row_stride;
    for (ptrdiff_t o = 0; o < width; o += n) {
      Vec<T> tap[3][3];
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          const ptrdiff_t t = tap_index(w, i, j);
          tap[i][j] = t < 0 ? Vec<T>{} : load_columns(w, taps_of_c + t * w.tap_stride, first_o + o);
        }
      }
      for (ptrdiff_t u = 0; u < w.row_count; ++u) {
        const double* a = w.row_weights + 3 * u;
        Vec<T> row[3];
        for (int j = 0; j < 3; ++j) {
          row[j] = tap[0][j] * broadcast(T(a[0])) + tap[1][j] * broadcast(T(a[1])) +
                   tap[2][j] * broadcast(T(a[2]));
        }
        for (ptrdiff_t v = 0; v < w.column_count; ++v) {
          const double* b = w.column_weights + 3 * v;
          stream(panel_of_first + (u * w.column_count + v) * matrix + c * width + o,
                 row[0] * broadcast(T(b[0])) + row[1] * broadcast(T(b[1])) +
                     row[2] * broadcast(T(b[2])));
        }
      }
    }
  }
  flush_streams();
}

}  // namespace aspp::ASPP_ISA
