// SPDX-License-Identifier: BSD-3-Clause
// Blocks, warps and the memory that blocks share.
#include <atomic>
#include <cfenv>
#include <cmath>
#include <set>
#include <thread>

#include "check.h"
#include "cuda/ptx/block.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/warp.cuh"

using namespace aspp::cuda::ptx;
namespace emulation = aspp::cuda::emulation;

namespace {

struct Indices {
  int* seen;
};
void count_threads(const Indices p) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  ++p.seen[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

TEST(indices) {
  std::vector<int> seen(2 * 3 * 4 * 5 * 3 * 2);
  const Indices p{seen.data()};
  EQUAL(emulation::launch(count_threads, "indices", dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, p),
        cudaSuccess);
  for (const int times : seen) EQUAL(times, 1);
}

TEST(shared_memory_is_fresh) {
  for (const size_t bytes : {0, 1, 100, 4096, 48 << 10, 100 << 10}) {
    EQUAL(check::run("fresh", 3, 1, bytes,
                     [&] {
                       char* memory = shared_memory();
                       EQUAL(reinterpret_cast<uintptr_t>(memory) % 1024, 0u);
                       for (size_t i = 0; i < bytes; ++i) EQUAL(memory[i], char(-1));
                       std::memset(memory, 1, bytes);
                     }),
          cudaSuccess);
  }
}

// Sums neighbours again and again: every round needs both barriers.
TEST(barriers) {
  for (const int threads : {1, 31, 33, 256, 1024}) {
    if (emulation::kTsan && threads > 256) continue;  // clocks of so many take their time
    check::run("barriers", 4, threads, size_t(threads) * 4, [&] {
      auto* values = reinterpret_cast<uint32_t*>(shared_memory());
      const int own = int(threadIdx.x);
      values[own] = 1;
      for (int round = 0; round < 20; ++round) {
        sync_block();
        const uint32_t sum = values[own] + values[(own + 1) % threads];
        sync_block();
        values[own] = sum;
      }
      EQUAL(values[own], 1u << 20);
    });
  }
}

TEST(warp_barriers) {
  check::run("warp barriers", 2, 80, 80 * 4, [&] {  // the last warp is half one
    auto* values = reinterpret_cast<uint32_t*>(shared_memory()) + threadIdx.x / 32 * 32;
    const unsigned lanes = threadIdx.x < 64 ? 32 : 16, lane = threadIdx.x % 32;
    values[lane] = lane;
    for (unsigned round = 1; round < 20; ++round) {
      sync_warp();
      const uint32_t next = values[(lane + 1) % lanes];
      sync_warp();
      values[lane] = next;
      EQUAL(next, (lane + round) % lanes);
    }
  });
}

// The pattern of the reductions: partial sums, a fence, a counter; the last block adds them up.
TEST(last_block) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    emulation::set_seed(seed);
    constexpr int kBlocks = 13, kThreads = 64;
    std::vector<float> partial(kBlocks * kThreads, NAN), sums(kThreads, NAN);
    uint32_t counter = 0;
    check::run("last block", kBlocks, kThreads, 4, [&] {
      const unsigned own = threadIdx.x;
      auto& last = *reinterpret_cast<uint32_t*>(shared_memory());
      partial[blockIdx.x * kThreads + own] = float(blockIdx.x * own);
      sync_block();
      if (own == 0) {
        fence_device();
        last = atomic_increment(&counter) == kBlocks - 1;
        fence_device();
      }
      sync_block();
      if (!last) return;
      float sum = 0;
      for (int block = 0; block < kBlocks; ++block) {
        sum += load_volatile(&partial[size_t(block) * kThreads + own]);
      }
      sums[own] = sum;
    });
    EQUAL(counter, uint32_t(kBlocks));
    for (int i = 0; i < kThreads; ++i)
      EQUAL(sums[size_t(i)], float(i * kBlocks * (kBlocks - 1) / 2));
  }
  emulation::set_seed(0);
}

std::vector<int> order_of(uint64_t seed, bool of_threads) {
  emulation::set_seed(seed);
  emulation::set_threads(1);
  std::vector<int> order(of_threads ? 256 : 12);
  std::atomic<size_t> come{0};
  check::run("order", of_threads ? 1 : 12, of_threads ? 256 : 1, 0,
             [&] { order[come++] = int(of_threads ? threadIdx.x : blockIdx.x); });
  emulation::set_threads(2);
  emulation::set_seed(0);
  return order;
}

TEST(seeds_shuffle) {
  for (const bool of_threads : {false, true}) {
    std::set<std::vector<int>> orders;
    for (uint64_t seed = 0; seed < 20; ++seed) {
      orders.insert(order_of(seed, of_threads));
      HOLDS(order_of(seed, of_threads) == order_of(seed, of_threads));
    }
    HOLDS(orders.size() > 18);
  }
}

TEST(blocks_run_at_once) {
  emulation::set_threads(2);
  std::atomic<int> inside{0};
  check::run("at once", 2, 32, 0, [&] {
    if (threadIdx.x != 0) return;
    ++inside;
    while (inside < 2) std::this_thread::yield();
  });
  EQUAL(inside.load(), 2);
}

TEST(launches_run_at_once) {
  std::vector<std::thread> callers;
  std::atomic<int> right{0};
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&, caller] {
      for (int times = 0; times < 20; ++times) {
        std::vector<int> out(64);
        check::run("caller", 2, 32, 128, [&] {
          auto* values = reinterpret_cast<int*>(shared_memory());
          values[threadIdx.x] = caller;
          sync_block();
          out[blockIdx.x * 32 + threadIdx.x] = values[31 - threadIdx.x] + int(threadIdx.x);
        });
        bool same = true;
        for (int i = 0; i < 64; ++i) same &= out[size_t(i)] == caller + i % 32;
        right += same;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EQUAL(right.load(), 60);
}

TEST(rounding_of_the_caller_does_not_matter) {
  volatile float one = 1, little = 1e-10f;
  std::fesetround(FE_UPWARD);
  check::run("rounding", 1, 1, 0, [&] { EQUAL(one + little, 1.0f); });
  HOLDS(one + little > 1);
  std::fesetround(FE_TONEAREST);
}

}  // namespace

int main(int count, char** names) { return check::main(count, names); }
