// SPDX-License-Identifier: BSD-3-Clause
// From global memory to the ring of stages. A loader walks a worker's units k block by k block,
// `kStages - 1` blocks ahead of the products and across the ends of units.
#pragma once

#include <type_traits>

#include "../ptx/cp_async.cuh"
#include "config.cuh"

namespace aspp::cuda::sm80 {

// The k blocks of a worker's units, one after the other; units without any are passed over.
class Cursor {
 public:
  __device__ __forceinline__ Cursor(const PyramidParams& p, int worker)
      : p_(p),
        unit_(p.worker_begin[worker] - 1),
        end_(p.worker_begin[worker + 1]) {
    next_unit();
  }

  __device__ __forceinline__ bool done() const { return unit_ >= end_; }
  __device__ __forceinline__ const WorkUnit& unit() const { return p_.units[unit_]; }
  __device__ __forceinline__ int32_t left() const { return left_; }

  // Whether this was the unit's last block.
  __device__ __forceinline__ bool next() {
    if (--left_ > 0) return false;
    next_unit();
    return true;
  }

 private:
  __device__ __forceinline__ void next_unit() {
    left_ = 0;
    while (left_ == 0 && ++unit_ < end_) left_ = unit().k_end - unit().k_begin;
  }

  const PyramidParams& p_;
  int32_t unit_, end_, left_ = 0;
};

// forward and grad_input. Rows of A are pixels, moved by the tap; rows of B are output channels
// (forward) or the channels summed over (grad_input).
template <class C>
class PixelRows {
  using A = Share<typename C::TileA, C::kThreads>;
  using B = Share<typename C::TileB, C::kThreads>;
  static constexpr bool kForward = C::kPass == Pass::forward;

 public:
  static constexpr bool kPrepares = false;

  __device__ __forceinline__ PixelRows(const PyramidParams& p, char*, int worker, int thread)
      : p_(p),
        cursor_(p, worker),
        thread_(thread) {
    if (!cursor_.done()) begin_unit();
  }

  __device__ __forceinline__ void prepare() {}

  __device__ __forceinline__ void load(char* stage) {
    if (cursor_.done()) return;
    const int32_t k = block_ * C::kTile.k;
    load_a(stage, k + A::chunk(thread_) * C::kChunk);
    load_b(stage + C::TileA::kSize, k);
    if (cursor_.next()) {
      if (!cursor_.done()) begin_unit();
    } else if (++block_ == blocks_) {
      block_ = 0;
      ++tap_;
      begin_tap();
    }
  }

 private:
  __device__ __forceinline__ void begin_unit() {
    const WorkUnit& unit = cursor_.unit();
    const WorkRegion& region = p_.regions[unit.region];
#pragma unroll
    for (int i = 0; i < A::kCount; ++i)
      pixel_[i] = pixel_of(p_, region, unit.m_begin + row_of(i, unit)).index;
    tap_ = unit.first_tap;
    block_ = unit.first_block;
    begin_tap();
  }

  // Everything that changes with the tap; what follows only adds.
  __device__ __forceinline__ void begin_tap() {
    const WorkTap tap = p_.taps[tap_];
    const BranchOperand& branch = p_.branches[tap.branch];
    const WorkUnit& unit = cursor_.unit();
    const WorkRegion& region = p_.regions[unit.region];
    blocks_ = tap.blocks;
    shift_ = tap.dy * p_.width + tap.dx;
    if constexpr (kForward)
      branch_ = tap.branch;
    else
      channel_ = branch.a_channel;
    live_ = 0;
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      bool live = A::row(thread_) + i * A::kRowStep < unit.m_count;
      if (region.padded != 0) {  // worked out again, not kept: registers are short
        const Pixel pixel = pixel_of(p_, region, unit.m_begin + row_of(i, unit));
        live = live && uint32_t(pixel.y + tap.dy) < uint32_t(p_.height) &&
               uint32_t(pixel.x + tap.dx) < uint32_t(p_.width);
      }
      live_ |= uint32_t(live) << i;
    }
    const int64_t pitch = int64_t(branch.taps) * p_.weight_channels;
    const int64_t element = int64_t(tap.index) * p_.weight_channels;
    weight_pitch_ = pitch * int64_t(sizeof(typename C::Memory));
    if constexpr (kForward) {
      channels_ = p_.weight_channels;
      rows_ = unit.n_count;
      weight_ = at(branch.weight, element + (unit.n_begin + B::row(thread_)) * pitch +
                                      B::chunk(thread_) * C::kChunk);
    } else {
      channels_ = rounded_up(branch.out_channels, C::kChunk);
      rows_ = branch.out_channels;
      const int32_t column = unit.n_begin + B::chunk(thread_) * C::kChunk;
      column_live_ = column < p_.weight_channels;
      weight_ = at(branch.weight, element + B::row(thread_) * pitch + column);
    }
  }

  // A row of the tile; the last where the unit has fewer.
  __device__ __forceinline__ int32_t row_of(int i, const WorkUnit& unit) const {
    return min(A::row(thread_) + i * A::kRowStep, unit.m_count - 1);
  }

  __device__ __forceinline__ void load_a(char* tile, int32_t channel) {
    const bool inside = channel < channels_;
    const BranchOperand& branch = p_.branches[branch_];
    const char* from = kForward ? at(branch.a, channel) : at(p_.a, channel_ + channel);
    const int32_t pitch =
        (kForward ? branch.a_pitch : p_.a_pitch) * int32_t(sizeof(typename C::Memory));
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      char* to = tile + C::TileA::offset(A::row(thread_) + i * A::kRowStep, A::chunk(thread_));
      const int32_t pixel = int32_t(uint32_t(pixel_[i]) + uint32_t(shift_));  // if it is inside
      ptx::cp_async_16(to, from + int64_t(pixel) * pitch, inside && (live_ >> i & 1));
    }
  }

  __device__ __forceinline__ void load_b(char* tile, int32_t k) {
    const int32_t first = B::row(thread_);
    const char* from = weight_;
    if constexpr (kForward)
      from += int64_t(k) * int64_t(sizeof(typename C::Memory));
    else
      from += k * weight_pitch_;
#pragma unroll
    for (int i = 0; i < B::kCount; ++i) {
      const int32_t row = first + i * B::kRowStep;
      const bool inside = kForward ? row < rows_ && k + B::chunk(thread_) * C::kChunk < channels_
                                   : column_live_ && k + row < rows_;
      ptx::cp_async_16(tile + C::TileB::offset(row, B::chunk(thread_)), from, inside);
      from += B::kRowStep * weight_pitch_;
    }
  }

  __device__ __forceinline__ static const char* at(const void* base, int64_t element) {
    return static_cast<const char*>(base) + element * int64_t(sizeof(typename C::Memory));
  }

  const PyramidParams& p_;
  Cursor cursor_;
  const int thread_;
  int32_t tap_ = 0, block_ = 0, blocks_ = 0;
  int32_t channels_ = 0, rows_ = 0;
  bool column_live_ = false;
  uint32_t live_ = 0;         // bit i: row i of A reads inside the map
  int32_t pixel_[A::kCount];  // of each row
  int32_t shift_ = 0;         // from a pixel to the one that the tap reads
  int32_t branch_ = 0;        // forward: whose A is read
  int32_t channel_ = 0;       // grad_input: of A, the branch's first
  const char* weight_ = nullptr;
  int64_t weight_pitch_ = 0;  // in bytes
};

// grad_weight. Both operands' rows are the pixels of a k block: of grad, and of x where the tap
// read it. The pixels are worked out once per block by its first threads, a block ahead of the
// loads.
template <class C>
class PixelSums {
  using A = Share<typename C::TileA, C::kThreads>;
  using B = Share<typename C::TileB, C::kThreads>;
  static constexpr int kRows = C::kTile.k;

 public:
  static constexpr bool kPrepares = true;
  static_assert(kRows <= C::kThreads && 2 * kRows * sizeof(int32_t) <= 1024 - 16);

  __device__ __forceinline__ PixelSums(const PyramidParams& p, char* table, int worker, int thread)
      : p_(p),
        cursor_(p, worker),
        ahead_(p, worker),
        table_(reinterpret_cast<int32_t*>(table)),
        thread_(thread) {
    if (!cursor_.done()) begin_unit();
  }

  // Writes the pixels that the next call of load() reads, -1 where there is none. A barrier must
  // lie between the two.
  __device__ __forceinline__ void prepare() {
    if (ahead_.done()) return;
    if (thread_ < kRows) {
      const WorkUnit& unit = ahead_.unit();
      const WorkRegion& region = p_.regions[unit.region];
      const int64_t number = int64_t(unit.k_end - ahead_.left()) * kRows + thread_;
      const int64_t pixels = int64_t(p_.batch) * region.height * region.width;
      table_[written_ * kRows + thread_] =
          number < pixels ? pixel_of(p_, region, int32_t(number)).index : -1;
    }
    written_ ^= 1;
    ahead_.next();
  }

  __device__ __forceinline__ void load(char* stage) {
    if (cursor_.done()) return;
    const int32_t* pixels = table_ + read_ * kRows;
#pragma unroll
    for (int i = 0; i < A::kCount; ++i) {
      const int32_t row = A::row(thread_) + i * A::kRowStep;
      ptx::cp_async_16(stage + C::TileA::offset(row, A::chunk(thread_)),
                       a_ + int64_t(pixels[row]) * p_.a_pitch, a_live_ && pixels[row] >= 0);
    }
#pragma unroll
    for (int i = 0; i < B::kCount; ++i) {
      const int32_t row = B::row(thread_) + i * B::kRowStep;
      ptx::cp_async_16(stage + C::TileA::kSize + C::TileB::offset(row, B::chunk(thread_)),
                       b_ + int64_t(pixels[row]) * p_.b_pitch, b_live_ && pixels[row] >= 0);
    }
    read_ ^= 1;
    if (cursor_.next() && !cursor_.done()) begin_unit();
  }

 private:
  using Memory = typename C::Memory;

  __device__ __forceinline__ void begin_unit() {
    const WorkUnit& unit = cursor_.unit();
    const WorkTap tap = p_.taps[p_.regions[unit.region].tap_begin];
    const BranchOperand& branch = p_.branches[tap.branch];
    const int32_t m = unit.m_begin + A::chunk(thread_) * C::kChunk;
    const int32_t n = unit.n_begin + B::chunk(thread_) * C::kChunk;
    a_live_ = m < branch.out_channels;
    b_live_ = n < p_.in_channels;
    a_ = static_cast<const Memory*>(p_.a) + branch.a_channel + m;
    b_ = static_cast<const Memory*>(p_.b) + n + int64_t(tap.dy * p_.width + tap.dx) * p_.b_pitch;
  }

  const PyramidParams& p_;
  Cursor cursor_, ahead_;
  int32_t* const table_;
  const int thread_;
  int read_ = 0, written_ = 0;
  const Memory* a_ = nullptr;
  const Memory* b_ = nullptr;
  bool a_live_ = false, b_live_ = false;
};

template <class C>
using Loader = std::conditional_t<C::kPass == Pass::grad_weight, PixelSums<C>, PixelRows<C>>;

}  // namespace aspp::cuda::sm80
