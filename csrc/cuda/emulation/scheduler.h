// SPDX-License-Identifier: BSD-3-Clause
// Blocks of CUDA threads as fibers. A block lives on one OS thread; blocks run on several.
//
// A fiber runs until it has to wait, for its warp or its block, and then hands over to one that
// need not; which one, and the order of the blocks, is drawn from a seed.
#pragma once

#include <cstdint>
#include <vector>

#include "fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace aspp::cuda::emulation {

inline constexpr unsigned kWarp = 32;
inline constexpr unsigned kMaxThreads = 1024;

// What the lanes of a warp do together: the last to come does it for all. lanes[i] is what lane i
// brought; null where the block ends within the warp, which only `partial` ones allow.
struct Operation {
  const char* name;
  void (*run)(void* const* lanes);
  bool partial = false;
};

struct Block;
struct Thread;

struct Warp {
  uint32_t lanes;    // those it has
  uint32_t ready;    // may run but do not
  uint32_t arrived;  // wait in `operation`
  uint32_t ended;
  const Operation* operation;
  void* brought[kWarp];
  Thread* threads[kWarp];
  char order[2];  // ThreadSanitizer's names of sync_warp, by turns
  unsigned turn;
};

// cp.async: done by the wait that covers it.
struct Copy {
  void* shared;
  const void* global;  // null: zeros
  unsigned group;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned lane;
  Block* block;
  Warp* warp;
  bool at_barrier;

  std::vector<Copy> copies;
  size_t copied;    // of them
  unsigned groups;  // committed

  // Under ThreadSanitizer: the last words read by atomics before a fence, and whether a fence came
  // since the last barrier. A fence makes relaxed atomics around it order other accesses.
  static constexpr unsigned kSeen = 8;
  void* seen[kSeen];
  unsigned seen_count;
  bool fenced;
};

struct Kernel {
  const void* function;
  const char* name;
  void (*call)(const void* function, const void* params);
};

struct Launch {
  Kernel kernel;
  dim3 grid, block;
  size_t shared_bytes;
  const void* params;
  uint64_t seed;

  uint64_t blocks() const { return uint64_t(grid.x) * grid.y * grid.z; }
  unsigned threads() const { return block.x * block.y * block.z; }
};

struct Block {
  const Launch* launch;
  uint3 index;
  char* shared;
  unsigned threads;
  unsigned alive;
  unsigned at_barrier;
  uint32_t ready_warps;
  uint32_t random;
  Warp warps[kMaxThreads / kWarp];
  Thread* first;
  const Thread* last_ended;
  Fiber host;
  char order[2];  // ThreadSanitizer's names of sync_block, by turns
  unsigned turn;
  char begin, end;  // and of the block's

  bool in_shared(const void* p, size_t bytes) const {
    const auto at = reinterpret_cast<uintptr_t>(p), base = reinterpret_cast<uintptr_t>(shared);
    return at >= base && at + bytes <= base + launch->shared_bytes;
  }
};

inline constinit thread_local Thread* running = nullptr;  // null outside a kernel

// Prints the sentence with kernel, block and thread, and aborts.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The running thread; fails outside a kernel.
Thread& current(const char* what);

// `bytes` at p are aligned to `bytes`, or it fails.
void check_aligned(const void* p, size_t bytes, const char* what);
// and lie in the block's shared memory, or it fails.
void check_shared(const void* p, size_t bytes, const char* what);

// Waits until every lane of the warp came with the same operation.
void together(const Operation& operation, void* lane);
void sync_warp();
void sync_block();
// Lets others run; they might write what the caller reads next.
void step_aside();

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_copies(unsigned pending);

void fence();
uint32_t atomic_add(uint32_t* word, uint32_t value);

// The fibers of a block, which are ready, until all have ended. A fiber's last act is end_thread.
void run_block(Block& block);
void end_thread(Thread& self);

// Runs all blocks, on `os_threads` OS threads of which the caller is one.
void run(const Launch& launch, unsigned os_threads);

}  // namespace aspp::cuda::emulation
