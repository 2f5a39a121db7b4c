// SPDX-License-Identifier: BSD-3-Clause
// What tests set and ask.
#pragma once

#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace aspp::cuda::emulation {

struct Device {
  int major, minor;
  int processors;
  size_t shared_optin;  // per block, by cudaFuncSetAttribute
  size_t shared_per_processor;
  int threads_per_processor;
  int blocks_per_processor;
  int l2_bytes;
};

inline constexpr size_t kKiB = 1024;
inline constexpr Device kDevices[] = {
    {8, 0, 108, 163 * kKiB, 164 * kKiB, 2048, 32, 40 << 20},
    {8, 6, 84, 99 * kKiB, 100 * kKiB, 1536, 16, 6 << 20},
    {8, 9, 128, 99 * kKiB, 100 * kKiB, 1536, 24, 72 << 20},
    {9, 0, 132, 227 * kKiB, 228 * kKiB, 2048, 32, 50 << 20},
    {10, 0, 148, 227 * kKiB, 228 * kKiB, 2048, 32, 126 << 20},
    {12, 0, 170, 99 * kKiB, 100 * kKiB, 1536, 24, 96 << 20},
};

// The device of an architecture such as 80 or 120; fails for one it does not know.
Device device_of(int architecture);
// All devices there are; at first one of architecture 80.
void set_devices(std::vector<Device> devices);

// From then on; at first ASPP_EMULATE_SEED and ASPP_EMULATE_THREADS, else 0 and all hardware
// threads.
void set_seed(uint64_t seed);
void set_threads(unsigned os_threads);
// So many calls of cudaMalloc find no memory.
void fail_allocations(unsigned next);
// Checks and records launches, copies and fills, but does none.
void set_dry_run(bool dry);

// What stands for PyTorch's current stream of this OS thread; at first the default stream.
void set_current_stream(cudaStream_t stream);
cudaStream_t current_stream();

// One call of the runtime. Fields that do not apply are zero.
struct Event {
  const char* call;  // "launch", or the function's name
  cudaError_t result = cudaSuccess;
  int device = 0;
  cudaStream_t stream = nullptr;
  size_t bytes = 0;
  std::string kernel = {};
  dim3 grid = {0, 0, 0}, block = {0, 0, 0};
  size_t shared_bytes = 0;
};

// Since the last clear_log, oldest first; beyond 100 000 the older half is forgotten.
std::vector<Event> log();
void clear_log();
size_t count(const char* call);  // in the log

size_t live_allocations();

}  // namespace aspp::cuda::emulation

// The same for ctypes. aspp_emulation_set returns 0, or 1 for an unknown name. Names are seed,
// threads, fail_allocations, dry_run, architecture, devices (how many of the first) and stream: 1
// makes a new one this OS thread's current stream, which does its work at once as host memory may
// be gone later; 0 goes back to the default. The log is a JSON list, valid until this OS thread
// asks again.
extern "C" {
int aspp_emulation_set(const char* name, long long value);
const char* aspp_emulation_log();
void aspp_emulation_clear_log();
}
