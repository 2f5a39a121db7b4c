// SPDX-License-Identifier: BSD-3-Clause
#include "scheduler.h"

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace aspp::cuda::emulation {
namespace {

ASPP_UNSEEN uint32_t draw(Block& block) {  // xorshift
  uint32_t x = block.random;
  x ^= x << 13;
  x ^= x >> 17;
  x ^= x << 5;
  return block.random = x;
}

// One of the set bits: the first after a random place.
ASPP_UNSEEN unsigned draw_bit(Block& block, uint32_t bits) {
  const unsigned place = draw(block) >> 27;
  return (unsigned(std::countr_zero(std::rotr(bits, int(place)))) + place) % 32;
}

ASPP_UNSEEN void make_ready(Block& block, Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.ready != 0) block.ready_warps |= 1u << (&warp - block.warps);
}

void describe(char* text, size_t bytes, const Block& block) {
  size_t length = 0;
  const auto add = [&](const char* format, auto... values) {
    if (length < bytes)
      length += size_t(std::snprintf(text + length, bytes - length, format, values...));
  };
  if (block.at_barrier > 0) {
    const Thread* thread = block.first;
    while (!thread->at_barrier) ++thread;
    add("%u of %u wait at sync_block, such as (%u, %u, %u)", block.at_barrier, block.threads,
        thread->index.x, thread->index.y, thread->index.z);
  }
  for (unsigned w = 0; w * kWarp < block.threads; ++w) {
    const Warp& warp = block.warps[w];
    if (warp.arrived == 0) continue;
    add("%slanes %08x of warp %u wait in %s", length ? "; " : "", warp.arrived, w,
        warp.operation->name);
  }
  if (block.alive < block.threads) add("; %u have ended", block.threads - block.alive);
}

// Some lane of some warp that is ready, and no longer is.
ASPP_UNSEEN Thread& take(Block& block, Warp& warp) {
  const unsigned lane = draw_bit(block, warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) block.ready_warps &= ~(1u << (&warp - block.warps));
  return *warp.threads[lane];
}
ASPP_UNSEEN Thread& take(Block& block) {
  return take(block, block.warps[draw_bit(block, block.ready_warps)]);
}

// Leaves the running thread, which waits or has ended, for one that is ready.
ASPP_UNSEEN void hand_over(Thread& self) {
  Block& block = *self.block;
  if (block.ready_warps == 0) {
    char text[512] = "";
    describe(text, sizeof text, block);
    fail("deadlock, no thread of the block can go on: %s", text);
  }
  running = self.warp->ready != 0 ? &take(block, *self.warp) : &take(block);
  self.fiber.switch_to(running->fiber);
}

}  // namespace

void fail(const char* format, ...) {
  std::va_list values;
  va_start(values, format);
  char text[1024];
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  if (const Thread* self = running) {
    const uint3 b = self->block->index, t = self->index;
    std::fprintf(stderr, "aspp_ext emulation: %s, block (%u, %u, %u), thread (%u, %u, %u): %s\n",
                 self->block->launch->kernel.name, b.x, b.y, b.z, t.x, t.y, t.z, text);
  } else {
    std::fprintf(stderr, "aspp_ext emulation: %s\n", text);
  }
  std::abort();
}

ASPP_UNSEEN Thread& current(const char* what) {
  if (running == nullptr) fail("%s outside a kernel", what);
  return *running;
}

void check_aligned(const void* p, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail("%s: %p is not a multiple of %zu bytes", what, p, bytes);
  }
}

ASPP_UNSEEN void check_shared(const void* p, size_t bytes, const char* what) {
  check_aligned(p, bytes, what);
  const Block& block = *current(what).block;
  if (!block.in_shared(p, bytes)) {
    fail("%s: %p is not in the block's %zu bytes of shared memory at %p", what, p,
         block.launch->shared_bytes, static_cast<void*>(block.shared));
  }
}

ASPP_UNSEEN void together(const Operation& operation, void* lane) {
  Thread& self = current(operation.name);
  Warp& warp = *self.warp;
  const uint32_t bit = 1u << self.lane;
  if (warp.arrived == 0) {
    if (warp.ended != 0) {
      fail("%s waits for the whole warp, of which lanes %08x have ended", operation.name,
           warp.ended);
    }
    if (warp.lanes != ~0u && !operation.partial) {
      fail("%s needs 32 lanes, this warp has only %08x", operation.name, warp.lanes);
    }
    warp.operation = &operation;
  } else if (warp.operation != &operation) {
    fail("%s, while lanes %08x of the warp wait in %s", operation.name, warp.arrived,
         warp.operation->name);
  }
  warp.brought[self.lane] = lane;
  warp.arrived |= bit;
  if (warp.arrived != warp.lanes) return hand_over(self);
  if (operation.run != nullptr) operation.run(warp.brought);
  warp.arrived = 0;
  ++warp.turn;
  make_ready(*self.block, warp, warp.lanes & ~bit);
  if (draw(*self.block) % 16 == 0) step_aside();
}

void sync_warp() {
  static constexpr Operation kSyncWarp{"sync_warp", nullptr, true};
  Thread& self = current("sync_warp");
  void* order = &self.warp->order[self.warp->turn % 2];
  publish(order);
  self.fenced = false;
  together(kSyncWarp, nullptr);
  observe(order);
}

ASPP_UNSEEN void sync_block() {
  Thread& self = current("sync_block");
  Block& block = *self.block;
  if (const Thread* gone = block.last_ended) {
    fail("sync_block waits for the whole block, of which thread (%u, %u, %u) has ended",
         gone->index.x, gone->index.y, gone->index.z);
  }
  void* order = &block.order[block.turn % 2];
  publish(order);
  self.fenced = false;
  if (++block.at_barrier < block.threads) {
    self.at_barrier = true;
    hand_over(self);
  } else {
    block.at_barrier = 0;
    ++block.turn;
    for (unsigned i = 0; i < block.threads; ++i) block.first[i].at_barrier = false;
    for (unsigned w = 0; w * kWarp < block.threads; ++w) {
      Warp& warp = block.warps[w];
      make_ready(block, warp, warp.lanes);
    }
    step_aside();
  }
  observe(order);
}

ASPP_UNSEEN void step_aside() {
  Thread& self = current("step_aside");
  make_ready(*self.block, *self.warp, 1u << self.lane);
  running = &take(*self.block);
  if (running != &self) self.fiber.switch_to(running->fiber);
}

ASPP_UNSEEN void end_thread(Thread& self) {
  Block& block = *self.block;
  Warp& warp = *self.warp;
  if (self.copied < self.copies.size()) {
    fail("ends with %zu cp.async copies %s", self.copies.size() - self.copied,
         self.copies.back().group < self.groups ? "committed but not waited for" : "not committed");
  }
  if (warp.arrived != 0) {
    fail("ends while lanes %08x of its warp wait in %s", warp.arrived, warp.operation->name);
  }
  if (block.at_barrier > 0) {
    fail("ends while %u threads of its block wait at sync_block", block.at_barrier);
  }
  warp.ended |= 1u << self.lane;
  block.last_ended = &self;
  publish(&block.end);
  if (--block.alive > 0) return hand_over(self);
  running = nullptr;
  self.fiber.switch_to(block.host);
}

ASPP_UNSEEN void run_block(Block& block) {
  running = &take(block);
  block.host.switch_to(running->fiber);
}

}  // namespace aspp::cuda::emulation
