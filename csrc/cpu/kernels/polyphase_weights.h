// SPDX-License-Identifier: BSD-3-Clause
// The taps of a dense weight combined into the matrices of minimal filtering, and the gradients of
// such matrices gathered back into the taps': the transpose of the same map.
#pragma once

#include "gemm.h"
#include "polyphase_params.h"

namespace aspp::ASPP_ISA {

// Tap t of an axis in the order first, centre, last; null where a 1-tap kernel has none.
template <typename T>
class TapGrid {
 public:
  TapGrid(const MinimalWeights& w, ptrdiff_t c) : w_(w), c_(c) {}
  ptrdiff_t offset(ptrdiff_t i, ptrdiff_t j) const {
    const ptrdiff_t y = index(i, w_.kernel_h), x = index(j, w_.kernel_w);
    return y < 0 || x < 0 ? -1 : (y * w_.kernel_w + x) * w_.tap_stride + c_ * w_.row_stride;
  }

 private:
  ptrdiff_t index(ptrdiff_t t, ptrdiff_t kernel) const {
    if (kernel == 1) return t == 1 ? 0 : -1;
    return w_.flipped ? 2 - t : t;
  }
  const MinimalWeights& w_;
  const ptrdiff_t c_;
};

// Channels [first, last) of one panel of every matrix.
template <typename T>
void combine_panel(const MinimalWeights& w, ptrdiff_t panel, ptrdiff_t first, ptrdiff_t last,
                   T* to) {
  constexpr int n = kLanes<T>;
  const ptrdiff_t matrix = w.channels * padded(w.out_channels);
  const ptrdiff_t width = panel_width(w.out_channels, panel);
  const T* taps = static_cast<const T*>(w.taps) + panel * kPanel;
  T* const panel_of_first = to + panel * kPanel * w.channels;
  for (ptrdiff_t c = first; c < last; ++c) {
    const TapGrid<T> grid(w, c);
    for (ptrdiff_t o = 0; o < width; o += n) {
      Vec<T> tap[3][3];
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) {
          const ptrdiff_t at = grid.offset(i, j);
          tap[i][j] = at < 0 ? Vec<T>{} : load(taps + at + o);
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
          store(panel_of_first + (u * w.column_count + v) * matrix + c * width + o,
                row[0] * broadcast(T(b[0])) + row[1] * broadcast(T(b[1])) +
                    row[2] * broadcast(T(b[2])));
        }
      }
    }
  }
}

}  // namespace aspp::ASPP_ISA
