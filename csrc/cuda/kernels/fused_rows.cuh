// SPDX-License-Identifier: BSD-3-Clause
// Depthwise sums from shared memory to the product's operand in shared memory.
#pragma once

#include "../ptx/warp.cuh"
#include "elements.cuh"
#include "fused_loads.cuh"

namespace aspp::cuda::sm80 {

// What a thread computes of A: the same 16 bytes of channels of kRows neighbouring rows. Eight
// neighbouring lanes have a row, so that its 128 bytes are read from all banks at once, and a warp
// has 4 * kRows neighbouring pixels, at most of which a tap is live throughout or dead throughout.
template <class C>
class FusedRows {
  using E = Elements<C::kMath>;
  using Sum = typename E::Sum;
  using Values = typename E::Values;
  static constexpr int kRows = C::kTile.m * 8 / C::kThreads;
  static constexpr int kChunk = C::kChunk;

 public:
  // For the unit with this parity, whose tables must be complete.
  __device__ __forceinline__ FusedRows(const FusedMemory<C>& memory, int parity, int thread)
      : memory_(memory),
        facts_(memory.unit(parity)),
        taps_(memory.row_taps(parity) + thread / 8 * kRows),
        row_(thread / 8 * kRows),
        chunk_(thread % 8) {
    everywhere_ = ~0u;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      everywhere_ &= taps_[i];
      somewhere_ |= taps_[i];
    }
    for (int lanes = 8; lanes < 32; lanes *= 2) {
      everywhere_ &= ptx::shuffle_xor(everywhere_, lanes);
      somewhere_ |= ptx::shuffle_xor(somewhere_, lanes);
    }
  }

  // A's rows for block `block` of the unit.
  __device__ __forceinline__ void compute(int block) const {
    const char* const pixels = memory_.pixels(block & 1) + row_ * 128 + chunk_ * 16;
    char* const a = memory_.a(block & 1);
    if (facts_.plain != 0) {  // a 1x1 of x itself; rows behind the unit's last are never stored
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        store(a, i, taps_[i] != 0 ? ptx::load_chunk(pixels + i * 128) : ptx::Chunk{});
      return;
    }
    Values sums[kRows] = {};
    const char* filter = memory_.filter(block & 1) + chunk_ * 16;
    uint32_t tap = 1;
    const int32_t columns = facts_.tap_columns, column_bytes = facts_.column_bytes;
#pragma unroll 1
    for (int32_t y = 0; y < facts_.tap_rows; ++y) {
      const char* from = pixels + y * facts_.row_bytes;
#pragma unroll 1
      for (int32_t x = 0; x < columns; ++x) {
        if (everywhere_ & tap)
          add_tap(sums, from, filter);
        else if (somewhere_ & tap)
          add_tap_where_live(sums, from, filter, tap);
        from += column_bytes;
        filter += 128;
        tap <<= 1;
      }
    }
    if (facts_.between != 0) add_between(sums, memory_.affine(block & 1));
#pragma unroll
    for (int i = 0; i < kRows; ++i) store(a, i, E::rounded(sums[i]));
  }

 private:
  __device__ __forceinline__ void add_tap(Values (&sums)[kRows], const char* from,
                                          const char* filter) const {
    ptx::Chunk x[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = ptx::load_chunk(from + i * 128);
    Values weight;
    E::load(filter, weight);
#pragma unroll
    for (int i = 0; i < kRows; ++i) add_product(sums[i], x[i], weight);
  }

  // Nothing is multiplied by what is not there.
  __device__ __forceinline__ void add_tap_where_live(Values (&sums)[kRows], const char* from,
                                                     const char* filter, uint32_t tap) const {
    Values weight;
    E::load(filter, weight);
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      if (taps_[i] & tap) add_product(sums[i], ptx::load_chunk(from + i * 128), weight);
  }

  __device__ __forceinline__ static void add_product(Values& sum, const ptx::Chunk& chunk,
                                                     const Values& weight) {
    Values x;
    E::widen(chunk, x);
#pragma unroll
    for (int c = 0; c < kChunk; ++c) sum[c] += x[c] * weight[c];
  }

  __device__ __forceinline__ void add_between(Values (&sums)[kRows], const char* affine) const {
    const Sum* const scale = reinterpret_cast<const Sum*>(affine) + chunk_ * kChunk;
    const Sum* const shift = scale + C::kTile.k;
    const bool cut = facts_.relu != 0;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        Sum& sum = sums[i][c];
        sum = sum * scale[c] + shift[c];
        if (cut) sum = relu(sum);
      }
    }
  }

  __device__ __forceinline__ void store(char* a, int i, const ptx::Chunk& chunk) const {
    ptx::store_chunk(a + C::TileA::offset(row_ + i, chunk_), chunk);
  }

  const FusedMemory<C>& memory_;
  const FusedUnit& facts_;
  const uint32_t* const taps_;  // of the thread's rows. Bit t: tap t reads inside the map
  const int32_t row_, chunk_;
  uint32_t everywhere_, somewhere_ = 0;  // the same for all, for any of the warp's rows
};

}  // namespace aspp::cuda::sm80
