// SPDX-License-Identifier: BSD-3-Clause
// Kernels with a fault each. `faults NAME` plants the fault, `faults right` runs all of the kernels
// without. Ends with 3 where results are wrong, under some of the seeds 0 ... 15.
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <string_view>

#include "check.h"
#include "cuda/ptx/block.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/warp.cuh"

using namespace aspp::cuda::ptx;
namespace emulation = aspp::cuda::emulation;

namespace {

constexpr int kThreads = 128;

bool planted = true;
std::atomic<bool> wrong = false;

void expect(bool right) {
  if (!right) wrong.store(true, std::memory_order_relaxed);
}

// Heap memory of exactly `count` values, so that AddressSanitizer sees its end.
struct Values {
  explicit Values(size_t count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, count * sizeof(float)) != 0) std::abort();
    values.reset(static_cast<float*>(memory));
    for (size_t i = 0; i < count; ++i) values.get()[i] = float(i);
  }
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> values;
  float* get() const { return values.get(); }
};

int threads() { return kThreads; }
unsigned self() { return threadIdx.x; }
float* shared() { return reinterpret_cast<float*>(shared_memory()); }

template <class F>
void kernel(const F& f, size_t shared_bytes = kThreads * 16, int blocks = 1) {
  if (check::run("kernel", blocks, threads(), shared_bytes, f) != cudaSuccess) std::abort();
}

void reverse(bool barrier) {
  kernel([&] {
    shared()[self()] = float(self());
    if (barrier) sync_block();
    expect(shared()[kThreads - 1 - self()] == float(kThreads - 1 - self()));
  });
}
void missing_barrier() { reverse(!planted); }

// The value of round 1 overwrites that of round 0 while a neighbour may still have to read it.
void missing_second_barrier() {
  kernel([] {
    for (int round = 0; round < 2; ++round) {
      shared()[self()] = float(round);
      sync_block();
      expect(shared()[(self() + 64) % kThreads] == float(round));
      if (!planted) sync_block();
    }
  });
}

void missing_warp_barrier() {
  kernel([] {
    shared()[self()] = float(self());
    if (!planted) sync_warp();
    expect(shared()[self() ^ 1] == float(self() ^ 1));
  });
}

void missing_second_warp_barrier() {
  kernel([] {
    for (int round = 0; round < 2; ++round) {
      shared()[self()] = float(round);
      sync_warp();
      expect(shared()[self() ^ 1] == float(round));
      if (!planted) sync_warp();
    }
  });
}

// A shuffle brings the lanes together but orders no memory.
void shuffle_is_no_barrier() {
  kernel([] {
    shared()[self()] = float(self());
    shuffle_xor(1.0f, 1);
    if (!planted) sync_warp();
    expect(shared()[self() ^ 1] == float(self() ^ 1));
  });
}

void copy_chunks(bool valid, const Values& from, int more) {
  cp_async_16(shared() + self() * 4, from.get() + self() * 4 + more, valid);
}

void missing_wait() {
  const Values from(kThreads * 4);
  kernel([&] {
    copy_chunks(true, from, 0);
    cp_async_commit();
    if (!planted) cp_async_wait<0>();
    sync_block();
    expect(shared()[(self() + 32) % kThreads * 4] == float((self() + 32) % kThreads * 4));
    cp_async_wait<0>();
  });
}

void missing_barrier_after_wait() {
  const Values from(kThreads * 4);
  kernel([&] {
    copy_chunks(true, from, 0);
    cp_async_commit();
    cp_async_wait<0>();
    if (!planted) sync_block();
    expect(shared()[(self() + 32) % kThreads * 4] == float((self() + 32) % kThreads * 4));
  });
}

// The copy for the next round but one begins before everybody has read this round's stage.
void overwritten_stage() {
  constexpr unsigned kRounds = 4;
  const Values from(kRounds * kThreads * 4);
  kernel(
      [&] {
        const auto copy = [&](unsigned round) {
          cp_async_16(shared() + (round % 2 * kThreads + self()) * 4,
                      from.get() + (round * kThreads + self()) * 4, round < kRounds);
          cp_async_commit();
        };
        copy(0);
        for (unsigned round = 0; round < kRounds; ++round) {
          copy(round + 1);
          cp_async_wait<1>();
          sync_block();
          const unsigned other = (self() + 32) % kThreads;
          expect(shared()[(round % 2 * kThreads + other) * 4] ==
                 float((round * kThreads + other) * 4));
          if (!planted) sync_block();
        }
        cp_async_wait<0>();
      },
      kThreads * 32);
}

void not_committed() {
  const Values from(kThreads * 4);
  kernel([&] {
    copy_chunks(true, from, 0);
    if (!planted) cp_async_commit();
    cp_async_wait<0>();
  });
}

void never_awaited() {
  const Values from(kThreads * 4);
  kernel([&] {
    copy_chunks(true, from, 0);
    cp_async_commit();
    if (!planted) cp_async_wait<0>();
  });
}

void copy_beyond_global() {
  const Values from(kThreads * 4 - 4);
  kernel([&] {
    copy_chunks(planted || self() < kThreads - 1, from, 0);
    cp_async_commit();
    cp_async_wait<0>();
  });
}

void copy_from_misaligned() {
  const Values from(kThreads * 4 + 4);
  kernel([&] {
    copy_chunks(true, from, planted ? 2 : 4);
    cp_async_commit();
    cp_async_wait<0>();
  });
}

void copy_beyond_shared() {
  const Values from(kThreads * 4);
  kernel(
      [&] {
        copy_chunks(true, from, 0);
        cp_async_commit();
        cp_async_wait<0>();
      },
      kThreads * 16 - (planted ? 16 : 0));
}

void read_beyond_shared() {
  kernel([] {
    shared()[self()] = 0;
    const volatile float* values = shared();
    expect(values[self() + (planted ? kThreads * 3 + 1 : 0)] == 0 || planted);
  });
}

void write_beyond_shared() {
  kernel([] { shared()[self() + (planted ? kThreads * 3 + 1 : 0)] = 0; });
}

void read_beyond_global() {
  const Values from(kThreads);
  kernel([&] { shared()[self()] = from.get()[self() + (planted ? 1 : 0)]; });
}

// Device memory that the kernel writes, but for its last chunk, before the others read it.
template <class Read>
void with_written(Read read) {
  float* memory = nullptr;
  if (cudaMalloc(&memory, kThreads * 16) != cudaSuccess) std::abort();
  kernel([&] {
    if (!planted || self() < kThreads - 1) store_chunk(memory + self() * 4, Chunk{});
    sync_block();
    read(memory + (self() + 32) % kThreads * 4);
  });
  cudaFree(memory);
}
void read_unwritten() {
  with_written([](const float* from) { expect(load<float>(from, 3) == 0); });
}
void read_unwritten_chunk() {
  with_written([](const float* from) { expect(load_chunk(from).words[0] == 0); });
}
void read_unwritten_past_l1() {
  with_written([](const float* from) { expect(load_volatile(from) == 0); });
}
void copy_unwritten() {
  with_written([](const float* from) {
    cp_async_16(shared() + self() * 4, from, true);
    cp_async_commit();
    cp_async_wait<0>();
  });
}
void count_on_unwritten() {
  with_written([](float* from) { atomic_increment(reinterpret_cast<uint32_t*>(from)); });
}

void misaligned_store() {
  kernel([] { store_chunk(shared() + self() * (planted ? 2 : 4), Chunk{}); });
}

void matrix_row(const float* row) {
  uint32_t r[4];
  ldmatrix_x4(r, row);
}
void misaligned_matrix() {
  kernel([] { matrix_row(shared() + self() * (planted ? 2 : 4)); });
}
void matrix_in_global() {
  const Values from(kThreads * 4);
  kernel([&] { matrix_row((planted ? from.get() : shared()) + self() * 4); });
}

void ends_before_barrier() {
  kernel([] {
    if (planted && self() >= 64) return;
    sync_block();
  });
}

void half_at_barrier() {
  kernel([] {
    if (!planted || self() % 32 < 16) sync_block();
    shuffle(1, 0);
    if (planted && self() % 32 >= 16) sync_block();
  });
}

void missing_lane() {
  kernel([] {
    if (planted && self() == 35) return;
    shuffle(1, 0);
  });
}

void mixed_operations() {
  kernel([] {
    float c[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (planted && self() == 35)
      mma_m16n8k16_f16(c, a, b);
    else
      mma_m16n8k16_bf16(c, a, b);
  });
}

void partial_warp() {
  const int count = planted ? 40 : 64;
  check::run("kernel", 1, count, 0, [] { shuffle(1, 0); });
}

void outside_kernel() {
  if (planted) sync_block();
}

void launch_inside() {
  kernel([] {
    if (planted && self() == 0) reverse(true);
  });
}

// The last block reads what the others wrote: a fence on both sides of the counter.
void sum_blocks(bool before, bool after) {
  constexpr int kBlocks = 8;
  Values partial(kBlocks * kThreads);
  uint32_t counter = 0;
  kernel(
      [&] {
        auto& last = *reinterpret_cast<uint32_t*>(shared_memory());
        partial.get()[blockIdx.x * kThreads + self()] = 1;
        sync_block();
        if (self() == 0) {
          if (before) fence_device();
          last = atomic_increment(&counter) == kBlocks - 1;
          if (after) fence_device();
        }
        sync_block();
        float sum = 0;
        for (int i = 0; last && i < kBlocks; ++i) {
          sum += load_volatile(&partial.get()[i * kThreads + int(self())]);
        }
        expect(!last || sum == kBlocks);
      },
      4, kBlocks);
}
void missing_fence_before() { sum_blocks(!planted, true); }
void missing_fence_after() { sum_blocks(true, !planted); }

void two_blocks_write() {
  Values out(kThreads * 4);
  emulation::set_threads(1);  // noticed although one runs after the other
  kernel([&] { out.get()[self() + (planted ? 0 : blockIdx.x * kThreads)] = 1; }, 0, 4);
}

const std::map<std::string_view, void (*)()> kFaults{
#define FAULT(name) {#name, name}
    FAULT(missing_barrier),
    FAULT(missing_second_barrier),
    FAULT(missing_warp_barrier),
    FAULT(shuffle_is_no_barrier),
    FAULT(missing_wait),
    FAULT(missing_barrier_after_wait),
    FAULT(overwritten_stage),
    FAULT(not_committed),
    FAULT(never_awaited),
    FAULT(copy_beyond_global),
    FAULT(copy_from_misaligned),
    FAULT(copy_beyond_shared),
    FAULT(read_beyond_shared),
    FAULT(write_beyond_shared),
    FAULT(read_beyond_global),
    FAULT(read_unwritten),
    FAULT(read_unwritten_chunk),
    FAULT(read_unwritten_past_l1),
    FAULT(copy_unwritten),
    FAULT(count_on_unwritten),
    FAULT(misaligned_store),
    FAULT(misaligned_matrix),
    FAULT(matrix_in_global),
    FAULT(ends_before_barrier),
    FAULT(half_at_barrier),
    FAULT(missing_lane),
    FAULT(mixed_operations),
    FAULT(partial_warp),
    FAULT(outside_kernel),
    FAULT(launch_inside),
    FAULT(missing_fence_before),
    FAULT(missing_fence_after),
    FAULT(two_blocks_write),
    FAULT(missing_second_warp_barrier),
};

}  // namespace

int main(int count, char** arguments) {
  const std::string_view name = count > 1 ? arguments[1] : "";
  planted = name != "right";
  for (const auto& [fault, run] : kFaults) {
    if (planted && fault != name) continue;
    std::printf("%s\n", fault.data());
    for (uint64_t seed = 0; seed < (planted ? 16 : 4); ++seed) {
      emulation::set_seed(seed);
      run();
    }
  }
  return wrong ? 3 : 0;
}
