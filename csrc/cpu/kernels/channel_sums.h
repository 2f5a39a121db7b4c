// SPDX-License-Identifier: BSD-3-Clause
// Sums over pixels of each channel, as a batch norm needs them: of values, of squared differences,
// and of products with differences. In double, so that constant stretches, whose roundings are all
// alike, lose nothing.
#pragma once

#include "energies.h"

namespace aspp::ASPP_ISA {

// Of rows a, b [pixels, channels], added to sums [channels] and products [channels]: without a
// centre the sums of a; without b the products (a - centre)^2; else those of a and a * (b -
// centre).
template <typename T>
void add_channel_sums(const T* a, const T* b, const double* centre, int64_t pixels,
                      int64_t channels, double* sums, double* products) {
  constexpr int64_t n = kLanes<double>;
  const int64_t whole = channels / n * n;
  for (int64_t p = 0; p < pixels; ++p, a += channels, b += b == nullptr ? 0 : channels) {
    for (int64_t c = 0; c < whole; c += n) {
      const Vec<double> value = widened(a + c);
      if (centre == nullptr || b != nullptr) store(sums + c, load(sums + c) + value);
      if (centre == nullptr) continue;
      const Vec<double> off = (b == nullptr ? value : widened(b + c)) - load(centre + c);
      store(products + c, load(products + c) + (b == nullptr ? off : value) * off);
    }
    for (int64_t c = whole; c < channels; ++c) {
      const double value = a[c];
      if (centre == nullptr || b != nullptr) sums[c] += value;
      if (centre == nullptr) continue;
      const double off = (b == nullptr ? value : double(b[c])) - centre[c];
      products[c] += (b == nullptr ? off : value) * off;
    }
  }
}

// to = (a - offset - (b - centre) * slope) * scale
template <typename T>
void write_channel_affine(const T* a, const T* b, const T* centre, const T* slope, const T* offset,
                          const T* scale, int64_t pixels, int64_t channels, T* to) {
  const int64_t whole = channels / kLanes<T> * kLanes<T>;
  for (int64_t p = 0; p < pixels; ++p, a += channels, b += channels, to += channels) {
    for (int64_t c = 0; c < whole; c += kLanes<T>) {
      const Vec<T> through = (load(b + c) - load(centre + c)) * load(slope + c);
      store(to + c, (load(a + c) - load(offset + c) - through) * load(scale + c));
    }
    for (int64_t c = whole; c < channels; ++c)
      to[c] = (a[c] - offset[c] - (b[c] - centre[c]) * slope[c]) * scale[c];
  }
}

}  // namespace aspp::ASPP_ISA
