// SPDX-License-Identifier: BSD-3-Clause
// From a warp's sums to memory.
#pragma once

#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"
#include "config.cuh"

namespace aspp::cuda::sm80 {

// The part of a unit that a warp computes. Rows and columns count from the unit's first.
struct WarpPlace {
  int32_t row, column;  // first of the warp
  int32_t g, t;         // lane / 4, lane % 4

  __device__ __forceinline__ int32_t row_of(int i, int h) const { return row + 16 * i + 8 * h + g; }
  __device__ __forceinline__ int32_t column_of(int j, int e) const {
    return column + 8 * j + 2 * t + e;
  }
};

// values[q] of lane t of each four becomes values[t] of lane q.
__device__ __forceinline__ void transpose_quad(uint32_t (&values)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (t & bit) != 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (q & bit) continue;
      const uint32_t sent = upper ? values[q] : values[q | bit];
      const uint32_t got = ptx::shuffle_xor(sent, bit);
      (upper ? values[q] : values[q | bit]) = got;
    }
  }
}

template <class C>
struct Epilogue {
  using Memory = typename C::Memory;
  using Sum = typename C::Sum;
  using Params = typename C::Params;
  using WarpSums = typename C::WarpSums;
  static constexpr int kRows = C::kTile.warp_m / 16, kColumns = C::kTile.warp_n / 8;

  __device__ __forceinline__ static Sum read(const void* values, int64_t index) {
    return ptx::to_float(ptx::load<Memory>(values, index));
  }

  // sums = relu(sums * scale + shift)
  __device__ __forceinline__ static void transform(const Params& p, const WorkUnit& unit,
                                                   WarpSums& sums, const WarpPlace& place) {
    const WorkRegion& region = p.regions[unit.region];
    const int32_t first = p.branches[region.branch].out_channel + unit.n_begin;
    if (p.scale != nullptr)
      for_each_column(p.scale, first, unit, place, [&](int j, int e, Sum scale) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          sums[i][j][e] *= scale;
          sums[i][j][2 + e] *= scale;
        }
      });
    if (p.shift != nullptr) add_shift(p, unit, sums, place, first);
    if (p.relu == 0) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (Sum& sum : sums[i][j]) sum = sum < Sum(0) ? Sum(0) : sum;  // a NaN stays
  }

  // Writes what lies inside the output. `pixels` has those of the unit's rows where they are not
  // in the region's linear order.
  __device__ __forceinline__ static void store(const Params& p, const WorkUnit& unit,
                                               const WarpSums& sums, const WarpPlace& place,
                                               const int32_t* pixels = nullptr) {
    Memory* out = row_of_output(p, unit, place.row_of(0, 0), pixels);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        ptx::sync_warp();  // holds the next row's addresses back, which would not fit in registers
        const int32_t row = place.row_of(i, h);
        const bool inside = row < unit.m_count;
        if constexpr (C::kPass != Pass::grad_weight)
          out = row_of_output(p, unit, inside ? row : 0, pixels);
        else if (i + h > 0)
          out += 8 * weight_pitch(p, unit);
        if constexpr (C::kBytes == 2)
          store_halves(out, unit, sums, place, i, h, inside);
        else if (inside)
          store_pairs(out, unit, sums, place, i, h);
      }
  }

 private:
  // visit(j, e, values[first + column]) for the columns of this thread that lie inside.
  template <class Visit>
  __device__ __forceinline__ static void for_each_column(const void* values, int64_t first,
                                                         const WorkUnit& unit,
                                                         const WarpPlace& place, Visit&& visit) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      ptx::sync_warp();  // as in store()
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t column = place.column_of(j, e);
        if (column < unit.n_count) visit(j, e, read(values, first + column));
      }
    }
  }

  // Sample by sample: a tile's rows are of few, each of them of neighbouring rows.
  __device__ __forceinline__ static void add_shift(const Params& p, const WorkUnit& unit,
                                                   WarpSums& sums, const WarpPlace& place,
                                                   int32_t first) {
    const WorkRegion& region = p.regions[unit.region];
    const int32_t area = p.shift_pitch == 0 ? INT32_MAX : region.height * region.width;
    const int32_t begin = p.shift_pitch == 0 ? 0 : unit.m_begin;
    for (int32_t sample = begin / area; sample <= (begin + unit.m_count - 1) / area; ++sample) {
      const int32_t row = place.row + place.g + begin - sample * area;  // of i = h = 0, in it
      for_each_column(p.shift, sample * p.shift_pitch + first, unit, place,
                      [&](int j, int e, Sum shift) {
#pragma unroll
                        for (int i = 0; i < kRows; ++i)
#pragma unroll
                          for (int h = 0; h < 2; ++h)
                            if (uint32_t(row + 16 * i + 8 * h) < uint32_t(area))
                              sums[i][j][2 * h + e] += shift;
                      });
    }
  }

  // From output channel to output channel of a weight.
  __device__ __forceinline__ static int64_t weight_pitch(const Params& p, const WorkUnit& unit) {
    return int64_t(p.branches[p.regions[unit.region].branch].taps) * p.grad_weight_channels;
  }

  // The unit's first column in its `row`.
  __device__ __forceinline__ static Memory* row_of_output(const Params& p, const WorkUnit& unit,
                                                          int32_t row, const int32_t* pixels) {
    const WorkRegion& region = p.regions[unit.region];
    if constexpr (C::kPass == Pass::grad_weight) {
      return static_cast<Memory*>(p.branches[region.branch].grad_weight) +
             (unit.m_begin + row) * weight_pitch(p, unit) +
             int64_t(p.taps[region.tap_begin].index) * p.grad_weight_channels + unit.n_begin;
    } else {
      constexpr bool kOwn = C::kPass == Pass::separable;
      const int64_t pixel = kOwn ? pixels[row] : pixel_of(p, region, unit.m_begin + row).index;
      const int32_t first =
          C::kPass == Pass::grad_input ? 0 : p.branches[region.branch].out_channel;
      return static_cast<Memory*>(p.out) + pixel * p.out_pitch + first + unit.n_begin;
    }
  }

  // Lanes of four exchange their pairs, so that each writes eight neighbours.
  __device__ __forceinline__ static void store_halves(Memory* out, const WorkUnit& unit,
                                                      const WarpSums& sums, const WarpPlace& place,
                                                      int i, int h, bool inside) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 4) {
      uint32_t words[4];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        words[q] = ptx::pack<Memory>(sums[i][j + q][2 * h], sums[i][j + q][2 * h + 1]);
      transpose_quad(words, place.t);
      const int32_t column = place.column + 8 * (j + place.t);
      if (!inside || column >= unit.n_count) continue;
      Memory* to = out + column;
      if (column + 8 <= unit.n_count && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        ptx::store_chunk(to, ptx::Chunk{{words[0], words[1], words[2], words[3]}});
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (column + e < unit.n_count)
            ptx::store<Memory>(to, e, {static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16))});
      }
    }
  }

  __device__ __forceinline__ static void store_pairs(Memory* out, const WorkUnit& unit,
                                                     const WarpSums& sums, const WarpPlace& place,
                                                     int i, int h) {
    struct alignas(2 * sizeof(Memory)) Pair {
      Memory first, second;
    };
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int32_t column = place.column_of(j, 0);
      const Memory first = sums[i][j][2 * h], second = sums[i][j][2 * h + 1];
      Memory* to = out + column;
      if (column + 2 <= unit.n_count && reinterpret_cast<uintptr_t>(to) % sizeof(Pair) == 0) {
        ptx::store<Pair>(to, 0, {first, second});
      } else {
        if (column < unit.n_count) ptx::store<Memory>(to, 0, first);
        if (column + 1 < unit.n_count) ptx::store<Memory>(to, 1, second);
      }
    }
  }
};

}  // namespace aspp::cuda::sm80
