// SPDX-License-Identifier: BSD-3-Clause
// Between a tensor in any memory format and dtype, and rows of pixels [pixel, channel] in the
// compute type T. NCHW goes through in-register transposes, so the conversion costs one read.
#pragma once

#include "params.h"
#include "vector.h"

namespace aspp::ASPP_ISA {

template <typename S>
struct Plane {  // one image of a tensor; strides in elements
  S* data;
  ptrdiff_t c_stride, y_stride, x_stride;
};

template <typename F>
inline void with_storage(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(static_cast<float*>(nullptr));
    case Dtype::kFloat64: return body(static_cast<double*>(nullptr));
    case Dtype::kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case Dtype::kFloat16: return body(static_cast<Half*>(nullptr));
  }
}

// A float kernel never meets double storage, nor the reverse.
template <typename T, typename S>
inline constexpr bool kMatches = (sizeof(T) == 8) == (sizeof(S) == 8);

template <typename S>
inline Plane<S> plane_of(const Image& image, int64_t n, int64_t channel) {
  return {static_cast<S*>(image.data) + n * image.n_stride + channel * image.c_stride,
          image.c_stride, image.y_stride, image.x_stride};
}

// Pixels [x0, x1) of row y, channels [0, channels) of `src` -> dst[(x - x0) * stride + c] in D,
// which is T or narrower. Channels up to `width` (whole vectors, <= stride) are written; those past
// `channels` are zero.
template <typename T, typename S, typename D>
void load_row(const Plane<S>& src, ptrdiff_t y, ptrdiff_t x0, ptrdiff_t x1, ptrdiff_t channels,
              ptrdiff_t width, D* dst, ptrdiff_t stride) {
  constexpr int n = kLanes<T>;
  const S* row = src.data + y * src.y_stride;
  const ptrdiff_t whole = channels / n * n;
  if (src.c_stride == 1) {
    for (ptrdiff_t x = x0; x < x1; ++x, dst += stride) {
      const S* pixel = row + x * src.x_stride;
      for (ptrdiff_t c = 0; c < whole; c += n) store_as<T>(dst + c, load_as<T>(pixel + c));
      for (ptrdiff_t c = whole; c < width; ++c) {
        convert(c < channels ? to_float(pixel[c]) : T(0), dst[c]);
      }
    }
    return;
  }
  if (src.x_stride == 1 && x1 - x0 >= n) {
    for (ptrdiff_t c = 0; c < whole; c += n) {
      const S* block = row + c * src.c_stride;
      for (ptrdiff_t x = x0; x < x1; x += n) {
        const ptrdiff_t start = x + n <= x1 ? x : x1 - n;  // the last block overlaps its neighbour
        Vec<T> v[n];
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) v[i] = load_as<T>(block + i * src.c_stride + start);
        transpose<T>(v);
        D* to = dst + (start - x0) * stride + c;
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store_as<T>(to + i * stride, v[i]);
      }
    }
  } else {
    for (ptrdiff_t c = 0; c < whole; ++c) {
      const S* line = row + c * src.c_stride;
      for (ptrdiff_t x = x0; x < x1; ++x) {
        convert(to_float(line[x * src.x_stride]), dst[(x - x0) * stride + c]);
      }
    }
  }
  for (ptrdiff_t c = whole; c < channels; ++c) {
    const S* line = row + c * src.c_stride;
    for (ptrdiff_t x = x0; x < x1; ++x) {
      convert(to_float(line[x * src.x_stride]), dst[(x - x0) * stride + c]);
    }
  }
  for (ptrdiff_t c = channels; c < width; ++c) {
    for (ptrdiff_t x = x0; x < x1; ++x) convert(T(0), dst[(x - x0) * stride + c]);
  }
}

// Adds pixels [x0, x1) of row y, whose channels have stride 1, to rows of results.
template <typename T>
void add_row(const Plane<T>& plane, ptrdiff_t y, ptrdiff_t x0, ptrdiff_t x1, ptrdiff_t channels,
             T* rows, ptrdiff_t stride) {
  for (ptrdiff_t x = x0; x < x1; ++x, rows += stride) {
    const T* there = plane.data + y * plane.y_stride + x * plane.x_stride;
    ptrdiff_t c = 0;
    for (; c + kLanes<T> <= channels; c += kLanes<T>)
      store(rows + c, load(there + c) + load(rows + c));
    for (; c < channels; ++c) rows[c] += there[c];
  }
}

// The reverse of load_row for whole rows of results: src[(x - x0) * stride + c] -> pixels of row y.
template <typename T, typename S>
void store_row(const T* src, ptrdiff_t stride, ptrdiff_t channels, const Plane<S>& dst, ptrdiff_t y,
               ptrdiff_t x0, ptrdiff_t x1) {
  constexpr int n = kLanes<T>;
  S* row = dst.data + y * dst.y_stride;
  const ptrdiff_t whole = channels / n * n;
  if (dst.c_stride == 1) {
    for (ptrdiff_t x = x0; x < x1; ++x, src += stride) {
      S* pixel = row + x * dst.x_stride;
      for (ptrdiff_t c = 0; c < whole; c += n) store_as<T>(pixel + c, load(src + c));
      for (ptrdiff_t c = whole; c < channels; ++c) convert(src[c], pixel[c]);
    }
    return;
  }
  ptrdiff_t transposed = 0;  // channels done by vectors
  if (dst.x_stride == 1 && x1 - x0 >= n) {
    for (ptrdiff_t c = 0; c < whole; c += n) {
      for (ptrdiff_t x = x0; x < x1; x += n) {
        const ptrdiff_t start = x + n <= x1 ? x : x1 - n;
        Vec<T> v[n];
        const T* from = src + (start - x0) * stride + c;
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) v[i] = load(from + i * stride);
        transpose<T>(v);
        S* block = row + c * dst.c_stride + start;
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store_as<T>(block + i * dst.c_stride, v[i]);
      }
    }
    transposed = whole;
  }
  for (ptrdiff_t c = transposed; c < channels; ++c) {
    S* line = row + c * dst.c_stride;
    for (ptrdiff_t x = x0; x < x1; ++x) convert(src[(x - x0) * stride + c], line[x * dst.x_stride]);
  }
}

}  // namespace aspp::ASPP_ISA
