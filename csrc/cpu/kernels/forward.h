// SPDX-License-Identifier: BSD-3-Clause
// Forward of a pyramid for one chunk of output pixels: stage the input rows the chunk needs, a
// block of channels at a time, and add each branch's product to accumulators that stay in cache.
//
//   separable   depthwise(staged rows) -> a cache-resident block -> GEMM with the pointwise weights
//   dense       per live tap: GEMM of the staged rows, shifted, with that tap's weights
//
// A separable pyramid takes its branches together (one staging serves every rate); a dense branch
// goes alone, because its weights (kh * kw times as many) must be streamed past fewer accumulators.
//
// T is computed in; E is what the GEMMs multiply: T, or bfloat16 where the processor has products
// of it. Then staged rows and the depthwise result are bfloat16, as PyTorch's intermediate results
// are.
#pragma once

#include <type_traits>

#include "depthwise.h"
#include "gemm.h"
#include "params.h"
#include "pixels.h"

namespace aspp::ASPP_ISA {

inline constexpr ptrdiff_t kStageBytes = 1 << 20;
inline constexpr ptrdiff_t kProductBytes =
    512;  // k of one product: its panel of B fills half of L1

// Branches [first, last) that are computed together.
struct Group {
  int64_t first, last;
};
inline bool is_dense(const BranchParams& b) {
  return b.depthwise == nullptr && b.kernel_h * b.kernel_w > 1;
}
inline Group group_from(const PyramidParams& p, int64_t first) {
  int64_t last = first + 1;
  if (!is_dense(p.branches[first])) {
    while (last < p.branch_count && !is_dense(p.branches[last])) ++last;
  }
  return {first, last};
}

// Columns and rows around the chunk that a group can touch.
struct Window {
  ptrdiff_t x0, x1;  // staged columns
  ptrdiff_t slots;   // upper bound of staged rows
};
inline Window window_of(const PyramidParams& p, const Group& group, int64_t begin, int64_t end) {
  ptrdiff_t reach = 0, row_offsets = 1;
  for (int64_t b = group.first; b < group.last; ++b) {
    const BranchParams& branch = p.branches[b];
    const ptrdiff_t across = branch.kernel_w / 2 * branch.rate_w;
    if (across > reach) reach = across;
    row_offsets += branch.kernel_h - 1;
  }
  const ptrdiff_t first_row = begin / p.width, last_row = (end - 1) / p.width;
  Window window{0, p.width, (last_row - first_row + 1) * row_offsets};
  if (window.slots > p.height) window.slots = p.height;
  if (first_row == last_row && !p.sum_rows) {
    const ptrdiff_t left = begin - first_row * p.width - reach;
    const ptrdiff_t right = end - first_row * p.width + reach;
    if (left > 0) window.x0 = left;
    if (right < p.width) window.x1 = right;
  }
  return window;
}

// Pixels the largest chunk of a group can have staged: a chunk that begins at the end of a row, or,
// where rows are as long as chunks, a piece of one row with its halo.
inline ptrdiff_t most_staged(const PyramidParams& p, const Group& group) {
  if (p.width < p.chunk_pixels) {
    return window_of(p, group, p.width - 1, p.width - 1 + p.chunk_pixels).slots * p.width;
  }
  const Window piece = window_of(p, group, 0, p.chunk_pixels);
  const ptrdiff_t across = 2 * (piece.x1 - p.chunk_pixels) + p.chunk_pixels;
  return piece.slots * (across < p.width ? across : p.width);
}

// Channels staged at a time. The same for every chunk of a problem, however many threads share it:
// the order of every sum, and so its bits, must not depend on that.
template <typename T>
inline ptrdiff_t channel_block(const PyramidParams& p, const Group& group) {
  const ptrdiff_t pixels = most_staged(p, group);
  ptrdiff_t block = kProductBytes / sizeof(T);
  while (block > kPad && pixels * block * ptrdiff_t(sizeof(T)) > kStageBytes) block /= 2;
  const ptrdiff_t all = padded(p.channels);
  return block < all ? block : all;
}

template <typename T, typename E>
struct ForwardScratch {
  E* staged;            // [slots, window, block]
  E* depthwise;         // [pixels, block]
  T* accumulators;      // per branch [pixels, padded out_channels]: compact, so that it caches well
  E* activated;         // the same in E, where E is not T and there is a projection
  T* projected;         // [pixels, project columns]
  BFloat16Pair* pairs;  // [block / 2, widest branch or projection], where E is not T
  int64_t* slot_of;     // [H]
  int64_t bytes;
};

template <typename T, typename E>
ForwardScratch<T, E> lay_out_forward(const PyramidParams& p, void* memory) {
  ptrdiff_t staged = 0;
  for (int64_t b = 0; b < p.branch_count;) {
    const Group group = group_from(p, b);
    const ptrdiff_t size = most_staged(p, group) * channel_block<T>(p, group);
    if (size > staged) staged = size;
    b = group.last;
  }
  const ptrdiff_t block = kProductBytes / sizeof(T), chunk_pixels = p.chunk_pixels;
  char* at = static_cast<char*>(memory);
  const auto take = [&at](ptrdiff_t bytes) {
    char* here = at;
    at += (bytes + 127) / 64 * 64;
    return here;
  };
  constexpr bool kNarrow = !std::is_same_v<T, E>;
  ptrdiff_t widest = p.project_columns;
  for (int64_t b = 0; b < p.branch_count; ++b) {
    const ptrdiff_t columns = padded(p.branches[b].out_channels);
    if (columns > widest) widest = columns;
  }
  ForwardScratch<T, E> s;
  s.staged = reinterpret_cast<E*>(take(staged * ptrdiff_t(sizeof(E))));
  s.depthwise = reinterpret_cast<E*>(take(chunk_pixels * block * ptrdiff_t(sizeof(E))));
  s.accumulators = reinterpret_cast<T*>(take(chunk_pixels * p.columns * ptrdiff_t(sizeof(T))));
  const bool activated = kNarrow && p.project != nullptr;
  s.activated =
      reinterpret_cast<E*>(take(activated ? chunk_pixels * p.columns * ptrdiff_t(sizeof(E)) : 0));
  s.pairs = reinterpret_cast<BFloat16Pair*>(take(kNarrow ? block / 2 * widest * 4 : 0));
  s.projected = reinterpret_cast<T*>(take(chunk_pixels * p.project_columns * ptrdiff_t(sizeof(T))));
  s.slot_of = reinterpret_cast<int64_t*>(take(p.height * 8));
  s.bytes = at - static_cast<char*>(memory);
  return s;
}

// Calls body(row y, x0, x1, first pixel within the chunk) for each run of the chunk within one row.
template <typename F>
inline void for_each_run(const PyramidParams& p, int64_t begin, int64_t end, F&& body) {
  for (int64_t q = begin; q < end;) {
    const int64_t row = q / p.width, x0 = q - row * p.width;
    const int64_t x1 = end - row * p.width < p.width ? end - row * p.width : p.width;
    body(p.row_order[row], x0, x1, q - begin);
    q += x1 - x0;
  }
}

// Rows 2k and 2k + 1 of a bfloat16 matrix side by side, as the products take them.
inline void pack_pairs(const BFloat16* rows, ptrdiff_t row, ptrdiff_t count, ptrdiff_t columns,
                       BFloat16Pair* to) {
  constexpr int n = kVectorBytes / 4;
  for (ptrdiff_t k = 0; k < count; k += 2) {
    for (ptrdiff_t j = 0; j < columns; j += n) {
      const BFloat16* at = rows + k * row + j;
      Words pair = __builtin_convertvector(*reinterpret_cast<const HalfWords*>(at), Words);
      if (k + 1 < count) {
        pair |= __builtin_convertvector(*reinterpret_cast<const HalfWords*>(at + row), Words) << 16;
      }
      store(reinterpret_cast<uint32_t*>(to + k / 2 * columns + j), pair);
    }
  }
}

template <typename T, typename E>
class ChunkForward {
 public:
  ChunkForward(const PyramidParams& p, int64_t n, int64_t chunk, int64_t begin, int64_t end,
               void* scratch)
      : p_(p),
        n_(n),
        chunk_(chunk),
        begin_(begin),
        end_(end),
        s_(lay_out_forward<T, E>(p, scratch)) {}

  void run() {
    for (int64_t b = 0; b < p_.branch_count;) {
      const Group group = group_from(p_, b);
      run_group(group);
      b = group.last;
    }
    add_residual();
    activate();
    if (p_.project != nullptr) {
      project();
    } else {
      write();
    }
  }

 private:
  void run_group(const Group& group) {
    window_ = window_of(p_, group, begin_, end_);
    assign_slots(group);
    const ptrdiff_t block = channel_block<T>(p_, group);
    for (ptrdiff_t c = 0; c < p_.channels; c += block) {
      const ptrdiff_t channels = p_.channels - c < block ? p_.channels - c : block;
      stride_ = padded(channels);
      stage(c, channels);
      if (p_.pixel_sums != nullptr && group.first == 0) add_pixel_sums(c);
      for (int64_t b = group.first; b < group.last; ++b) {
        if (is_dense(p_.branches[b])) {
          dense_block(p_.branches[b], c, channels);
        } else {
          separable_block(p_.branches[b], c, channels);
        }
      }
    }
  }

  // Which input rows the group's live taps touch, in the order they are met.
  void assign_slots(const Group& group) {
    for (int64_t y = 0; y < p_.height; ++y) s_.slot_of[y] = -1;
    ptrdiff_t next = 0;
    const auto touch = [&](int64_t y) {
      if (s_.slot_of[y] < 0) s_.slot_of[y] = next++;
    };
    for_each_run(p_, begin_, end_, [&](int64_t y, int64_t, int64_t, int64_t) {
      touch(y);
      for (int64_t b = group.first; b < group.last; ++b) {
        const BranchParams& branch = p_.branches[b];
        const LiveTaps live = live_taps(y, branch.kernel_h, branch.rate_h, p_.height);
        for (ptrdiff_t i = 0; i < live.count; ++i) {
          touch(y + (live.first + i - branch.kernel_h / 2) * branch.rate_h);
        }
      }
    });
  }

  void stage(ptrdiff_t c, ptrdiff_t channels) {
    with_storage(p_.x.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        const Plane<S> plane = plane_of<S>(p_.x, n_, c);
        for (int64_t y = 0; y < p_.height; ++y) {
          if (s_.slot_of[y] < 0) continue;
          load_row<T>(plane, y, window_.x0, window_.x1, channels, stride_,
                      s_.staged + s_.slot_of[y] * (window_.x1 - window_.x0) * stride_, stride_);
        }
      }
    });
  }

  // Where pixel x = 0 of a staged row would stand.
  const E* row_of(ptrdiff_t y) const {
    return s_.staged + (s_.slot_of[y] * (window_.x1 - window_.x0) - window_.x0) * stride_;
  }

  void separable_block(const BranchParams& branch, ptrdiff_t c, ptrdiff_t channels) {
    if (branch.depthwise == nullptr) {
      dense_block(branch, c, channels);
      return;
    }
    DepthwiseRows<T> d{};
    d.weights = static_cast<const T*>(branch.depthwise) + c;
    d.weight_stride = padded(p_.channels);
    d.kernel_h = branch.kernel_h;
    d.kernel_w = branch.kernel_w;
    d.rate_h = branch.rate_h;
    d.rate_w = branch.rate_w;
    d.height = p_.height;
    d.width = p_.width;
    d.channels = stride_;
    d.pixel_stride = stride_;
    if (branch.between_scale != nullptr) {
      d.scale = static_cast<const T*>(branch.between_scale) + c;
      d.shift = static_cast<const T*>(branch.between_shift) + c;
      d.relu = branch.between_relu;
    }
    for_each_run(p_, begin_, end_, [&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
      depthwise_row(
          d, y, x0, x1, [this](ptrdiff_t row) { return row_of(row); }, s_.depthwise + at * stride_,
          stride_);
    });
    const Rows weight = rows_of(branch.weight, c * branch.weight_row, branch.weight_row, channels,
                                padded(branch.out_channels));
    multiply(branch, weight, s_.depthwise, 0, end_ - begin_, channels, c > 0);
  }

  void dense_block(const BranchParams& branch, ptrdiff_t c, ptrdiff_t channels) {
    const ptrdiff_t taps = branch.kernel_h * branch.kernel_w;
    const ptrdiff_t centre = taps / 2;
    for (ptrdiff_t t = 0; t < taps; ++t) {
      // The centre tap is always live: it goes first and initialises the accumulators.
      const ptrdiff_t tap = t == 0 ? centre : t <= centre ? t - 1 : t;
      const ptrdiff_t dy = (tap / branch.kernel_w - branch.kernel_h / 2) * branch.rate_h;
      const ptrdiff_t dx = (tap % branch.kernel_w - branch.kernel_w / 2) * branch.rate_w;
      const Rows weight = rows_of(branch.weight, tap * branch.weight_tap + c * branch.weight_row,
                                  branch.weight_row, channels, padded(branch.out_channels));
      for_each_run(p_, begin_, end_, [&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
        if (y + dy < 0 || y + dy >= p_.height) return;
        const int64_t from = x0 + dx < 0 ? -dx : x0;
        const int64_t to = x1 + dx > p_.width ? p_.width - dx : x1;
        if (from >= to) return;
        multiply(branch, weight, row_of(y + dy) + (from + dx) * stride_, at + from - x0, to - from,
                 channels, c > 0 || t > 0);
      });
    }
  }

  // `channels` rows of a weight matrix as the right operand of a product.
  struct Rows {
    const void* data;
    ptrdiff_t stride;
  };
  Rows rows_of(const void* matrix, ptrdiff_t first, ptrdiff_t row, ptrdiff_t channels,
               ptrdiff_t columns) {
    const E* rows = static_cast<const E*>(matrix) + first;
    if constexpr (kNarrow) {
      pack_pairs(rows, row, channels, columns, s_.pairs);
      return {s_.pairs, columns};
    } else {
      return {rows, row};
    }
  }

  // c (+)= a * b over `channels`; a's rows are `a_stride` apart, c's `c_stride`.
  void product(const E* a, ptrdiff_t a_stride, const Rows& b, T* c, ptrdiff_t c_stride,
               ptrdiff_t pixels, ptrdiff_t columns, ptrdiff_t channels, bool accumulate) {
    if constexpr (kNarrow) {
      gemm(Gemm<T, BFloat16Pair>{reinterpret_cast<const BFloat16Pair*>(a), a_stride / 2, 1,
                                 static_cast<const BFloat16Pair*>(b.data), b.stride, c, c_stride,
                                 pixels, columns, (channels + 1) / 2, accumulate});
    } else {
      gemm(Gemm<T, E>{a, a_stride, 1, static_cast<const E*>(b.data), b.stride, c, c_stride, pixels,
                      columns, channels, accumulate});
    }
  }

  void multiply(const BranchParams& branch, const Rows& weight, const E* a, ptrdiff_t at,
                ptrdiff_t pixels, ptrdiff_t channels, bool accumulate) {
    const ptrdiff_t columns = padded(branch.out_channels);
    product(a, stride_, weight, rows_from(s_.accumulators, branch) + at * columns, columns, pixels,
            columns, channels, accumulate);
  }

  // A branch's [pixels, padded out_channels] within accumulators or activated.
  template <typename V>
  V* rows_from(V* base, const BranchParams& branch) const {
    return base + branch.column * p_.chunk_pixels;
  }

  // Sums of x: of each image row, by the chunk that has the row's first pixel, or of each chunk
  // where chunks are pieces of rows. Either way the parts do not depend on how the work was
  // divided.
  void add_pixel_sums(ptrdiff_t c) {
    const int64_t stride = padded(p_.channels);
    T* sums = static_cast<T*>(p_.pixel_sums) + c;
    for_each_run(p_, begin_, end_, [&](int64_t y, int64_t x0, int64_t x1, int64_t) {
      if (p_.sum_rows && x0 > 0) return;
      T* to = sums + (p_.sum_rows ? n_ * p_.height + y : chunk_) * stride;
      const int64_t last = p_.sum_rows ? p_.width : x1;
      for (ptrdiff_t v = 0; v < stride_; v += kLanes<T>) {
        Vec<T> total{};
        for (int64_t x = x0; x < last;) {
          Vec<T> part{};
          const int64_t end = last - x < kStretch ? last : x + kStretch;
          for (; x < end; ++x) part += load_as<T>(row_of(y) + x * stride_ + v);
          total += part;
        }
        store(to + v, total);
      }
    });
  }

  void add_residual() {
    if (p_.residual == nullptr) return;
    for_each_run(p_, begin_, end_, [&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
      const int64_t pixel = (n_ * p_.height + y) * p_.width + x0;
      const T* from = static_cast<const T*>(p_.residual) + pixel * p_.columns;
      for (int64_t b = 0; b < p_.branch_count; ++b) {
        const BranchParams& branch = p_.branches[b];
        const ptrdiff_t columns = padded(branch.out_channels);
        T* to = rows_from(s_.accumulators, branch) + at * columns;
        for (int64_t x = 0; x < x1 - x0; ++x) {
          const T* pixel_from = from + x * p_.columns + branch.column;
          for (ptrdiff_t c = 0; c < columns; c += kLanes<T>) {
            store(to + c, load(to + c) + load(pixel_from + c));
          }
          to += columns;
        }
      }
    });
  }

  // y = relu(acc * scale + shift), in place; what a projection reads goes to `activated` in E.
  void activate() {
    const T* scale = static_cast<const T*>(p_.scale);
    const T* shift = static_cast<const T*>(p_.shift);
    if (shift != nullptr) shift += n_ * p_.shift_n_stride;
    const bool narrow = kNarrow && p_.project != nullptr;
    if (scale == nullptr && shift == nullptr && !p_.relu && !narrow) return;
    for (int64_t b = 0; b < p_.branch_count; ++b) {
      const BranchParams& branch = p_.branches[b];
      const ptrdiff_t columns = padded(branch.out_channels);
      for (ptrdiff_t q = 0; q < end_ - begin_; ++q) {
        T* row = rows_from(s_.accumulators, branch) + q * columns;
        E* narrow_row = narrow ? rows_from(s_.activated, branch) + q * columns : nullptr;
        for (ptrdiff_t c = 0; c < columns; c += kLanes<T>) {
          Vec<T> v = load(row + c);
          if (scale != nullptr) v *= load(scale + branch.column + c);
          if (shift != nullptr) v += load(shift + branch.column + c);
          if (p_.relu) v = at_least<T>(v, Vec<T>{});
          if (narrow) {
            store_as<T>(narrow_row + c, v);
          } else {
            store(row + c, v);
          }
        }
        // Padding is a zero weight times x, NaN where x is infinite, and would be projected.
        for (ptrdiff_t c = branch.out_channels; p_.project != nullptr && c < columns; ++c) {
          (narrow ? narrow_row[c] : reinterpret_cast<E*>(row)[c]) = E{};
        }
      }
    }
  }

  const E* activated_rows() const {
    if constexpr (kNarrow) {
      return s_.activated;
    } else {
      return s_.accumulators;
    }
  }

  void project() {
    constexpr ptrdiff_t block = kProductBytes / sizeof(T);
    for (int64_t b = 0; b < p_.branch_count; ++b) {
      const BranchParams& branch = p_.branches[b];
      const ptrdiff_t columns = padded(branch.out_channels);
      const E* a = rows_from(activated_rows(), branch);
      for (ptrdiff_t k = 0; k < columns; k += block) {
        const ptrdiff_t count = columns - k < block ? columns - k : block;
        const Rows rows = rows_of(p_.project, (branch.column + k) * p_.project_row, p_.project_row,
                                  count, p_.project_columns);
        product(a + k, columns, rows, s_.projected, p_.project_columns, end_ - begin_,
                p_.project_columns, count, b > 0 || k > 0);
      }
    }
    T* raw = static_cast<T*>(p_.raw) + n_ * p_.height * p_.width * p_.project_columns;
    for_each_run(p_, begin_, end_, [&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
      std::memcpy(raw + (y * p_.width + x0) * p_.project_columns,
                  s_.projected + at * p_.project_columns,
                  size_t((x1 - x0) * p_.project_columns) * sizeof(T));
    });
  }

  void write() {
    with_storage(p_.out.dtype, [&](auto* tag) {
      using S = std::remove_pointer_t<decltype(tag)>;
      if constexpr (kMatches<T, S>) {
        for (int64_t b = 0; b < p_.branch_count; ++b) {
          const BranchParams& branch = p_.branches[b];
          const Plane<S> plane = plane_of<S>(p_.out, n_, branch.channel);
          for_each_run(p_, begin_, end_, [&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
            const ptrdiff_t columns = padded(branch.out_channels);
            store_row<T>(rows_from(s_.accumulators, branch) + at * columns, columns,
                         branch.out_channels, plane, y, x0, x1);
          });
        }
      }
    });
  }

  static constexpr bool kNarrow = !std::is_same_v<T, E>;

  const PyramidParams& p_;
  const int64_t n_, chunk_, begin_, end_;
  ForwardScratch<T, E> s_;
  Window window_{};
  ptrdiff_t stride_ = 0;  // channels of a staged pixel, whole vectors
};

}  // namespace aspp::ASPP_ISA
