// SPDX-License-Identifier: BSD-3-Clause
// What the depthwise kernels have in common. A block has 8 chunks of channels, 128 bytes, of 128
// pixels that are neighbours in the order of phases.cuh; thread t has chunk t % 8 of the pixels
// t / 8, t / 8 + 32, ... A tap is read straight from memory, through L1, where it is inside the
// map; where it is outside nothing is read and nothing is added, whatever the weight.
#pragma once

#include "../depthwise.h"
#include "../ptx/block.cuh"
#include "../ptx/warp.cuh"
#include "elements.cuh"
#include "phases.cuh"

namespace aspp::cuda::sm80 {

inline constexpr int kDepthwiseThreads = 256;
inline constexpr int kDepthwiseLanes = 8;  // chunks side by side
inline constexpr int kDepthwiseRows = kDepthwiseThreads / kDepthwiseLanes;
inline constexpr int kDepthwiseShare = kDepthwisePixels / kDepthwiseRows;  // pixels of a thread
inline constexpr int kDepthwiseWarps = kDepthwiseThreads / 32;
inline constexpr int kPlaceBytes = kDepthwisePixels * int(sizeof(Place));

// Where a thread works: its channels and its pixels.
template <Math kMath>
struct DepthwiseThread {
  static constexpr int kBytes = bytes_of(kMath);
  static constexpr int kCount = chunk_of(kMath);

  int32_t lane, row;
  int32_t channel;  // the first of its chunk
  bool inside;      // has channels

  __device__ __forceinline__ DepthwiseThread(const DepthwiseShape& shape, int column_tile,
                                             int thread)
      : lane(thread % kDepthwiseLanes),
        row(thread / kDepthwiseLanes),
        channel(column_tile * Elements<kMath>::kColumns + lane * kCount),
        inside(channel < shape.pitch) {}

  // This thread's channels in row `row` of what has `pitch` elements per row.
  __device__ __forceinline__ const char* at(const void* base, int64_t row, int64_t pitch) const {
    return static_cast<const char*>(base) + (row * pitch + channel) * kBytes;
  }
  __device__ __forceinline__ char* at(void* base, int64_t row, int64_t pitch) const {
    return static_cast<char*>(base) + (row * pitch + channel) * kBytes;
  }
};

// Works out where the pixels of a tile are, once for all threads of the block; index is -1 behind
// the last. Barriers must lie before, where the places of a tile are still read, and behind.
__device__ __forceinline__ void find_places(const DepthwiseShape& shape, const Phases& phases,
                                            int32_t tile, Place* places, int thread) {
  if (thread >= kDepthwisePixels) return;
  const uint32_t pixels = uint32_t(shape.batch) * uint32_t(shape.height) * uint32_t(shape.width);
  const uint32_t number = uint32_t(tile) * kDepthwisePixels + uint32_t(thread);
  places[thread] = number < pixels ? phases.pixel(int32_t(number)) : Place{-1, 0, 0};
}

// The taps of a branch that are inside the map somewhere: -rows .. rows by -columns .. columns, so
// that no offset is too long for 32 bits.
struct TapWindow {
  int32_t rows, columns;

  __device__ __forceinline__ TapWindow(const DepthwiseBranch& branch, const DepthwiseShape& shape)
      : rows(depthwise_reach(branch.kernel_h, branch.rate_h, shape.height)),
        columns(depthwise_reach(branch.kernel_w, branch.rate_w, shape.width)) {}
};

template <Math kMath>
using DepthwiseSums = typename Elements<kMath>::Values[kDepthwiseShare];

// sums[i] += taps of pixel i of this thread: of `image` [P, pitch], at +offset or, kMirrored, at
// -offset of each tap.
template <Math kMath, bool kMirrored>
__device__ __forceinline__ void add_taps(DepthwiseSums<kMath>& sums,
                                         const DepthwiseThread<kMath>& thread,
                                         const DepthwiseShape& shape, const DepthwiseBranch& branch,
                                         const void* image, int64_t pitch, const Place* places) {
  using E = Elements<kMath>;
  const TapWindow window(branch, shape);
  const int64_t pixel_bytes = pitch * E::kBytes, filter_bytes = int64_t(shape.pitch) * E::kBytes;
  int64_t at[kDepthwiseShare];  // of the pixels, in bytes
  int32_t y[kDepthwiseShare], x[kDepthwiseShare];
  uint32_t valid = 0;
#pragma unroll
  for (int i = 0; i < kDepthwiseShare; ++i) {
    const Place place = places[thread.row + i * kDepthwiseRows];
    valid |= uint32_t(thread.inside && place.index >= 0) << i;
    at[i] = place.index * pixel_bytes;
    ptx::keep(at[i]);
    y[i] = place.y;
    x[i] = place.x;
  }
  // What changes from column to column; the rest of a loop's addresses is worked out once.
  const int32_t rate = kMirrored ? -branch.rate_w : branch.rate_w;
  const int64_t rate_bytes = rate * pixel_bytes;
  const int64_t centre = int64_t(branch.kernel_h / 2) * branch.kernel_w + branch.kernel_w / 2;
  for (int32_t row = -window.rows; row <= window.rows; ++row) {
    const int32_t dy = (kMirrored ? -row : row) * branch.rate_h;
    uint32_t live_rows = 0;
#pragma unroll
    for (int i = 0; i < kDepthwiseShare; ++i)
      live_rows |= uint32_t(uint32_t(y[i] + dy) < uint32_t(shape.height)) << i;
    live_rows &= valid;
    ptx::keep(live_rows);
    if (live_rows == 0) continue;
    const int64_t first = centre + int64_t(row) * branch.kernel_w - window.columns;
    const char* filter = thread.at(branch.filter, first, shape.pitch);
    const int32_t first_dx = -window.columns * rate;
    auto dx = uint32_t(first_dx);
    const int64_t step = int64_t(dy) * shape.width + first_dx;
    const char* from = thread.at(image, step, pitch);
    for (int32_t column = -window.columns; column <= window.columns; ++column) {
      ptx::Chunk loaded[kDepthwiseShare];
      bool live[kDepthwiseShare];
#pragma unroll
      for (int i = 0; i < kDepthwiseShare; ++i) {
        live[i] = (live_rows >> i & 1) != 0 && uint32_t(x[i]) + dx < uint32_t(shape.width);
        loaded[i] = {};
        if (live[i]) loaded[i] = ptx::load_chunk(from + at[i]);
      }
      typename E::Values weight;
      E::load(filter, weight);
      filter += filter_bytes;
      from += rate_bytes;
      dx += uint32_t(rate);
#pragma unroll
      for (int i = 0; i < kDepthwiseShare; ++i) {
        if (!live[i]) continue;
        typename E::Values values;
        E::widen(loaded[i], values);
#pragma unroll
        for (int e = 0; e < E::kCount; ++e) sums[i][e] += values[e] * weight[e];
      }
    }
  }
}

// Two values for each of a chunk's channels: scale and shift; with nothing between 1 and 0.
template <Math kMath>
struct Affine {
  typename Elements<kMath>::Values scale, shift;

  __device__ __forceinline__ Affine(const void* values, const DepthwiseShape& shape,
                                    const DepthwiseThread<kMath>& thread) {
    using E = Elements<kMath>;
#pragma unroll
    for (int e = 0; e < E::kCount; ++e) scale[e] = 1, shift[e] = 0;
    if (values == nullptr || !thread.inside) return;
    const auto* const from = static_cast<const typename E::Sum*>(values) + thread.channel;
    E::load_sums(from, scale);
    E::load_sums(from + shape.pitch, shift);
  }
};

// Adds `values` over the block's rows and gives visit(lane, i, total) each of the 8 * kCount totals
// once, i below kCount. `shared` has room for kDepthwiseWarps * 8 * kCount; a barrier must lie
// between two calls.
template <int kCount, class Sum, class Visit>
__device__ __forceinline__ void sum_over_rows(Sum (&values)[kCount], Sum* shared, int thread,
                                              Visit&& visit) {
  constexpr int kOfWarp = kDepthwiseLanes * kCount;
  const int warp = thread / 32, lane = thread % 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Sum sum = values[i];
#pragma unroll
    for (int mask = kDepthwiseLanes; mask < 32; mask *= 2) sum += ptx::shuffle_xor(sum, mask);
    if (lane < kDepthwiseLanes) shared[warp * kOfWarp + i * kDepthwiseLanes + lane] = sum;
  }
  ptx::sync_block();
  for (int place = thread; place < kOfWarp; place += kDepthwiseThreads) {
    Sum total = shared[place];
    for (int other = 1; other < kDepthwiseWarps; ++other) total += shared[other * kOfWarp + place];
    visit(place % kDepthwiseLanes, place / kDepthwiseLanes, total);
  }
}

}  // namespace aspp::cuda::sm80
