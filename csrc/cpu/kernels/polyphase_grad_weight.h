// SPDX-License-Identifier: BSD-3-Clause
// The gradient of a dense branch's weight by minimal filtering. The forward is a sum over products
// of (weights combined) * (inputs combined), handed out to outputs; so with the outputs' gradient
// pulled back to the products, each matrix gets (inputs combined)^T (gradients pulled), summed over
// its products, and the taps get the matrices that they went into.
#pragma once

#include "polyphase.h"
#include "polyphase_weights.h"

namespace aspp::ASPP_ISA {

inline constexpr ptrdiff_t kGradBlock = 128;  // input channels of one task

template <typename T>
struct GradWeightScratch {
  T *x_staged, *x_line, *x_products, *grad_staged, *grad_line, *grad_products, *matrices;
  int64_t bytes;
};

template <typename T>
GradWeightScratch<T> lay_out_grad_weight(const PolyphaseGradWeight& p, int64_t panel_count,
                                         void* memory) {
  ptrdiff_t read = 0, read_window = 0, written = 0, written_window = 0, products = 0;
  const auto grow = [](ptrdiff_t& most, ptrdiff_t count) { most = count > most ? count : most; };
  for (int64_t k = 0; k < p.chunk_count; ++k) {
    const MinimalLines &rows = *p.chunks[k].rows, &columns = *p.chunks[k].columns;
    grow(read, rows.read_count);
    grow(read_window, span(columns.read, columns.read_count));
    grow(written, rows.outputs.count);
    grow(written_window, span(columns.written, columns.outputs.count));
    grow(products, most_of_a_weight(rows) * columns.products());
  }
  const ptrdiff_t width = panel_count * kPanel;
  Buffers<T> buffers(memory);
  GradWeightScratch<T> s;
  s.x_staged = buffers.take(read * read_window * kGradBlock);
  s.x_line = buffers.take(read_window * kGradBlock);
  s.x_products = buffers.take(products * kGradBlock);
  s.grad_staged = buffers.take(written * written_window * width);
  s.grad_line = buffers.take(written_window * width);
  s.grad_products = buffers.take(products * width);
  s.matrices = buffers.take(p.map.row_count * p.map.column_count * kGradBlock * width);
  s.bytes = buffers.bytes();
  return s;
}

template <typename T>
class GradWeight {
 public:
  GradWeight(const PolyphaseGradWeight& p, int64_t channel, int64_t panel, int64_t panel_count,
             void* scratch)
      : p_(p),
        c_(channel),
        o_(panel * kPanel),
        s_(lay_out_grad_weight<T>(p, panel_count, scratch)) {
    channels_ = p.map.channels - c_ < kGradBlock ? p.map.channels - c_ : kGradBlock;
    const ptrdiff_t left = p.map.out_channels - o_;
    outputs_ = left < panel_count * kPanel ? left : panel_count * kPanel;
  }

  void run() {
    std::memset(s_.matrices, 0,
                size_t(p_.map.row_count * p_.map.column_count * size()) * sizeof(T));
    for (int64_t k = 0; k < p_.chunk_count; ++k) add_chunk(p_.chunks[k]);
    const double denominator = p_.chunks[0].rows->denominator * p_.chunks[0].columns->denominator;
    for (ptrdiff_t o = 0; o < outputs_; o += kLanes<T>) {
      for (ptrdiff_t c = 0; c < channels_; ++c) write(c, o, T(denominator));
    }
  }

 private:
  ptrdiff_t size() const { return channels_ * padded(outputs_); }  // of a matrix
  T* matrix(ptrdiff_t u, ptrdiff_t v) const {
    return s_.matrices + (u * p_.map.column_count + v) * size();
  }

  void add_chunk(const PolyphaseChunk& chunk) {
    const MinimalLines &rows = *chunk.rows, &columns = *chunk.columns;
    LinesToProducts<T> inputs(rows, columns, inputs_of(rows), inputs_of(columns), s_.x_staged,
                              s_.x_line);
    LinesToProducts<T> gradients(rows, columns, gradients_of(rows), gradients_of(columns),
                                 s_.grad_staged, s_.grad_line);
    inputs.begin(p_.x, chunk.n, c_, channels_);
    gradients.begin(p_.grad, chunk.n, o_, outputs_);
    for (ptrdiff_t u = 0; u < rows.weights; ++u) {
      if (rows.weight_begin[u] == rows.weight_begin[u + 1]) continue;
      inputs.combine(u, s_.x_products);
      gradients.combine(u, s_.grad_products);
      multiply(ProductRows(rows, columns), u);
    }
  }

  // matrix(u, v) += (inputs of its products)^T (gradients)
  void multiply(const ProductRows& rows, ptrdiff_t u) {
    constexpr ptrdiff_t kStretch = 128;  // products whose rows of both operands stay in cache
    const ptrdiff_t a_row = padded(channels_), b_row = padded(outputs_);
    const ptrdiff_t begin = rows.matrix(u, 0).first;
    for (ptrdiff_t v = 0; v < p_.map.column_count; ++v) {
      const auto [first, count] = rows.matrix(u, v);
      for (ptrdiff_t k = 0; k < count; k += kStretch) {
        const ptrdiff_t at = first - begin + k;
        gemm(Gemm<T>{s_.x_products + at * a_row, 1, a_row, s_.grad_products + at * b_row, b_row,
                     matrix(u, v), b_row, channels_, b_row,
                     count - k < kStretch ? count - k : kStretch, true});
      }
    }
  }

  // The taps of input channel c and a vector of output channels from o on.
  void write(ptrdiff_t c, ptrdiff_t o, T denominator) {
    const MinimalWeights& map = p_.map;
    Vec<T> tap[3][3] = {};
    for (ptrdiff_t u = 0; u < map.row_count; ++u) {
      Vec<T> row[3] = {};
      for (ptrdiff_t v = 0; v < map.column_count; ++v) {
        const Vec<T> m = load(matrix(u, v) + c * padded(outputs_) + o);
        for (int j = 0; j < 3; ++j) row[j] += m * broadcast(T(map.column_weights[3 * v + j]));
      }
      for (int i = 0; i < 3; ++i) {
        const Vec<T> a = broadcast(T(map.row_weights[3 * u + i]));
        for (int j = 0; j < 3; ++j) tap[i][j] += row[j] * a;
      }
    }
    const ptrdiff_t taps = map.kernel_h * map.kernel_w;
    T* to = static_cast<T*>(p_.grad_weight) + ((o_ + o) * map.channels + c_ + c) * taps;
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) {
        const ptrdiff_t t = tap_index(map, i, j);
        if (t < 0) continue;
        const Vec<T> v = tap[i][j] / broadcast(denominator);
        const ptrdiff_t lanes = outputs_ - o < kLanes<T> ? outputs_ - o : kLanes<T>;
        for (ptrdiff_t l = 0; l < lanes; ++l) to[l * map.channels * taps + t] = v[l];
      }
    }
  }

  const PolyphaseGradWeight& p_;
  const ptrdiff_t c_, o_;
  const GradWeightScratch<T> s_;
  ptrdiff_t channels_ = 0, outputs_ = 0;
};

}  // namespace aspp::ASPP_ISA
