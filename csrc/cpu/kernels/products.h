// SPDX-License-Identifier: BSD-3-Clause
// From lines of pixels to the products of minimal filtering: each product combines a few lines of
// the image, then a few columns of the result, and becomes one row of a GEMM.
#pragma once

#include <type_traits>

#include "pixels.h"
#include "polyphase_params.h"

namespace aspp::ASPP_ISA {

// to[0 .. length) = sum of kTerms lines; length is whole vectors.
template <int kTerms, typename T>
inline void add_up_some(const T* const* lines, const T* coefficients, ptrdiff_t length, T* to) {
  Vec<T> c[kTerms];
#pragma GCC unroll 4
  for (int k = 0; k < kTerms; ++k) c[k] = broadcast(coefficients[k]);
  for (ptrdiff_t i = 0; i < length; i += kLanes<T>) {
    Vec<T> sum = load(lines[0] + i) * c[0];
#pragma GCC unroll 4
    for (int k = 1; k < kTerms; ++k) sum += load(lines[k] + i) * c[k];
    store(to + i, sum);
  }
}

inline constexpr int kMaxTerms = 8;  // blocks have up to four, couplings add two

template <typename T>
struct Combination {
  const T* lines[kMaxTerms] = {};
  T coefficients[kMaxTerms] = {};
  ptrdiff_t terms = 0;

  void add(const T* line, double coefficient) {
    lines[terms] = line;
    coefficients[terms++] = T(coefficient);
  }
};

template <typename T>
inline void add_up(const Combination<T>& sum, ptrdiff_t length, T* to) {
  switch (sum.terms) {
    case 1: return add_up_some<1>(sum.lines, sum.coefficients, length, to);
    case 2: return add_up_some<2>(sum.lines, sum.coefficients, length, to);
    case 3: return add_up_some<3>(sum.lines, sum.coefficients, length, to);
    default: break;
  }
  add_up_some<4>(sum.lines, sum.coefficients, length, to);
  for (ptrdiff_t k = 4; k < sum.terms; ++k) {
    const Vec<T> c = broadcast(sum.coefficients[k]);
    for (ptrdiff_t i = 0; i < length; i += kLanes<T>) {
      store(to + i, load(to + i) + load(sum.lines[k] + i) * c);
    }
  }
}

// Rows of a GEMM: products (i, j) of one matrix stand together, ordered by i, then j.
class ProductRows {
 public:
  ProductRows(const MinimalLines& rows, const MinimalLines& columns)
      : rows_(rows),
        columns_(columns) {}

  struct Matrix {
    ptrdiff_t first, count;
  };
  Matrix matrix(ptrdiff_t u, ptrdiff_t v) const {
    const ptrdiff_t across = columns_.weight_begin[v + 1] - columns_.weight_begin[v];
    const ptrdiff_t down = rows_.weight_begin[u + 1] - rows_.weight_begin[u];
    return {rows_.weight_begin[u] * columns_.products() + down * columns_.weight_begin[v],
            down * across};
  }
  // Where products (i, first of column weight v), ... begin.
  ptrdiff_t row(ptrdiff_t i, ptrdiff_t u, ptrdiff_t v) const {
    const ptrdiff_t across = columns_.weight_begin[v + 1] - columns_.weight_begin[v];
    return matrix(u, v).first + (i - rows_.weight_begin[u]) * across;
  }

 private:
  const MinimalLines &rows_, &columns_;
};

// From the first of some ascending positions to the last.
inline ptrdiff_t span(const int64_t* positions, ptrdiff_t count) {
  return positions[count - 1] + 1 - positions[0];
}

inline ptrdiff_t most_of_a_weight(const MinimalLines& lines) {
  ptrdiff_t most = 0;
  for (ptrdiff_t w = 0; w < lines.weights; ++w) {
    const ptrdiff_t count = lines.weight_begin[w + 1] - lines.weight_begin[w];
    if (count > most) most = count;
  }
  return most;
}

// How products combine positions of an axis.
struct Gathering {
  const Combinations& by;
  const int64_t* positions;  // ascending
  ptrdiff_t count;
};
inline Gathering inputs_of(const MinimalLines& lines) {
  return {lines.inputs, lines.read, lines.read_count};
}
inline Gathering gradients_of(const MinimalLines& lines) {
  return {lines.pulled, lines.written, lines.outputs.count};
}

// Combines image rows, then columns, into GEMM rows: what x and, in the gradient of the weights,
// the gradient go through.
template <typename T>
class LinesToProducts {
 public:
  // staged: [y.count, span of x, block]; line: [span of x, block]
  LinesToProducts(const MinimalLines& rows, const MinimalLines& columns, const Gathering& y,
                  const Gathering& x, T* staged, T* line)
      : rows_(rows),
        columns_(columns),
        y_(y),
        x_(x),
        x0_(x.positions[0]),
        width_(span(x.positions, x.count)),
        staged_(staged),
        line_(line) {}

  // Turns to channels [c, c + channels) of image n. Pixels in T with stride 1 over channels are
  // read in place, others are staged.
  void begin(const Image& image, int64_t n, ptrdiff_t c, ptrdiff_t channels) {
    stride_ = padded(channels);
    with_storage(image.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        const Plane<S> plane = plane_of<S>(image, n, c);
        if constexpr (std::is_same_v<S, T>) {
          if (plane.c_stride == 1 && channels == stride_) {
            base_ = plane.data + x0_ * plane.x_stride;
            y_stride_ = plane.y_stride;
            x_stride_ = plane.x_stride;
            in_place_ = true;
            return;
          }
        }
        for (ptrdiff_t k = 0; k < y_.count; ++k) {
          load_row<T>(plane, y_.positions[k], x0_, x0_ + width_, channels, stride_,
                      staged_ + k * width_ * stride_, stride_);
        }
        base_ = staged_;
        y_stride_ = width_ * stride_;
        x_stride_ = stride_;
        in_place_ = false;
      }
    });
  }

  // The products of row weight u -> to [products, padded(channels)].
  void combine(ptrdiff_t u, T* to) {
    for (ptrdiff_t i = rows_.weight_begin[u]; i < rows_.weight_begin[u + 1]; ++i) {
      combine_rows(i);
      combine_columns(i, u, to);
    }
  }

 private:
  const T* line(ptrdiff_t k) const { return base_ + (in_place_ ? y_.positions[k] : k) * y_stride_; }

  void combine_rows(ptrdiff_t i) {
    const ptrdiff_t first = y_.by.start[i], terms = y_.by.start[i + 1] - first;
    if (terms == 1 && y_.by.coefficient[first] == 1.0) {
      combined_ = line(y_.by.at[first]);
      combined_stride_ = x_stride_;
      return;
    }
    Combination<T> sum;
    for (ptrdiff_t e = first; e < first + terms; ++e) {
      sum.add(line(y_.by.at[e]), y_.by.coefficient[e]);
    }
    if (x_stride_ == stride_) {
      add_up(sum, width_ * stride_, line_);
    } else {
      for (ptrdiff_t x = 0; x < width_; ++x) {
        add_up(sum, stride_, line_ + x * stride_);
        for (ptrdiff_t k = 0; k < terms; ++k) sum.lines[k] += x_stride_;
      }
    }
    combined_ = line_;
    combined_stride_ = stride_;
  }

  void combine_columns(ptrdiff_t i, ptrdiff_t u, T* to) {
    const ProductRows rows(rows_, columns_);
    for (ptrdiff_t v = 0; v < columns_.weights; ++v) {
      T* row = to + (rows.row(i, u, v) - rows.matrix(u, 0).first) * stride_;
      for (ptrdiff_t j = columns_.weight_begin[v]; j < columns_.weight_begin[v + 1]; ++j) {
        Combination<T> sum;
        for (ptrdiff_t e = x_.by.start[j]; e < x_.by.start[j + 1]; ++e) {
          sum.add(combined_ + (x_.positions[x_.by.at[e]] - x0_) * combined_stride_,
                  x_.by.coefficient[e]);
        }
        add_up(sum, stride_, row);
        row += stride_;
      }
    }
  }

  const MinimalLines &rows_, &columns_;
  const Gathering y_, x_;
  const ptrdiff_t x0_, width_;
  T *const staged_, *const line_;
  const T* base_ = nullptr;
  ptrdiff_t y_stride_ = 0, x_stride_ = 0, stride_ = 0;
  bool in_place_ = false;
  const T* combined_ = nullptr;
  ptrdiff_t combined_stride_ = 0;
};

}  // namespace aspp::ASPP_ISA
