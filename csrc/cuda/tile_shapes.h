// SPDX-License-Identifier: BSD-3-Clause
// The tiles that the kernels come in, and which of them a problem takes.
#pragma once

#include <cstdint>

#include "params.h"

namespace aspp::cuda {

// A kernel's tile and what a block of it takes. A row of k is 128 bytes in every math.
struct TileShape {
  int32_t m, n, k, tail;   // as plan::Tile: k in elements
  int32_t warp_m, warp_n;  // what one warp computes
  int32_t stages;          // of the ring that operands are loaded into
  int32_t blocks;          // that a processor can run at a time, registers and memory permitting

  constexpr int32_t warps() const { return m / warp_m * (n / warp_n); }
  constexpr int32_t threads() const { return 32 * warps(); }
  constexpr int32_t stage_bytes() const { return (m + n) * 128; }
  // Behind the ring: the pixels of two k blocks (grad_weight) and a flag.
  constexpr int32_t shared_bytes() const { return stages * stage_bytes() + 1024; }
  plan::Tile tile() const { return {m, n, k, tail}; }
};

// The tiles of a math, widest first; those without tensor cores have the second only.
inline constexpr int kShapes = 2;

constexpr int first_shape(Math math) { return math <= Math::tf32 ? 0 : 1; }

constexpr TileShape tile_shape(Math math, int index) {
  const int32_t k = 128 / bytes_of(math);
  if (math == Math::float64) return {64, 64, k, 32, 32, 32, 3, 1};
  if (index == 1) return {128, 128, k, 64, 64, 32, 3, 1};
  return {128, 256, k, 64, 64, 64, 3, 1};
}

// The index of the widest tile that fits in `shared_bytes` per block and whose columns are less
// than twice the output's `n`; the narrowest if there is none. -1 where even that does not fit.
constexpr int pick_shape(Math math, int64_t n, int64_t shared_bytes) {
  for (int index = first_shape(math); index < kShapes; ++index) {
    const TileShape shape = tile_shape(math, index);
    const bool last = index + 1 == kShapes;
    if (shape.shared_bytes() <= shared_bytes && (last || shape.n < 2 * n)) return index;
  }
  return -1;
}

}  // namespace aspp::cuda
