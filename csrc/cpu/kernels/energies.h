// SPDX-License-Identifier: BSD-3-Clause
// Energies of pixels: sums of squares over channels. In double, so that no square of a float is
// lost or infinite, and the order of the sum, which differs between memory formats, is of no
// import.
#pragma once

#include "pixels.h"

namespace aspp::ASPP_ISA {

template <typename T>
inline constexpr int kHalf = kLanes<T> * int(sizeof(T)) / int(sizeof(double));  // lanes of double

// Lanes `first` and following of some values, as doubles.
template <typename T>
inline Vec<double> widened(const T* values) {
  typedef T Part __attribute__((vector_size(kHalf<T> * sizeof(T)), aligned(alignof(T)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Part*>(values), Vec<double>);
}

// Of what is not zero not zero either: the squares of small doubles would be.
inline Vec<double> square_of(Vec<double> v) {
  constexpr double kLeast = 0x1p-1022;
  const Vec<double> least = broadcast(kLeast);
  return v * v + (v != 0 ? least : Vec<double>{});
}

// to[i] += values[i]^2 for a vector of T.
template <typename T, typename S>
inline void add_squares(const S* values, double* to) {
  T block[kLanes<T>];
  store(block, load_as<T>(values));
  for (int i = 0; i < kLanes<T>; i += kHalf<T>) {
    store(to + i, load(to + i) + square_of(widened(block + i)));
  }
}

template <typename S>
inline double square_of(S value) {
  const double v = to_float(value);
  return v * v + (v != 0 ? 0x1p-1022 : 0);
}

// Of pixels [0, count) of a line, their channels [0, channels) -> to[count].
template <typename T, typename S>
void line_energies(const Plane<S>& line, ptrdiff_t count, ptrdiff_t channels, double* to) {
  constexpr int n = kLanes<T>;
  for (ptrdiff_t x = 0; x < count; ++x) to[x] = 0;
  if (line.c_stride == 1) {
    for (ptrdiff_t x = 0; x < count; ++x) {
      const S* pixel = line.data + x * line.x_stride;
      double sums[n] = {};
      ptrdiff_t c = 0;
      for (; c + n <= channels; c += n) add_squares<T>(pixel + c, sums);
      for (; c < channels; ++c) to[x] += square_of(pixel[c]);
      for (const double sum : sums) to[x] += sum;
    }
    return;
  }
  for (ptrdiff_t c = 0; c < channels; ++c) {
    const S* values = line.data + c * line.c_stride;
    ptrdiff_t x = 0;
    if (line.x_stride == 1) {
      for (; x + n <= count; x += n) add_squares<T>(values + x, to + x);
    }
    for (; x < count; ++x) to[x] += square_of(values[x * line.x_stride]);
  }
}

// Of rows [first, last) of image n -> to[(last - first) * width]
template <typename T, typename S>
void plane_energies(const Image& image, ptrdiff_t n, ptrdiff_t channels, ptrdiff_t width,
                    ptrdiff_t first, ptrdiff_t last, double* to) {
  Plane<S> plane = plane_of<S>(image, n, 0);
  plane.data += first * plane.y_stride;
  const bool one_line = plane.y_stride == width * plane.x_stride;
  const ptrdiff_t length = one_line ? (last - first) * width : width;
  for (ptrdiff_t y = first; y < last; y += one_line ? last - first : 1) {
    line_energies<T>(plane, length, channels, to);
    plane.data += plane.y_stride;
    to += length;
  }
}

}  // namespace aspp::ASPP_ISA
