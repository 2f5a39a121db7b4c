// SPDX-License-Identifier: BSD-3-Clause
// What a block of the fused separable kernel keeps in shared memory. Plain arithmetic, for the host
// and for the kernel.
#pragma once

#include <cstdint>

#include "tile_shapes.h"

#if defined(__CUDACC__)
#define ASPP_BOTH __host__ __device__
#else
#define ASPP_BOTH
#endif

namespace aspp::cuda {

// Live taps of a branch are bits of a word.
inline constexpr int32_t kMaxFusedTaps = 32;

// The pixels that a block of tile rows reads, in the order of phases (kernels/phases.cuh): where
// rows are short one run around its own, else one run for each row of taps. In it a tap's pixel is
// `pitch` away for each row of taps and its own columns.
struct Halo {
  int32_t rows = 0;     // of taps above the tile's, and as many below
  int32_t columns = 0;  // of pixels to the left of the tile, and as many to the right
  int32_t pitch = 0;
  int32_t pixels = 0;

  // Where count() fits.
  ASPP_BOTH constexpr Halo(int32_t tile_rows, int32_t width, int32_t tap_rows, int32_t tap_columns,
                           int32_t rate)
      : rows(tap_rows / 2),
        columns(tap_columns / 2 * rate),
        pitch(tile_rows + 2 * columns < width ? tile_rows + 2 * columns : width),
        pixels(2 * rows * pitch + tile_rows + 2 * columns) {}

  // `pixels`, of any size; the product of rows and pitch must fit in 64 bits.
  static constexpr int64_t count(int64_t tile_rows, int64_t width, int64_t tap_rows,
                                 int64_t tap_columns, int64_t rate) {
    const int64_t run = tile_rows + 2 * (tap_columns / 2 * rate);
    return 2 * (tap_rows / 2) * (run < width ? run : width) + run;
  }
};

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
  ASPP_BOTH constexpr FusedLayout(TileShape tile, Math math, int32_t pixels, int32_t taps)
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
        flag(slots + (4 * pixels + 15) / 16 * 16),
        total(flag + 16) {}
};

}  // namespace aspp::cuda
