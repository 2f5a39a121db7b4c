// SPDX-License-Identifier: BSD-3-Clause
// What batch normalisation needs of the result: per channel and warp, how many values there are,
// their mean and the sum of their squared differences from it. Of the rounded values, which are
// what PyTorch's would see.
#pragma once

#include "epilogue.cuh"

namespace aspp::cuda::sm80 {

template <class C>
struct Statistics {
  using Sum = typename C::Sum;
  using WarpSums = typename C::WarpSums;
  static constexpr int kWarpRows = C::kTile.m / C::kTile.warp_m;

  // Called by every warp, also by those beyond the end of the output.
  __device__ __forceinline__ static void write(const WorkParams& p, const WorkUnit& unit,
                                               const WarpSums& sums, const WarpPlace& place) {
    if (p.tile_counts == nullptr) return;
    const int32_t count = max(0, min(C::kTile.warp_m, unit.m_count - place.row));
    const int64_t part = int64_t(unit.tile) * kWarpRows + place.row / C::kTile.warp_m;
    if (place.column == 0 && place.g == 0 && place.t == 0)
      ptx::store<int32_t>(p.tile_counts, part, count);
    if (count == 0 || place.column >= unit.n_count) return;
#pragma unroll
    for (int j = 0; j < C::kTile.warp_n / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto over_rows = [&](Sum mean, bool squared) {
          Sum sum = 0;
#pragma unroll
          for (int i = 0; i < C::kTile.warp_m / 16; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const Sum value = rounded(sums[i][j][2 * h + e]) - mean;
              if (place.row_of(i, h) < unit.m_count) sum += squared ? value * value : value;
            }
          for (int lanes = 4; lanes < 32; lanes *= 2) sum += ptx::shuffle_xor(sum, lanes);
          return sum;
        };
        const Sum mean = over_rows(0, false) / Sum(count);
        const Sum squares = over_rows(mean, true);
        const int32_t column = place.column_of(j, e);
        if (place.g != 0 || column >= unit.n_count) continue;
        ptx::store<Sum>(p.tile_means, part * C::kTile.n + column, mean);
        ptx::store<Sum>(p.tile_squares, part * C::kTile.n + column, squares);
      }
  }

 private:
  __device__ __forceinline__ static Sum rounded(Sum sum) {
    return ptx::to_float(ptx::from_float<typename C::Memory>(sum));
  }
};

}  // namespace aspp::cuda::sm80
