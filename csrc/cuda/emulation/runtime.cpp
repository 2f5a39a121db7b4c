// SPDX-License-Identifier: BSD-3-Clause
// Devices, kernels' attributes, memory.
#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "unwritten.h"

using namespace aspp::cuda::emulation;

namespace {

constexpr size_t kPlainSharedBytes = 48 << 10;  // without cudaFuncSetAttribute
constexpr size_t kReservedSharedBytes = 1 << 10;
constexpr size_t kAlignment = 256;

// The allocation that p points into; the caller holds the mutex.
auto find_allocation(const void* p) {
  auto& all = Runtime::get().allocations;
  auto after = all.upper_bound(reinterpret_cast<uintptr_t>(p));
  if (after == all.begin()) return all.end();
  const auto found = std::prev(after);
  const bool inside =
      reinterpret_cast<uintptr_t>(p) < found->first + std::max<size_t>(1, found->second);
  return inside ? found : all.end();
}

bool on_device(const void* p) {
  const std::lock_guard lock(Runtime::get().mutex);
  return find_allocation(p) != Runtime::get().allocations.end();
}

void copy(void* to, const void* from, size_t bytes) {
  note_written(to, bytes);
  std::memcpy(to, from, bytes);
}

}  // namespace

namespace aspp::cuda::emulation {

int& current_device() {
  static thread_local int device = 0;
  return device;
}

cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const void* params, size_t params_bytes) {
  Runtime& runtime = Runtime::get();
  Launch made{kernel, grid, block, shared_bytes, params, 0};
  Event event{"launch",    cudaSuccess, 0,     stream,      params_bytes,
              kernel.name, grid,        block, shared_bytes};
  unsigned threads;
  bool dry;
  {
    const std::lock_guard lock(runtime.mutex);
    made.seed = runtime.seed;
    threads = runtime.threads;
    dry = runtime.dry;
    const auto allowed = runtime.allowed_shared.find({current_device(), kernel.function});
    const size_t most =
        std::max(kPlainSharedBytes, allowed == runtime.allowed_shared.end() ? 0 : allowed->second);
    const bool grid_legal = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffff &&
                            grid.y <= 0xffff && grid.z <= 0xffff;
    const bool block_legal = block.x > 0 && block.y > 0 && block.z > 0 && block.x <= kMaxThreads &&
                             block.y <= kMaxThreads && block.z <= 64 &&
                             uint64_t(block.x) * block.y * block.z <= kMaxThreads;
    if (!grid_legal || !block_legal) {
      event.result = cudaErrorInvalidConfiguration;
    } else if (shared_bytes > most) {
      event.result = cudaErrorInvalidValue;
    } else if (runtime.streams.count(stream) && stream->device != current_device()) {
      event.result = cudaErrorInvalidResourceHandle;
    }
  }
  if (event.result == cudaSuccess) {
    const auto* bytes = static_cast<const char*>(params);
    auto kept = std::make_shared<std::vector<char>>(bytes, bytes + params_bytes);
    event.result = submit(stream, [made, threads, dry, kept]() mutable {
      made.params = kept->data();
      if (!dry) run(made, threads);
    });
  }
  return record(std::move(event));
}

}  // namespace aspp::cuda::emulation

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
  }
  return "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnmatched: return "capture was not initiated in this stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error(), cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error(); }

cudaError_t cudaGetDeviceCount(int* count) {
  const std::lock_guard lock(Runtime::get().mutex);
  *count = int(Runtime::get().devices.size());
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return record({.call = "cudaGetDevice"});
}

cudaError_t cudaSetDevice(int device) {
  int count;
  cudaGetDeviceCount(&count);
  if (device < 0 || device >= count) {
    return record({.call = "cudaSetDevice", .result = cudaErrorInvalidDevice});
  }
  current_device() = device;
  return record({.call = "cudaSetDevice"});
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto answer = [&]() -> cudaError_t {
    const std::lock_guard lock(Runtime::get().mutex);
    const auto& devices = Runtime::get().devices;
    if (device < 0 || size_t(device) >= devices.size()) return cudaErrorInvalidDevice;
    const Device& d = devices[size_t(device)];
    switch (attribute) {
      case cudaDevAttrMaxThreadsPerBlock: *value = int(kMaxThreads); break;
      case cudaDevAttrMaxGridDimX: *value = 0x7fffffff; break;
      case cudaDevAttrMaxGridDimY: *value = 0xffff; break;
      case cudaDevAttrMaxSharedMemoryPerBlock: *value = int(kPlainSharedBytes); break;
      case cudaDevAttrWarpSize: *value = int(kWarp); break;
      case cudaDevAttrMultiProcessorCount: *value = d.processors; break;
      case cudaDevAttrL2CacheSize: *value = d.l2_bytes; break;
      case cudaDevAttrMaxThreadsPerMultiProcessor: *value = d.threads_per_processor; break;
      case cudaDevAttrComputeCapabilityMajor: *value = d.major; break;
      case cudaDevAttrComputeCapabilityMinor: *value = d.minor; break;
      case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(d.shared_per_processor); break;
      case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(d.shared_optin); break;
      case cudaDevAttrMaxBlocksPerMultiprocessor: *value = d.blocks_per_processor; break;
      case cudaDevAttrReservedSharedMemoryPerBlock: *value = int(kReservedSharedBytes); break;
      default: return cudaErrorInvalidValue;
    }
    return cudaSuccess;
  };
  return record({.call = "cudaDeviceGetAttribute", .result = answer()});
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto answer = [&] {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    Runtime& runtime = Runtime::get();
    const std::lock_guard lock(runtime.mutex);
    const int device = current_device();
    if (value < 0 || size_t(value) > runtime.devices[size_t(device)].shared_optin) {
      return cudaErrorInvalidValue;
    }
    runtime.allowed_shared[{device, function}] = size_t(value);
    return cudaSuccess;
  };
  return record({.call = "cudaFuncSetAttribute", .result = answer(), .bytes = size_t(value)});
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t shared_bytes) {
  const auto answer = [&] {
    if (threads <= 0) return cudaErrorInvalidValue;
    const std::lock_guard lock(Runtime::get().mutex);
    const Device& d = Runtime::get().devices[size_t(current_device())];
    const int warps = (threads + int(kWarp) - 1) / int(kWarp);
    const size_t by_shared = d.shared_per_processor / (shared_bytes + kReservedSharedBytes);
    *blocks = std::min({d.threads_per_processor / (warps * int(kWarp)), d.blocks_per_processor,
                        int(std::min<size_t>(by_shared, 64))});
    if (shared_bytes > d.shared_optin || threads > int(kMaxThreads)) *blocks = 0;
    return cudaSuccess;
  };
  return record({.call = "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
                 .result = answer(),
                 .shared_bytes = shared_bytes});
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const auto answer = [&] {
    *memory = nullptr;
    if (const auto error = forbidden_by_capture()) return error;
    if (bytes == 0) return cudaSuccess;
    Runtime& runtime = Runtime::get();
    const std::lock_guard lock(runtime.mutex);
    if (runtime.allocations_to_fail > 0) {
      --runtime.allocations_to_fail;
      return cudaErrorMemoryAllocation;
    }
    if (posix_memalign(memory, kAlignment, bytes) != 0) return cudaErrorMemoryAllocation;
    std::memset(*memory, 0xff, bytes);  // NaN in every format
    track(*memory, bytes);
    runtime.allocations[reinterpret_cast<uintptr_t>(*memory)] = bytes;
    return cudaSuccess;
  };
  return record({.call = "cudaMalloc", .result = answer(), .bytes = bytes});
}

cudaError_t cudaFree(void* memory) {
  const auto answer = [&] {
    if (memory == nullptr) return cudaSuccess;
    if (const auto error = forbidden_by_capture()) return error;
    drain_all(-1, false);
    {
      const std::lock_guard lock(Runtime::get().mutex);
      if (Runtime::get().allocations.erase(reinterpret_cast<uintptr_t>(memory)) == 0) {
        return cudaErrorInvalidValue;
      }
    }
    untrack(memory);
    std::free(memory);
    return cudaSuccess;
  };
  return record({.call = "cudaFree", .result = answer()});
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const auto answer = [&] {
    if (const auto error = forbidden_by_capture()) return error;
    return submit(nullptr, [=] {
      if (!Runtime::get().dry) copy(to, from, bytes);
    });
  };
  return record({.call = "cudaMemcpy", .result = answer(), .bytes = bytes});
}

// Memory of the host may be changed once the call returns, and holds the result then: such memory
// is not page-locked.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const auto answer = [&] {
    const bool to_device = on_device(to), from_device = on_device(from);
    if ((kind == cudaMemcpyHostToDevice && from_device) ||
        (kind == cudaMemcpyDeviceToHost && to_device)) {
      return cudaErrorInvalidValue;
    }
    if (from_device || Runtime::get().dry) {
      const auto error = submit(stream, [=] {
        if (!Runtime::get().dry) copy(to, from, bytes);
      });
      if (!to_device && kind == cudaMemcpyDeviceToHost) drain(stream);
      return error;
    }
    const auto* begin = static_cast<const char*>(from);
    auto kept = std::make_shared<std::vector<char>>(begin, begin + bytes);
    return submit(stream, [=] { copy(to, kept->data(), bytes); });
  };
  return record({.call = "cudaMemcpyAsync", .result = answer(), .stream = stream, .bytes = bytes});
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const auto result = submit(stream, [=] {
    if (Runtime::get().dry) return;
    note_written(to, bytes);
    std::memset(to, value, bytes);
  });
  return record({.call = "cudaMemsetAsync", .result = result, .stream = stream, .bytes = bytes});
}
