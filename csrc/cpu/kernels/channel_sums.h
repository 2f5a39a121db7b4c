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

}  // namespace aspp::ASPP_ISA
