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

// How far the taps of a group reach: columns to each side, and how many rows for one of outputs.
struct Reach {
  ptrdiff_t across = 0, rows = 1;
};
inline Reach reach_of(const PyramidParams& p, const Group& group) {
  Reach reach;
  for (int64_t b = group.first; b < group.last; ++b) {
    const BranchParams& branch = p.branches[b];
    const ptrdiff_t across = branch.kernel_w / 2 * branch.rate_w;
    if (across > reach.across) reach.across = across;
    reach.rows += branch.kernel_h - 1;
  }
  return reach;
}

// Pixels the largest chunk of a group can have staged: a chunk that begins at the end of a row, or,
// where rows are as long as chunks, a piece of one row with its halo.
inline ptrdiff_t most_staged(const PyramidParams& p, const Group& group) {
  const auto least = [](ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; };
  const Reach reach = reach_of(p, group);
  const bool pieces = p.width >= p.chunk_pixels;
  const ptrdiff_t rows = pieces ? 1 : (p.width + p.chunk_pixels - 2) / p.width + 1;
  const ptrdiff_t across = pieces ? least(p.chunk_pixels + 2 * reach.across, p.width) : p.width;
  return least(rows * reach.rows, p.height) * across;
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
  ChunkForward(const PyramidParams& p, int64_t n, int64_t chunk, const Run* runs, int64_t run_count,
               void* scratch)
      : p_(p),
        n_(n),
        chunk_(chunk),
        runs_(runs),
        run_count_(run_count),
        s_(lay_out_forward<T, E>(p, scratch)) {
    for_each_run([this](int64_t, int64_t x0, int64_t x1, int64_t) { pixels_ += x1 - x0; });
  }

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
  // Calls body(row y, x0, x1, first pixel within the chunk) for each run.
  template <typename F>
  void for_each_run(F&& body) const {
    int64_t at = 0;
    for (const Run* run = runs_; run < runs_ + run_count_; ++run) {
      body(run->y, run->x0, run->x1, at);
      at += run->x1 - run->x0;
    }
  }

  // Staged columns: all, where sums of rows are wanted.
  void set_window(const Group& group) {
    const bool rows = p_.sum_rows && p_.pixel_sums != nullptr;
    const ptrdiff_t reach = reach_of(p_, group).across;
    window_ = {rows ? 0 : p_.width, rows ? p_.width : 0};
    for_each_run([&](int64_t, int64_t x0, int64_t x1, int64_t) {
      const int64_t left = x0 < reach ? 0 : x0 - reach;
      const int64_t right = x1 + reach > p_.width ? p_.width : x1 + reach;
      if (left < window_.x0) window_.x0 = left;
      if (right > window_.x1) window_.x1 = right;
    });
  }

  void run_group(const Group& group) {
    set_window(group);
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
    for_each_run([&](int64_t y, int64_t, int64_t, int64_t) {
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
    for_each_run([&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
      depthwise_row(
          d, y, x0, x1, [this](ptrdiff_t row) { return row_of(row); }, s_.depthwise + at * stride_,
          stride_);
    });
    const Rows weight = rows_of(branch.weight, c * branch.weight_row, branch.weight_row, channels,
                                padded(branch.out_channels));
    multiply(branch, weight, s_.depthwise, 0, pixels_, channels, c > 0);
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
      for_each_run([&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
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
    for_each_run([&](int64_t y, int64_t x0, int64_t x1, int64_t) {
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
    for_each_run([&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
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
      for (ptrdiff_t q = 0; q < pixels_; ++q) {
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
        product(a + k, columns, rows, s_.projected, p_.project_columns, pixels_, p_.project_columns,
                count, b > 0 || k > 0);
      }
    }
    T* raw = static_cast<T*>(p_.raw) + n_ * p_.height * p_.width * p_.project_columns;
    for_each_run([&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
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
          for_each_run([&](int64_t y, int64_t x0, int64_t x1, int64_t at) {
            const ptrdiff_t columns = padded(branch.out_channels);
            T* rows = rows_from(s_.accumulators, branch) + at * columns;
            if constexpr (std::is_same_v<S, T>) {
              if (p_.accumulate) add_row(plane, y, x0, x1, branch.out_channels, rows, columns);
            }
            store_row<T>(rows, columns, branch.out_channels, plane, y, x0, x1);
          });
        }
      }
    });
  }

  static constexpr bool kNarrow = !std::is_same_v<T, E>;

  const PyramidParams& p_;
  const int64_t n_, chunk_;
  const Run* const runs_;
  const int64_t run_count_;
  int64_t pixels_ = 0;
  ForwardScratch<T, E> s_;
  struct {
    ptrdiff_t x0 = 0, x1 = 0;
  } window_;
  ptrdiff_t stride_ = 0;  // channels of a staged pixel, whole vectors
};

}  // namespace aspp::ASPP_ISA
