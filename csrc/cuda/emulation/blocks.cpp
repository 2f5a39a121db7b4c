// SPDX-License-Identifier: BSD-3-Clause
// Blocks on OS threads.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "scheduler.h"

namespace aspp::cuda::emulation {
namespace {

// ThreadSanitizer takes what a fiber did in an earlier block for ordered before what it does now:
// neighbouring blocks of an OS thread have fibers of their own.
constexpr unsigned kGroups = kTsan ? 2 : 1;
// It knows 8128 threads at most.
constexpr unsigned kMaxOsThreads = kTsan ? 2 : 256;
constexpr size_t kSharedAlignment = 1024;
// Behind shared memory, where AddressSanitizer does not watch its end.
constexpr size_t kGuardBytes = kAsan ? 0 : 64;
constexpr unsigned char kGuard = 0xfd;

// splitmix64
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

void enter_thread(void* argument) {
  Thread& self = *static_cast<Thread*>(argument);
  self.fiber.entered();
  for (;;) {
    Block& block = *self.block;
    observe(&block.begin);
    self.copies.clear();
    self.copied = 0;
    self.groups = self.seen_count = 0;
    self.fenced = false;
    const Launch& launch = *block.launch;
    launch.kernel.call(launch.kernel.function, launch.params);
    end_thread(self);
  }
}

// Fibers are kept: a stack costs two system calls and page faults.
struct Worker {
  std::unique_ptr<Thread[]> threads[kGroups];
  unsigned made[kGroups] = {};
  Block block;
  unsigned group = 0;
  void* janitor = nullptr;

  Thread* fibers(unsigned count) {
    group = (group + 1) % kGroups;
    auto& own = threads[group];
    if (own == nullptr) own.reset(new Thread[kMaxThreads]());
    for (unsigned& i = made[group]; i < count; ++i) own[i].fiber.create(enter_thread, &own[i], i);
    return own.get();
  }

  void run(const Launch& launch, uint64_t number);
};

char* new_shared(size_t bytes) {
  void* memory = nullptr;
  const size_t all = bytes + kGuardBytes;
  if (posix_memalign(&memory, kSharedAlignment, all ? all : 1) != 0) fail("no shared memory");
  std::memset(memory, 0xff, bytes);  // NaN in every format
  std::memset(static_cast<char*>(memory) + bytes, kGuard, kGuardBytes);
  return static_cast<char*>(memory);
}

ASPP_UNSEEN void check_guard(const Block& block) {
  const char* guard = block.shared + block.launch->shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (static_cast<unsigned char>(guard[i]) != kGuard) {
      fail("%s, block (%u, %u, %u): wrote %zu bytes behind its %zu bytes of shared memory",
           block.launch->kernel.name, block.index.x, block.index.y, block.index.z, i,
           block.launch->shared_bytes);
    }
  }
}

ASPP_UNSEEN void Worker::run(const Launch& launch, uint64_t number) {
  const unsigned count = launch.threads();
  const dim3 grid = launch.grid, shape = launch.block;
  block.launch = &launch;
  block.index = {unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                 unsigned(number / grid.x / grid.y)};
  block.shared = new_shared(launch.shared_bytes);
  block.threads = block.alive = count;
  block.at_barrier = 0;
  block.random = uint32_t(mix(launch.seed ^ mix(number))) | 1;
  block.first = fibers(count);
  block.last_ended = nullptr;
  block.host.adopt();
  block.ready_warps = 0;
  for (unsigned w = 0; w * kWarp < count; ++w) {
    Warp& warp = block.warps[w];
    const unsigned left = count - w * kWarp;
    warp.lanes = warp.ready = left >= kWarp ? ~0u : (1u << left) - 1;
    warp.arrived = warp.ended = 0;
    block.ready_warps |= 1u << w;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      const bool exists = lane < left;
      warp.brought[lane] = nullptr;
      warp.threads[lane] = exists ? &block.first[w * kWarp + lane] : nullptr;
    }
  }
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.first[i];
    thread.index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
    thread.lane = i % kWarp;
    thread.block = &block;
    thread.warp = &block.warps[i / kWarp];
    thread.at_barrier = false;
  }
  publish(&block.begin);
  run_block(block);
  check_guard(block);
  free_after(&block.end, block.shared, janitor);
}

// Workers that no OS thread has at the moment. Never destroyed: kernels may run at exit.
struct Pool {
  std::mutex mutex;
  std::vector<Worker*> idle;

  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }
  Worker* take() {
    const std::lock_guard lock(mutex);
    if (idle.empty()) return new Worker();
    Worker* worker = idle.back();
    idle.pop_back();
    return worker;
  }
  void give_back(Worker* worker) {
    const std::lock_guard lock(mutex);
    idle.push_back(worker);
  }
};

// The GPU neither flushes denormals nor rounds as the host's caller may have asked.
class PlainArithmetic {
#if defined(__SSE__)
 public:
  PlainArithmetic() { _mm_setcsr(0x1f80); }
  ~PlainArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_ = _mm_getcsr();
#endif
};

}  // namespace

void run(const Launch& launch, unsigned os_threads) {
  if (running != nullptr) fail("a launch inside a kernel");
  os_threads = std::min(os_threads, kMaxOsThreads);
  std::vector<uint32_t> order(launch.blocks());
  std::iota(order.begin(), order.end(), 0u);
  uint64_t random = mix(launch.seed);
  for (size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[(random = mix(random)) % i]);

  std::atomic<size_t> next{0};
  const auto work = [&] {
    [[maybe_unused]] const PlainArithmetic plain;
    Worker* worker = Pool::get().take();
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < order.size();) {
      worker->run(launch, order[i]);
    }
    observe(&worker->block.end);
    Pool::get().give_back(worker);
  };
  std::vector<std::thread> helpers;
  try {
    for (size_t i = 1; i < os_threads && i < order.size(); ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // fewer do as well
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace aspp::cuda::emulation
