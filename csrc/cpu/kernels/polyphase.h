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

#include "gemm.h"
#include "products.h"
#include "scratch.h"

namespace aspp::ASPP_ISA {

template <typename T>
inline constexpr ptrdiff_t kBlock = 512 / ptrdiff_t(sizeof(T));  // channels: k of one product

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
  Buffers<T> buffers(memory);
  PolyphaseScratch<T> s;
  s.staged = buffers.take(rows.read_count * window * kBlock<T>);
  s.line = buffers.take(window * kBlock<T>);
  s.products = buffers.take(most_of_a_weight(rows) * columns.products() * kBlock<T>);
  s.sums = buffers.take(count * chunk.panel_count * kPanel);
  s.mid = buffers.take(columns.products() * kPanel);
  s.outputs = buffers.take(columns.outputs.count * kPanel);
  s.bytes = buffers.bytes();
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

  void run() {
    LinesToProducts<T> inputs(rows_, columns_, inputs_of(rows_), inputs_of(columns_), s_.staged,
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
    for (ptrdiff_t panel = 0; panel < chunk_.panel_count; ++panel) {
      for (ptrdiff_t y = 0; y < rows_.outputs.count; ++y) {
        combine_rows(panel, y);
        combine_columns(panel);
        write(panel, y);
      }
    }
    spent(2);
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
        g.chain = p_.channels > 512 ? 64 : 32;  // as long as the sum of chains loses less
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

  void combine_columns(ptrdiff_t panel) {
    const ptrdiff_t first = (chunk_.first_panel + panel) * kPanel;
    const ptrdiff_t width = panel_width(p_.out_channels, chunk_.first_panel + panel);
    const T* scale = p_.scale == nullptr ? nullptr : static_cast<const T*>(p_.scale) + first;
    const T* shift = p_.shift == nullptr
                         ? nullptr
                         : static_cast<const T*>(p_.shift) + chunk_.n * p_.shift_n_stride + first;
    // A division: the product with a ninth, which no float is, would err towards one side.
    const Vec<T> denominator = broadcast(T(rows_.denominator * columns_.denominator));
    const Combinations& by = columns_.outputs;
    for (ptrdiff_t x = 0; x < by.count; ++x) {
      Combination<T> sum;
      for (ptrdiff_t e = by.start[x]; e < by.start[x + 1]; ++e) {
        sum.add(s_.mid + by.at[e] * kPanel, by.coefficient[e]);
      }
      T* to = s_.outputs + x * kPanel;
      add_up(sum, width, to);
      for (ptrdiff_t i = 0; i < width; i += kLanes<T>) {
        Vec<T> v = load(to + i) / denominator;
        if (scale != nullptr) v *= load(scale + i);
        if (shift != nullptr) v += load(shift + i);
        if (p_.relu) v = at_least<T>(v, Vec<T>{});
        store(to + i, v);
      }
    }
  }

  void write(ptrdiff_t panel, ptrdiff_t y) {
    const ptrdiff_t first = (chunk_.first_panel + panel) * kPanel;
    const ptrdiff_t left = p_.out_channels - first, channels = left < kPanel ? left : kPanel;
    with_storage(p_.out.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        const Plane<S> plane = plane_of<S>(p_.out, chunk_.n, first);
        const ptrdiff_t row = rows_.written[y];
        const int64_t* const written = columns_.written;
        const char* const direct =
            p_.direct == nullptr ? nullptr : p_.direct + (chunk_.n * p_.height + row) * p_.width;
        const auto is_direct = [&](ptrdiff_t k) { return direct != nullptr && direct[written[k]]; };
        for (ptrdiff_t begin = 0; begin < columns_.outputs.count;) {
          ptrdiff_t end = begin + 1;  // one past the run of neighbouring pixels
          if (is_direct(begin)) {
            begin = end;
            continue;
          }
          while (end < columns_.outputs.count && written[end] == written[end - 1] + 1 &&
                 !is_direct(end)) {
            ++end;
          }
          T* outputs = s_.outputs + begin * kPanel;
          const ptrdiff_t x0 = written[begin], x1 = x0 + end - begin;
          if constexpr (std::is_same_v<S, T>) {
            if (p_.accumulate) add_row(plane, row, x0, x1, channels, outputs, kPanel);
          }
          store_row<T>(outputs, kPanel, channels, plane, row, x0, x1);
          begin = end;
        }
      }
    });
  }

  const PolyphaseParams& p_;
  const PolyphaseChunk& chunk_;
  const MinimalLines &rows_, &columns_;
  const PolyphaseScratch<T> s_;
  const ptrdiff_t count_;  // products of the chunk
  int64_t time_;
};

}  // namespace aspp::ASPP_ISA
