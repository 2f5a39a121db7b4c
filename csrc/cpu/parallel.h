// SPDX-License-Identifier: BSD-3-Clause
// Tasks on PyTorch's thread pool, handed out one at a time, each thread with scratch of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace aspp {

// Grows to what a thread was ever asked for, so that a steady caller pays no page faults; a request
// above the limit is given back after the call.
class Scratch {
 public:
  void* reserve(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > bytes_ || kExact) {
      release();
      memory_ = std::aligned_alloc(64, size_t(bytes > 0 ? bytes : 64));
      if (memory_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
      if (kExact) std::memset(memory_, 0xff, size_t(bytes));  // NaN: unwritten reads show
    }
    return memory_;
  }
  void trim() {
    if (bytes_ > kKeepBytes) release();
  }
  ~Scratch() { release(); }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kExact = true;
#else
  static constexpr bool kExact = false;
#endif
  static constexpr int64_t kKeepBytes = 64 << 20;
  void release() {
    std::free(memory_);
    memory_ = nullptr;
    bytes_ = 0;
  }
  void* memory_ = nullptr;
  int64_t bytes_ = 0;
};

// body(task, scratch) for every task in [0, tasks), each exactly once. It may run out of memory.
template <typename F>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const F& body) {
  if (tasks <= 0) return;
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const auto work = [&](int64_t, int64_t) {
    static thread_local Scratch scratch;
    try {
      void* memory = scratch.reserve(scratch_bytes);
      for (int64_t task = next++; task < tasks; task = next++) body(task, memory);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
    scratch.trim();
  };
  torch::stable::parallel_for(0, threads < tasks ? threads : tasks, 1, work);
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace aspp
