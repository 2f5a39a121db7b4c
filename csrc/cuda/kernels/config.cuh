// SPDX-License-Identifier: BSD-3-Clause
// One instantiation of the kernel: a pass, a math, a tile.
#pragma once

#include <type_traits>

#include "../separable.h"
#include "warp_math.cuh"

namespace aspp::cuda::sm80 {

using plan::Pass;

template <Pass kPass_, Math kMath_, int kShape>
struct Config {
  static constexpr Pass kPass = kPass_;
  static constexpr Math kMath = kMath_;
  static constexpr TileShape kTile = tile_shape(kMath, kShape);
  static constexpr int kBytes = bytes_of(kMath);
  static constexpr int kChunk = chunk_of(kMath);
  static constexpr int kThreads = kTile.threads();
  static constexpr int kWarpColumns = kTile.n / kTile.warp_n;
  static constexpr int kStageBytes = kTile.stage_bytes();
  static constexpr int kRingBytes = kTile.stages * kStageBytes;
  static constexpr int kStages = kTile.stages;

  using Memory = typename Element<kMath>::Memory;
  using Sum = typename Element<kMath>::Sum;
  using TileA = SharedTile<kMajorA<kPass>, kTile.m, kBytes>;
  using TileB = SharedTile<kMajorB<kPass>, kTile.n, kBytes>;
  using Warp = typename PickWarpMath<kMath, TileA, TileB, kMajorA<kPass>, kMajorB<kPass>,
                                     kTile.warp_m, kTile.warp_n>::Type;
  // What a kernel of this pass is told.
  using Params = std::conditional_t<kPass == Pass::separable, SeparableParams, PyramidParams>;
  using WarpSums = Sums<Sum, kTile.warp_m, kTile.warp_n>;

  static_assert(TileA::kSize + TileB::kSize == kStageBytes);
  static_assert(kThreads % TileA::kChunks == 0 && kThreads % TileB::kChunks == 0);
};

// Where a thread's chunks of a tile are: always the same chunk of a row, kRowStep rows apart.
template <class Tile, int kThreads>
struct Share {
  static constexpr int kRowStep = kThreads / Tile::kChunks;
  static constexpr int kCount = Tile::kRows / kRowStep;
  static_assert(Tile::kRows % kRowStep == 0);

  __device__ __forceinline__ static int chunk(int thread) { return thread % Tile::kChunks; }
  __device__ __forceinline__ static int row(int thread) { return thread / Tile::kChunks; }
};

// A pixel of the batch and where it is on the map.
struct Pixel {
  int32_t index;  // (n * height + y) * width + x
  int32_t n, y, x;
};

// The pixel with number `number` of a region.
__device__ __forceinline__ Pixel pixel_of(const WorkParams& p, const WorkRegion& region,
                                          int32_t number) {
  const int32_t row = number / region.width;
  Pixel pixel;
  pixel.n = row / region.height;
  pixel.y = region.y + row - pixel.n * region.height;
  pixel.x = region.x + number - row * region.width;
  pixel.index = (pixel.n * p.height + pixel.y) * p.width + pixel.x;
  return pixel;
}

__device__ __forceinline__ int32_t rounded_up(int32_t value, int32_t step) {
  return (value + step - 1) / step * step;
}

}  // namespace aspp::cuda::sm80
