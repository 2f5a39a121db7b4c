// SPDX-License-Identifier: BSD-3-Clause
// A dense branch by minimal filtering, for one chunk of products. Each pair of a row product and a
// column product is one row of a GEMM with the matrix of its two weights:
//
//   x, a block of channels at a time -> combined over rows, then over columns -> [products, block]
//   per matrix: GEMM into sums [products, panel], which stay in cache over all blocks
//   combined over rows, then over columns -> outputs -> scale, shift, ReLU, store
//
// Every sum's order depends on the branch alone, not on how products were gathered into chunks.
#pragma once

#include <time.h>

#include <type_traits>

#include "gemm.h"
#include "pixels.h"
#include "polyphase_params.h"

namespace aspp::ASPP_ISA {

template <typename T>
inline constexpr ptrdiff_t kBlock = 512 / ptrdiff_t(sizeof(T));  // channels: k of one product

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

// Combines image rows, then columns, into GEMM rows: what x and, in the gradient of the weights,
// the gradient go through.
template <typename T>
class LinesToProducts {
 public:
  // `by_row` and `by_column` say how a product combines the lines `y` and the columns `x`.
  LinesToProducts(const MinimalLines& rows, const MinimalLines& columns, const Combinations& by_row,
                  const Combinations& by_column, const int64_t* y, ptrdiff_t y_count,
                  const int64_t* x, ptrdiff_t x_count, T* staged, T* line)
      : rows_(rows),
        columns_(columns),
        by_row_(by_row),
        by_column_(by_column),
        y_(y),
        x_(x),
        y_count_(y_count),
        x_count_(x_count),
        x0_(x[0]),
        width_(span(x, x_count)),
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
        for (ptrdiff_t k = 0; k < y_count_; ++k) {
          load_row<T>(plane, y_[k], x0_, x0_ + width_, channels, stride_,
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
  const T* line(ptrdiff_t k) const { return base_ + (in_place_ ? y_[k] : k) * y_stride_; }

  void combine_rows(ptrdiff_t i) {
    const ptrdiff_t first = by_row_.start[i], terms = by_row_.start[i + 1] - first;
    if (terms == 1 && by_row_.coefficient[first] == 1.0) {
      combined_ = line(by_row_.at[first]);
      combined_stride_ = x_stride_;
      return;
    }
    Combination<T> sum;
    for (ptrdiff_t e = first; e < first + terms; ++e) {
      sum.add(line(by_row_.at[e]), by_row_.coefficient[e]);
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
        for (ptrdiff_t e = by_column_.start[j]; e < by_column_.start[j + 1]; ++e) {
          sum.add(combined_ + (x_[by_column_.at[e]] - x0_) * combined_stride_,
                  by_column_.coefficient[e]);
        }
        add_up(sum, stride_, row);
        row += stride_;
      }
    }
  }

  const MinimalLines &rows_, &columns_;
  const Combinations &by_row_, &by_column_;
  const int64_t *y_, *x_;
  const ptrdiff_t y_count_, x_count_, x0_, width_;
  T* const staged_;  // [y_count, width, stride]
  T* const line_;    // [width, stride]
  const T* base_ = nullptr;
  ptrdiff_t y_stride_ = 0, x_stride_ = 0, stride_ = 0;
  bool in_place_ = false;
  const T* combined_ = nullptr;
  ptrdiff_t combined_stride_ = 0;
};

template <typename T>
struct PolyphaseScratch {
  T *staged, *line, *products, *sums, *mid, *outputs;
  int64_t bytes;
};

template <typename T>
PolyphaseScratch<T> lay_out_polyphase(const PolyphaseChunk& chunk, void* memory) {
  const MinimalLines &rows = *chunk.rows, &columns = *chunk.columns;
  const ptrdiff_t window = span(columns.read, columns.read_count);
  const ptrdiff_t count = rows.products() * columns.products();
  char* at = static_cast<char*>(memory);
  const auto take = [&at](ptrdiff_t elements) {
    T* here = reinterpret_cast<T*>(at);
    at += (elements * ptrdiff_t(sizeof(T)) + 127) / 64 * 64;
    return here;
  };
  PolyphaseScratch<T> s;
  s.staged = take(rows.read_count * window * kBlock<T>);
  s.line = take(window * kBlock<T>);
  s.products = take(most_of_a_weight(rows) * columns.products() * kBlock<T>);
  s.sums = take(count * chunk.panel_count * kPanel);
  s.mid = take(columns.products() * kPanel);
  s.outputs = take(columns.outputs.count * kPanel);
  s.bytes = at - static_cast<char*>(memory);
  return s;
}

template <typename T>
class PolyphaseForward {
 public:
  PolyphaseForward(const PolyphaseParams& p, const PolyphaseChunk& chunk, void* scratch)
      : p_(p),
        chunk_(chunk),
        rows_(*chunk.rows),
        columns_(*chunk.columns),
        s_(lay_out_polyphase<T>(chunk, scratch)),
        count_(rows_.products() * columns_.products()),
        time_(chunk.nanoseconds == nullptr ? 0 : now()) {}

  // Whether every output is finite. Where one is not, an operand may have been infinite or NaN and
  // reached neighbours it does not belong to, or a combination overflowed.
  bool run() {
    LinesToProducts<T> inputs(rows_, columns_, rows_.inputs, columns_.inputs, rows_.read,
                              rows_.read_count, columns_.read, columns_.read_count, s_.staged,
                              s_.line);
    for (ptrdiff_t c = 0; c < p_.channels; c += kBlock<T>) {
      const ptrdiff_t channels = p_.channels - c < kBlock<T> ? p_.channels - c : kBlock<T>;
      inputs.begin(p_.x, chunk_.n, c, channels);
      for (ptrdiff_t u = 0; u < rows_.weights; ++u) {
        inputs.combine(u, s_.products);
        spent(0);
        multiply(u, c, channels);
        spent(1);
      }
    }
    bool finite = true;
    for (ptrdiff_t panel = 0; panel < chunk_.panel_count; ++panel) {
      for (ptrdiff_t y = 0; y < rows_.outputs.count; ++y) {
        combine_rows(panel, y);
        finite = combine_columns(panel) && finite;
        write(panel, y);
      }
    }
    spent(2);
    return finite;
  }

 private:
  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
  }
  void spent(int part) {
    if (chunk_.nanoseconds == nullptr) return;
    const int64_t before = time_;
    time_ = now();
    chunk_.nanoseconds[part] += time_ - before;
  }

  // Where the matrix of (u, v) has rows c, ... of a panel.
  const T* weights(ptrdiff_t u, ptrdiff_t v, ptrdiff_t c, ptrdiff_t panel) const {
    return static_cast<const T*>(p_.weights) +
           (u * columns_.weights + v) * p_.channels * padded(p_.out_channels) +
           panel * kPanel * p_.channels + c * panel_width(p_.out_channels, panel);
  }

  void multiply(ptrdiff_t u, ptrdiff_t c, ptrdiff_t channels) {
    const ProductRows rows(rows_, columns_);
    const ptrdiff_t begin = rows.matrix(u, 0).first, last = chunk_.panel_count - 1;
    for (ptrdiff_t v = 0; v < columns_.weights; ++v) {
      const auto [first, count] = rows.matrix(u, v);
      if (count == 0) continue;
      for (ptrdiff_t k = 0; k <= last; ++k) {
        const ptrdiff_t panel = chunk_.first_panel + k;
        const ptrdiff_t width = panel_width(p_.out_channels, panel);
        Gemm<T> g{s_.products + (first - begin) * padded(channels),
                  padded(channels),
                  1,
                  weights(u, v, c, panel),
                  width,
                  sums(k) + first * kPanel,
                  kPanel,
                  count,
                  width,
                  channels,
                  c > 0};
        // Weights come from memory, once per chunk: they are fetched a panel ahead.
        g.next = k < last ? weights(u, v, c, panel + 1) : weights(u, v + 1, c, chunk_.first_panel);
        g.next_bytes = channels * kPanel * ptrdiff_t(sizeof(T));
        gemm(g);
      }
    }
  }

  T* sums(ptrdiff_t panel) const { return s_.sums + panel * count_ * kPanel; }

  // mid [column products, panel]: output row y before its columns are combined
  void combine_rows(ptrdiff_t panel, ptrdiff_t y) {
    const ProductRows rows(rows_, columns_);
    const Combinations& by = rows_.outputs;
    for (ptrdiff_t v = 0; v < columns_.weights; ++v) {
      const ptrdiff_t begin = columns_.weight_begin[v];
      Combination<T> sum;
      ptrdiff_t u = 0;
      for (ptrdiff_t e = by.start[y]; e < by.start[y + 1]; ++e) {
        while (by.at[e] >= rows_.weight_begin[u + 1]) ++u;
        sum.add(sums(panel) + rows.row(by.at[e], u, v) * kPanel, by.coefficient[e]);
      }
      add_up(sum, (columns_.weight_begin[v + 1] - begin) * kPanel, s_.mid + begin * kPanel);
    }
  }

  bool combine_columns(ptrdiff_t panel) {
    const ptrdiff_t first = (chunk_.first_panel + panel) * kPanel;
    const ptrdiff_t width = panel_width(p_.out_channels, chunk_.first_panel + panel);
    const T* scale = p_.scale == nullptr ? nullptr : static_cast<const T*>(p_.scale) + first;
    const T* shift = p_.shift == nullptr
                         ? nullptr
                         : static_cast<const T*>(p_.shift) + chunk_.n * p_.shift_n_stride + first;
    const Vec<T> row_factor = broadcast(T(rows_.factor));
    const Vec<T> column_factor = broadcast(T(columns_.factor));
    Vec<T> nothing{};  // v - v is zero for what is finite and NaN for what is not
    const Combinations& by = columns_.outputs;
    for (ptrdiff_t x = 0; x < by.count; ++x) {
      Combination<T> sum;
      for (ptrdiff_t e = by.start[x]; e < by.start[x + 1]; ++e) {
        sum.add(s_.mid + by.at[e] * kPanel, by.coefficient[e]);
      }
      T* to = s_.outputs + x * kPanel;
      add_up(sum, width, to);
      for (ptrdiff_t i = 0; i < width; i += kLanes<T>) {
        // One factor after the other: a third of a multiple of three is exact, a ninth may not be.
        Vec<T> v = load(to + i) * row_factor * column_factor;
        nothing += v - v;
        if (scale != nullptr) v *= load(scale + i);
        if (shift != nullptr) v += load(shift + i);
        if (p_.relu) v = at_least<T>(v, Vec<T>{});
        store(to + i, v);
      }
    }
    bool finite = true;
    for (int i = 0; i < kLanes<T>; ++i) finite = finite && nothing[i] == T(0);
    return finite;
  }

  void write(ptrdiff_t panel, ptrdiff_t y) {
    const ptrdiff_t first = (chunk_.first_panel + panel) * kPanel;
    const ptrdiff_t left = p_.out_channels - first, channels = left < kPanel ? left : kPanel;
    with_storage(p_.out.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        const Plane<S> plane = plane_of<S>(p_.out, chunk_.n, first);
        const ptrdiff_t row = rows_.written[y];
        for (ptrdiff_t begin = 0; begin < columns_.outputs.count;) {
          ptrdiff_t end = begin + 1;  // one past the run of neighbouring pixels
          while (end < columns_.outputs.count &&
                 columns_.written[end] == columns_.written[end - 1] + 1) {
            ++end;
          }
          if constexpr (std::is_same_v<S, T>) {
            if (p_.accumulate) add_to_outputs(plane, row, begin, end, channels);
          }
          store_row<T>(s_.outputs + begin * kPanel, kPanel, channels, plane, row,
                       columns_.written[begin], columns_.written[begin] + end - begin);
          begin = end;
        }
      }
    });
  }

  void add_to_outputs(const Plane<T>& plane, ptrdiff_t row, ptrdiff_t begin, ptrdiff_t end,
                      ptrdiff_t channels) {
    for (ptrdiff_t x = begin; x < end; ++x) {
      const T* there = plane.data + row * plane.y_stride + columns_.written[x] * plane.x_stride;
      T* to = s_.outputs + x * kPanel;
      ptrdiff_t c = 0;
      for (; c + kLanes<T> <= channels; c += kLanes<T>)
        store(to + c, load(there + c) + load(to + c));
      for (; c < channels; ++c) to[c] += there[c];
    }
  }

  const PolyphaseParams& p_;
  const PolyphaseChunk& chunk_;
  const MinimalLines &rows_, &columns_;
  const PolyphaseScratch<T> s_;
  const ptrdiff_t count_;  // products of the chunk
  int64_t time_;
};

}  // namespace aspp::ASPP_ISA
