// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <thread>

#include "runtime.h"

#define ASPP_EXPORT __attribute__((visibility("default")))

namespace aspp::cuda::emulation {
namespace {

constexpr size_t kLogLimit = 100'000;

uint64_t read_number(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != 0 ? std::strtoull(text, nullptr, 10) : otherwise;
}

}  // namespace

Runtime& Runtime::get() {
  static Runtime* runtime = [] {  // never destroyed: libraries may still call it at exit
    auto* made = new Runtime;
    made->seed = read_number("ASPP_EMULATE_SEED", 0);
    made->threads = unsigned(
        read_number("ASPP_EMULATE_THREADS", std::max(1u, std::thread::hardware_concurrency())));
    return made;
  }();
  return *runtime;
}

Device device_of(int architecture) {
  for (const Device& device : kDevices) {
    if (device.major * 10 + device.minor == architecture) return device;
  }
  fail("no device of architecture %d", architecture);
}

void set_devices(std::vector<Device> devices) {
  const std::lock_guard lock(Runtime::get().mutex);
  Runtime::get().devices = std::move(devices);
  Runtime::get().allowed_shared.clear();
}

void set_seed(uint64_t seed) {
  const std::lock_guard lock(Runtime::get().mutex);
  Runtime::get().seed = seed;
}

void set_threads(unsigned os_threads) {
  const std::lock_guard lock(Runtime::get().mutex);
  Runtime::get().threads = std::max(1u, os_threads);
}

void set_dry_run(bool dry) { Runtime::get().dry = dry; }

void fail_allocations(unsigned next) {
  const std::lock_guard lock(Runtime::get().mutex);
  Runtime::get().allocations_to_fail = next;
}

static thread_local cudaStream_t torch_stream = nullptr;
void set_current_stream(cudaStream_t stream) { torch_stream = stream; }
cudaStream_t current_stream() { return torch_stream; }

static void enter_stream(bool own) {
  cudaStream_t stream = nullptr;
  if (own) {
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    stream->eager = true;
  }
  if (torch_stream != nullptr) cudaStreamDestroy(torch_stream);
  torch_stream = stream;
}

cudaError_t record(Event event) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard lock(runtime.mutex);
  if (event.result != cudaSuccess) last_error() = event.result;
  event.device = current_device();
  if (runtime.log.size() >= kLogLimit) {
    runtime.log.erase(runtime.log.begin(), runtime.log.begin() + kLogLimit / 2);
  }
  runtime.log.push_back(std::move(event));
  return runtime.log.back().result;
}

std::vector<Event> log() {
  const std::lock_guard lock(Runtime::get().mutex);
  return {Runtime::get().log.begin(), Runtime::get().log.end()};
}

void clear_log() {
  const std::lock_guard lock(Runtime::get().mutex);
  Runtime::get().log.clear();
}

size_t count(const char* call) {
  const std::lock_guard lock(Runtime::get().mutex);
  const auto& events = Runtime::get().log;
  return size_t(std::count_if(events.begin(), events.end(), [&](const Event& event) {
    return std::string_view(event.call) == call;
  }));
}

size_t live_allocations() {
  const std::lock_guard lock(Runtime::get().mutex);
  return Runtime::get().allocations.size();
}

static void append_json(std::string& text, const Event& event) {
  const auto [g, b] = std::pair(event.grid, event.block);
  char line[512];
  std::snprintf(line, sizeof line,
                "{\"call\": \"%s\", \"result\": \"%s\", \"device\": %d, \"stream\": %zu, "
                "\"bytes\": %zu, \"kernel\": \"%s\", \"grid\": [%u, %u, %u], "
                "\"block\": [%u, %u, %u], \"shared_bytes\": %zu}",
                event.call, cudaGetErrorName(event.result), event.device,
                reinterpret_cast<size_t>(event.stream), event.bytes, event.kernel.c_str(), g.x, g.y,
                g.z, b.x, b.y, b.z, event.shared_bytes);
  text.append(line);
}

}  // namespace aspp::cuda::emulation

using namespace aspp::cuda;

extern "C" ASPP_EXPORT int aspp_emulation_set(const char* name, long long value) {
  const std::string_view which = name;
  if (which == "seed") {
    emulation::set_seed(uint64_t(value));
  } else if (which == "threads") {
    emulation::set_threads(unsigned(value));
  } else if (which == "fail_allocations") {
    emulation::fail_allocations(unsigned(value));
  } else if (which == "dry_run") {
    emulation::set_dry_run(value != 0);
  } else if (which == "stream") {
    emulation::enter_stream(value != 0);
  } else if (which == "architecture") {
    emulation::set_devices({emulation::device_of(int(value))});
  } else if (which == "devices") {
    const auto first = emulation::Runtime::get().devices.front();
    emulation::set_devices(std::vector<emulation::Device>(size_t(value), first));
  } else {
    return 1;
  }
  return 0;
}

extern "C" ASPP_EXPORT const char* aspp_emulation_log() {
  static thread_local std::string text;
  text.clear();
  for (const emulation::Event& event : emulation::log()) {
    text.append(1, text.empty() ? '[' : ',');
    emulation::append_json(text, event);
  }
  text.append(text.empty() ? "[]" : "]");
  return text.c_str();
}

extern "C" ASPP_EXPORT void aspp_emulation_clear_log() { emulation::clear_log(); }
