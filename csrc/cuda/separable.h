// SPDX-License-Identifier: BSD-3-Clause
// The separable pyramid in one launch: what it is told, and what a block keeps in shared memory.
#pragma once

#include "launch.h"

namespace aspp::cuda {

// The pixels that a block of tile rows reads, in the order of phases (kernels/phases.cuh): where
// rows are short one run around its own, else one run for each row of taps. In it a tap's pixel is
// `pitch` away for each row of taps and its own columns.
struct Halo {
  int32_t rows = 0;     // of taps above the tile's, and as many below
  int32_t columns = 0;  // of pixels to the left of the tile, and as many to the right
  int32_t pitch = 0;
  int32_t pixels = 0;

  __host__ __device__ constexpr Halo(int32_t tile_rows, int32_t width, int32_t tap_rows,
                                     int32_t tap_columns, int32_t rate)
      : rows(tap_rows / 2),
        columns(tap_columns / 2 * rate),
        pitch(tile_rows + 2 * columns < width ? tile_rows + 2 * columns : width),
        pixels(2 * rows * pitch + tile_rows + 2 * columns) {}
};

// Live taps of a branch are bits of a word.
inline constexpr int32_t kMaxFusedTaps = 32;

// What all threads of a block have to know of a unit; in shared memory, as registers are short.
struct FusedUnit {
  int32_t k_begin, k_blocks;
  int32_t n_count;
  int32_t pixels;  // of the halo
  int32_t tap_rows, tap_columns;
  int32_t row_bytes, column_bytes;  // from a tap to the next in the halo
  int32_t plain;                    // no depthwise taps
  int32_t between, relu;
  int32_t unused;
};

// The shared memory of a block, in bytes from its beginning. Operands come in twos, one to compute
// with and one that is being loaded or written.
struct FusedLayout {
  int32_t pixels_bytes;  // of one stage: the halo's pixels, 128 bytes of channels each
  int32_t filter_bytes;  // the taps' weights, 128 bytes of channels each
  int32_t affine_bytes;  // scale and shift of these channels in the type of the sums
  int32_t b_bytes, a_bytes;
  int32_t filters, b, a, units, tables, slots, flag, total;

  // For halos of up to `pixels` and branches of up to `taps`.
  __host__ __device__ constexpr FusedLayout(TileShape tile, Math math, int32_t pixels, int32_t taps)
      : pixels_bytes(128 * pixels),
        filter_bytes(128 * taps),
        affine_bytes(2 * tile.k * (math == Math::float64 ? 8 : 4)),
        b_bytes(128 * tile.n),
        a_bytes(128 * tile.m),
        filters(2 * pixels_bytes),
        b(filters + 2 * (filter_bytes + affine_bytes)),
        a(b + 2 * b_bytes),
        units(a + 2 * a_bytes),
        tables(units + 2 * int32_t(sizeof(FusedUnit))),
        slots(tables + 2 * 2 * 4 * tile.m),
        flag(slots + 4 * pixels),
        total(flag + 16) {}
};

// As PyramidParams of Pass::separable: a = x, weights are pointwise ones [O, weight_channels].
struct SeparableParams : PyramidParams {
  int32_t pixels, taps;  // of the widest halo, of the branch with most
  uint64_t between;      // bit b: branch b has something between
  int32_t between_relu;
  // Per branch [taps, weight_channels], null for a plain 1x1; and where something is between
  // [2, weight_channels] in the type of the sums. Zero beyond the channels.
  const void* filters[kMaxBranches];
  const void* affines[kMaxBranches];
};

static_assert(sizeof(SeparableParams) <= 4096, "kernel parameters have 4 KB");
static_assert(kMaxBranches <= 64, "branches are bits of a word");

// params.workers blocks of tile_shape(math, shape). Not for float64.
cudaError_t launch_separable_sm80(Math math, int shape, const SeparableParams& params,
                                  cudaStream_t stream);

}  // namespace aspp::cuda
