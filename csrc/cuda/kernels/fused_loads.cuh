// SPDX-License-Identifier: BSD-3-Clause
// From global memory to what a block of the separable pyramid has in shared memory.
#pragma once

#include "../ptx/block.cuh"
#include "../ptx/cp_async.cuh"
#include "../separable.h"
#include "config.cuh"
#include "phases.cuh"

namespace aspp::cuda::sm80 {

// A region's taps, which are one rectangle, and the pixels around a tile that they read.
struct FusedRegion {
  WorkRun run;
  int32_t rows;  // of taps
  Halo halo;
  Phases phases;

  __device__ __forceinline__ FusedRegion(const WorkParams& p, const WorkRegion& region,
                                         int32_t tile_rows)
      : run(p.runs[region.run_begin]),
        rows(run.count / run.columns),
        halo(tile_rows, p.width, rows, run.columns, run.dx_step),
        phases(p.height, p.width, rows > 1 ? run.dy_step : 1) {}
};

// Where things lie in shared memory.
template <class C>
struct FusedMemory {
  char* shared;
  FusedLayout layout;

  __device__ __forceinline__ explicit FusedMemory(const SeparableParams& p)
      : shared(ptx::shared_memory()),
        layout(C::kTile, C::kMath, p.halo_pixels, p.most_taps) {}

  __device__ __forceinline__ char* pixels(int stage) const {
    return shared + stage * layout.pixels_bytes;
  }
  // The taps' weights, then scale and shift.
  __device__ __forceinline__ char* filter(int stage) const {
    return shared + layout.filters + stage * (layout.filter_bytes + layout.affine_bytes);
  }
  __device__ __forceinline__ char* affine(int stage) const {
    return filter(stage) + layout.filter_bytes;
  }
  __device__ __forceinline__ char* b(int stage) const {
    return shared + layout.b + stage * layout.b_bytes;
  }
  __device__ __forceinline__ char* a(int stage) const {
    return shared + layout.a + stage * layout.a_bytes;
  }
  __device__ __forceinline__ FusedUnit& unit(int parity) const {
    return reinterpret_cast<FusedUnit*>(shared + layout.units)[parity];
  }
  // Of each row of the tile of a unit with this parity: its pixel, and which taps are live at it.
  __device__ __forceinline__ int32_t* row_pixels(int parity) const {
    return reinterpret_cast<int32_t*>(shared + layout.tables) + 2 * parity * C::kTile.m;
  }
  __device__ __forceinline__ uint32_t* row_taps(int parity) const {
    return reinterpret_cast<uint32_t*>(row_pixels(parity) + C::kTile.m);
  }
  // The halo's pixels; -1 where no tap of the tile reads one.
  __device__ __forceinline__ int32_t* slots() const {
    return reinterpret_cast<int32_t*>(shared + layout.slots);
  }
  __device__ __forceinline__ uint32_t* flag() const {
    return reinterpret_cast<uint32_t*>(shared + layout.flag);
  }
};

// The loads of a worker's units. Numbers of k blocks count from a unit's first.
template <class C>
class FusedLoads {
  using B = Share<typename C::TileB, C::kThreads>;
  using Memory = typename C::Memory;
  static constexpr int kBytes = C::kBytes;
  static constexpr int kRowStep = C::kThreads / 8;  // 128 bytes are 8 chunks
  static constexpr int kAffineChunks = 2 * C::kTile.k * int(sizeof(typename C::Sum)) / 16;
  static_assert(kMaxFusedTaps * 8 <= C::kThreads && kAffineChunks <= C::kThreads);

 public:
  __device__ __forceinline__ FusedLoads(const SeparableParams& p, const FusedMemory<C>& memory,
                                        int thread)
      : p_(p),
        memory_(memory),
        thread_(thread) {}

  // The tables of a unit, and the loads of its first block and of the pixels of its second, in two
  // groups. Of the unit before, others may still be at the product of its last block and behind it.
  __device__ __forceinline__ void begin(const WorkUnit& unit, int parity) {
    const WorkRegion& region = p_.regions[unit.region];
    const FusedRegion fused(p_, region, C::kTile.m);
    facts_ = &memory_.unit(parity);
    if (thread_ == 0) *facts_ = facts(fused, unit);
    if (thread_ < C::kTile.m) write_row(fused, unit, parity);
    for (int slot = thread_; slot < fused.halo.pixels; slot += C::kThreads)
      memory_.slots()[slot] = pixel_of_slot(fused, unit, slot);

    const SeparableBranch& branch = p_.branches[region.branch];
    weight_ = static_cast<const char*>(branch.weight) +
              (int64_t(unit.n_begin + B::row(thread_)) * p_.weight_channels * kBytes +
               B::chunk(thread_) * 16);
    const auto* const filter = static_cast<const char*>(branch.filter);
    filter_ = nullptr;
    if (filter != nullptr && thread_ / 8 < fused.run.count) {
      const int32_t tap = thread_ / 8, row = tap / fused.run.columns;
      const int32_t element =
          fused.run.index + row * fused.run.index_step + tap - row * fused.run.columns;
      filter_ = filter + int64_t(element) * p_.weight_channels * kBytes + thread_ % 8 * 16;
    }
    affine_ = static_cast<const char*>(branch.affine);
    ptx::sync_block();  // the tables are complete, and all have done with A and B
    load_pixels(0);
    ptx::cp_async_commit();
    load_pixels(1);
    load_weights(0);
    ptx::cp_async_commit();
  }

  // What the computation of block + 1 and the depthwise part of block + 2 need, as one group.
  __device__ __forceinline__ void ahead_of(int block) {
    load_pixels(block + 2);
    load_weights(block + 1);
    ptx::cp_async_commit();
  }

 private:
  __device__ __forceinline__ FusedUnit facts(const FusedRegion& fused, const WorkUnit& unit) const {
    const SeparableBranch& branch = p_.branches[p_.regions[unit.region].branch];
    const bool between = branch.affine != nullptr;
    return {unit.k_begin,
            unit.k_end - unit.k_begin,
            unit.n_count,
            fused.halo.pixels,
            fused.rows,
            fused.run.columns,
            fused.halo.pitch * 128,
            fused.run.dx_step * 128,
            branch.filter == nullptr,
            between,
            between && p_.between_relu != 0,
            0};
  }

  __device__ __forceinline__ void write_row(const FusedRegion& fused, const WorkUnit& unit,
                                            int parity) {
    const bool inside = thread_ < unit.m_count;
    const Place place = fused.phases.pixel(unit.m_begin + (inside ? thread_ : 0));
    uint32_t live = 0;
    int32_t tap = 0;
    for (int32_t i = 0; i < fused.rows; ++i)
      for (int32_t j = 0; j < fused.run.columns; ++j, ++tap) {
        const int32_t y = place.y + fused.run.dy + i * fused.run.dy_step;
        const int32_t x = place.x + fused.run.dx + j * fused.run.dx_step;
        const bool here = uint32_t(y) < uint32_t(p_.height) && uint32_t(x) < uint32_t(p_.width);
        live |= uint32_t(here) << tap;
      }
    memory_.row_pixels(parity)[thread_] = place.index;
    memory_.row_taps(parity)[thread_] = inside ? live : 0;
  }

  // The pixel that belongs into a slot, -1 where no tap of the unit's rows reads it.
  __device__ __forceinline__ int32_t pixel_of_slot(const FusedRegion& fused, const WorkUnit& unit,
                                                   int32_t slot) const {
    const Halo& halo = fused.halo;
    const int32_t run = min(slot / halo.pitch, 2 * halo.rows);
    const int64_t number = int64_t(unit.m_begin) - halo.columns + slot - run * halo.pitch +
                           int64_t(run - halo.rows) * p_.width;
    if (number < 0 || number >= int64_t(p_.batch) * p_.height * p_.width) return -1;
    const Place place = fused.phases.pixel(int32_t(number));
    for (int32_t i = 0; i < fused.rows; ++i) {
      const int32_t row = i - halo.rows;  // of taps, from the centre
      const int64_t centre = number - int64_t(row) * p_.width;
      const bool near = centre + halo.columns >= unit.m_begin &&
                        centre - halo.columns < unit.m_begin + unit.m_count;
      if (near && uint32_t(place.y - row * fused.run.dy_step) < uint32_t(p_.height))
        return place.index;
    }
    return -1;
  }

  __device__ __forceinline__ void load_pixels(int block) {
    if (block >= facts_->k_blocks) return;
    const int32_t chunk = thread_ % 8, k = facts_->k_begin + block;
    const int32_t channel = k * C::kTile.k + chunk * C::kChunk;
    const bool inside = channel < p_.weight_channels;
    const char* const from = static_cast<const char*>(p_.a) + int64_t(channel) * kBytes;
    const int32_t pitch = p_.a_pitch * kBytes;
    const int32_t* const slots = memory_.slots();
    const int32_t pixels = facts_->pixels;
    char* const to = memory_.pixels(block & 1) + chunk * 16;
#pragma unroll 4
    for (int32_t slot = thread_ / 8; slot < pixels; slot += kRowStep) {
      const int32_t pixel = slots[slot];
      if (pixel >= 0) ptx::cp_async_16(to + slot * 128, from + int64_t(pixel) * pitch, inside);
    }
    char* const filter = memory_.filter(block & 1);
    if (filter_ != nullptr)
      ptx::cp_async_16(filter + thread_ * 16, filter_ + int64_t(k) * 128, inside);
    if (affine_ != nullptr && thread_ < kAffineChunks) {
      constexpr int kRow = kAffineChunks / 2;  // chunks of scale, and of shift
      constexpr int kSum = int(sizeof(typename C::Sum));
      const int32_t row = thread_ / kRow;
      const int32_t first = k * C::kTile.k + thread_ % kRow * (16 / kSum);
      ptx::cp_async_16(memory_.affine(block & 1) + thread_ * 16,
                       affine_ + (int64_t(row) * p_.weight_channels + first) * kSum,
                       first < p_.weight_channels);
    }
  }

  __device__ __forceinline__ void load_weights(int block) {
    if (block >= facts_->k_blocks) return;
    const int32_t k = (facts_->k_begin + block) * C::kTile.k, rows = facts_->n_count;
    const bool inside = k + B::chunk(thread_) * C::kChunk < p_.weight_channels;
    const int64_t step = int64_t(B::kRowStep) * p_.weight_channels * kBytes;
    const char* from = weight_ + int64_t(k) * kBytes;
    char* const tile = memory_.b(block & 1);
#pragma unroll
    for (int i = 0; i < B::kCount; ++i) {
      const int32_t row = B::row(thread_) + i * B::kRowStep;
      ptx::cp_async_16(tile + C::TileB::offset(row, B::chunk(thread_)), from, inside && row < rows);
      from += step;
    }
  }

  const SeparableParams& p_;
  const FusedMemory<C>& memory_;
  const int thread_;
  FusedUnit* facts_ = nullptr;
  const char* weight_ = nullptr;  // this thread's first row of B
  const char* filter_ = nullptr;  // this thread's chunk of a tap's weights; null for none
  const char* affine_ = nullptr;
};

}  // namespace aspp::cuda::sm80
