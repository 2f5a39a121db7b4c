// SPDX-License-Identifier: BSD-3-Clause
// How an operand's tile lies in shared memory.
#pragma once

#include <cstdint>

#include "../tile_shapes.h"

namespace aspp::cuda::sm80 {

// Which index of an operand is contiguous: k, or the output's row or column.
enum class Major { k, mn };

template <plan::Pass kPass>
inline constexpr Major kMajorA = kPass == plan::Pass::grad_weight ? Major::mn : Major::k;
template <plan::Pass kPass>
inline constexpr Major kMajorB =
    kPass == plan::Pass::forward || kPass == plan::Pass::separable ? Major::k : Major::mn;

// Rows of 16-byte chunks: kExtent rows of k, or k rows of kExtent. The chunks of a row are permuted
// by its number, so that the eight rows that a warp reads at a time lie in different banks.
// Four-byte elements along mn are read four rows of k by eight elements (two chunks) at a time
// instead: there pairs of chunks move.
template <Major kMajor, int kExtent, int kBytes>
struct SharedTile {
  static constexpr int kRows = kMajor == Major::k ? kExtent : 128 / kBytes;
  static constexpr int kChunks = kMajor == Major::k ? 8 : kExtent * kBytes / 16;
  static constexpr int kPerChunk = 16 / kBytes;  // elements
  static constexpr int kSize = kRows * kChunks * 16;
  static_assert(kChunks % 8 == 0);

  __device__ __forceinline__ static int phase(int row) {
    return kMajor == Major::mn && kBytes == 4 ? (row & 3) << 1 : row & 7;
  }

  __device__ __forceinline__ static int offset(int row, int chunk) {
    return row * (kChunks * 16) + ((chunk ^ phase(row)) << 4);
  }

  // Of the element (mn, k).
  __device__ __forceinline__ static int element(int mn, int k) {
    const int row = kMajor == Major::k ? mn : k;
    const int column = kMajor == Major::k ? k : mn;
    return offset(row, column / kPerChunk) + column % kPerChunk * kBytes;
  }

  // A lane's own row and chunk, from which others are a known step away: offset(row + rows,
  // chunk + chunks), where `rows` leaves the phase as it is and `chunks` has no bit in common with
  // `chunk`. Then all that depends on the lane is worked out once.
  struct Lane {
    int start, mask;

    __device__ __forceinline__ Lane(int row, int chunk)
        : start(row * (kChunks * 16)),
          mask(chunk ^ phase(row)) {}

    __device__ __forceinline__ int operator()(int rows, int chunks) const {
      // The phase has three bits; what is above them is added, which an address does for nothing.
      return start + (((chunks & 7) ^ mask) << 4) + (rows * kChunks + (chunks & ~7)) * 16;
    }
  };
};

}  // namespace aspp::cuda::sm80
