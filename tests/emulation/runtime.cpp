// SPDX-License-Identifier: BSD-3-Clause
// The model of devices, launches, streams and captures.
#include <thread>

#include "check.h"

using namespace aspp::cuda;
namespace emulation = aspp::cuda::emulation;

namespace {

struct Store {
  int* to;
  int value;
};
void store(const Store p) { *p.to = p.value; }
void other(const Store p) { *p.to = p.value; }

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream = nullptr) {
  static int ignored;
  return emulation::launch(store, "store", grid, block, shared_bytes, stream, Store{&ignored, 0});
}

int attribute(cudaDeviceAttr which, int device = 0) {
  int value = -1;
  EQUAL(cudaDeviceGetAttribute(&value, which, device), cudaSuccess);
  return value;
}

TEST(illegal_launches) {
  EQUAL(launch(1, 1, 0), cudaSuccess);
  EQUAL(launch(0, 32, 0), cudaErrorInvalidConfiguration);
  EQUAL(cudaPeekAtLastError(), cudaErrorInvalidConfiguration);
  EQUAL(cudaGetLastError(), cudaErrorInvalidConfiguration);
  EQUAL(cudaGetLastError(), cudaSuccess);
  EQUAL(launch(1u << 31, 32, 0), cudaErrorInvalidConfiguration);
  EQUAL(launch(dim3(1, 65536), 32, 0), cudaErrorInvalidConfiguration);
  EQUAL(launch(1, 0, 0), cudaErrorInvalidConfiguration);
  EQUAL(launch(1, 1025, 0), cudaErrorInvalidConfiguration);
  EQUAL(launch(1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration);
  EQUAL(launch(1, 1, (48 << 10) + 1), cudaErrorInvalidValue);
  EQUAL(launch(1, 1, 0, reinterpret_cast<cudaStream_t>(0x1234)), cudaErrorInvalidResourceHandle);
}

TEST(shared_memory_limits) {
  const struct {
    int architecture, kib, processors;
  } devices[] = {{80, 163, 108}, {86, 99, 84},    {89, 99, 128},
                 {90, 227, 132}, {100, 227, 148}, {120, 99, 170}};
  for (const auto& expected : devices) {
    emulation::set_devices({emulation::device_of(expected.architecture)});
    const int most = expected.kib << 10;
    EQUAL(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), most);
    EQUAL(attribute(cudaDevAttrMultiProcessorCount), expected.processors);
    EQUAL(attribute(cudaDevAttrComputeCapabilityMajor), expected.architecture / 10);
    const auto set = [&](int bytes) {
      return cudaFuncSetAttribute(store, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    };
    EQUAL(set(most + 1), cudaErrorInvalidValue);
    EQUAL(set(most), cudaSuccess);
    EQUAL(launch(1, 1, size_t(most)), cudaSuccess);
    EQUAL(set(60 << 10), cudaSuccess);
    EQUAL(launch(1, 1, (60 << 10) + 1), cudaErrorInvalidValue);
    int ignored;
    EQUAL(emulation::launch(other, "other", 1, 1, 60 << 10, nullptr, Store{&ignored, 0}),
          cudaErrorInvalidValue);  // each kernel by itself
    EQUAL(ptx::launch(other, "other", 1, 1, size_t(most), nullptr, Store{&ignored, 0}),
          cudaSuccess);
    EQUAL(ptx::launch(other, "other", 1, 1, size_t(most) + 1, nullptr, Store{&ignored, 0}),
          cudaErrorInvalidValue);
    EQUAL(cudaGetLastError(), cudaSuccess);
    int blocks;
    EQUAL(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, store, 256, size_t(most)),
          cudaSuccess);
    EQUAL(blocks, 1);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, store, 256, 48 << 10);
    EQUAL(blocks, int(emulation::device_of(expected.architecture).shared_per_processor >> 10) / 49);
  }
  emulation::set_devices({emulation::device_of(80)});
}

TEST(log_and_dry_run) {
  emulation::clear_log();
  int value = 0;
  EQUAL(ptx::launch(store, "store", 0, 32, 0, nullptr, Store{&value, 1}), cudaSuccess);
  EQUAL(emulation::log().size(), 0u);
  emulation::set_dry_run(true);
  EQUAL(ptx::launch(store, "store", 7, 32, 50 << 10, nullptr, Store{nullptr, 1}), cudaSuccess);
  EQUAL(launch(1, 2000, 0), cudaErrorInvalidConfiguration);
  emulation::set_dry_run(false);
  EQUAL(emulation::count("launch"), 2u);
  EQUAL(emulation::count("cudaFuncSetAttribute"), 1u);
  const emulation::Event event = emulation::log()[1];
  EQUAL(event.grid.x, 7u);
  EQUAL(event.block.x, 32u);
  EQUAL(event.shared_bytes, 50u << 10);
  HOLDS(event.kernel == "store" && std::string(event.call) == "launch");
  HOLDS(std::strstr(aspp_emulation_log(), "\"kernel\": \"store\", \"grid\": [7, 1, 1]") != nullptr);
  EQUAL(aspp_emulation_set("seed", 0), 0);
  EQUAL(aspp_emulation_set("sed", 0), 1);
  aspp_emulation_clear_log();
  HOLDS(std::string(aspp_emulation_log()) == "[]");
}

TEST(memory) {
  float* memory = nullptr;
  EQUAL(cudaMalloc(&memory, 40), cudaSuccess);
  EQUAL(emulation::live_allocations(), 1u);
  HOLDS(memory[9] != memory[9]);  // NaN
  const float values[10] = {1, 2, 3};
  EQUAL(cudaMemcpy(memory, values, sizeof values, cudaMemcpyHostToDevice), cudaSuccess);
  EQUAL(memory[2], 3.0f);
  EQUAL(cudaMemcpyAsync(memory, values, 4, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EQUAL(cudaMemsetAsync(memory, 0, 40), cudaSuccess);
  EQUAL(memory[2], 0.0f);
  EQUAL(cudaFree(memory + 1), cudaErrorInvalidValue);
  EQUAL(cudaFree(memory), cudaSuccess);
  EQUAL(cudaFree(memory), cudaErrorInvalidValue);
  EQUAL(cudaFree(nullptr), cudaSuccess);
  EQUAL(emulation::live_allocations(), 0u);
}

TEST(streams_wait) {
  cudaStream_t stream, blocking;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaStreamCreateWithFlags(&blocking, cudaStreamDefault);
  int* memory;
  cudaMalloc(&memory, 8);
  int source = 5;
  EQUAL(cudaMemcpyAsync(memory, &source, 4, cudaMemcpyHostToDevice, stream), cudaSuccess);
  source = 6;  // was read
  EQUAL(ptx::launch(store, "store", 1, 1, 0, blocking, Store{memory + 1, 7}), cudaSuccess);
  EQUAL(memory[0], -1);
  EQUAL(memory[1], -1);
  EQUAL(cudaMemsetAsync(&source, 0, 4), cudaSuccess);  // the default stream waits for one of them
  EQUAL(memory[0], -1);
  EQUAL(memory[1], 7);
  EQUAL(cudaStreamSynchronize(stream), cudaSuccess);
  EQUAL(memory[0], 5);
  EQUAL(ptx::launch(store, "store", 1, 1, 0, stream, Store{memory, 8}), cudaSuccess);
  int back = 0;
  EQUAL(cudaMemcpyAsync(&back, memory, 4, cudaMemcpyDeviceToHost, stream), cudaSuccess);
  EQUAL(back, 8);
  EQUAL(ptx::launch(store, "store", 1, 1, 0, stream, Store{memory, 9}), cudaSuccess);
  EQUAL(cudaDeviceSynchronize(), cudaSuccess);
  EQUAL(memory[0], 9);
  EQUAL(ptx::launch(store, "store", 1, 1, 0, stream, Store{&source, 4}), cudaSuccess);
  EQUAL(cudaFree(memory), cudaSuccess);  // waits for the device
  EQUAL(source, 4);
  EQUAL(cudaStreamDestroy(stream), cudaSuccess);
  EQUAL(cudaStreamDestroy(blocking), cudaSuccess);
  EQUAL(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
}

TEST(current_stream) {
  HOLDS(emulation::current_stream() == nullptr);
  EQUAL(aspp_emulation_set("stream", 1), 0);
  const cudaStream_t stream = emulation::current_stream();
  HOLDS(stream != nullptr);
  std::thread([] { HOLDS(emulation::current_stream() == nullptr); }).join();
  int value = 0;
  EQUAL(ptx::launch(store, "store", 1, 1, 0, stream, Store{&value, 1}), cudaSuccess);
  EQUAL(value, 1);
  HOLDS(emulation::log().back().stream == stream);
  EQUAL(aspp_emulation_set("stream", 0), 0);
  HOLDS(emulation::current_stream() == nullptr);
}

TEST(devices) {
  emulation::set_devices({emulation::device_of(80), emulation::device_of(90)});
  int count, device;
  cudaGetDeviceCount(&count);
  EQUAL(count, 2);
  EQUAL(cudaSetDevice(2), cudaErrorInvalidDevice);
  EQUAL(cudaSetDevice(1), cudaSuccess);
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  EQUAL(launch(1, 1, 0, stream), cudaSuccess);
  EQUAL(emulation::log().back().device, 1);
  std::thread([] {  // the current device is each thread's own
    int own;
    cudaGetDevice(&own);
    EQUAL(own, 0);
  })
      .join();
  cudaSetDevice(0);
  EQUAL(launch(1, 1, 0, stream), cudaErrorInvalidResourceHandle);
  EQUAL(cudaGetDevice(&device), cudaSuccess);
  EQUAL(device, 0);
  cudaStreamDestroy(stream);
  emulation::set_devices({emulation::device_of(80)});
  cudaGetLastError();
}

TEST(capture) {
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  int value = 0;
  const auto status = [&] {
    cudaStreamCaptureStatus now;
    EQUAL(cudaStreamIsCapturing(stream, &now), cudaSuccess);
    return now;
  };
  EQUAL(status(), cudaStreamCaptureStatusNone);
  EQUAL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  EQUAL(status(), cudaStreamCaptureStatusActive);
  EQUAL(ptx::launch(store, "store", 1, 1, 0, stream, Store{&value, 1}), cudaSuccess);
  void* memory = nullptr;  // what the relaxed mode allows
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  EQUAL(cudaThreadExchangeStreamCaptureMode(&mode), cudaSuccess);
  EQUAL(mode, cudaStreamCaptureModeGlobal);
  EQUAL(cudaMalloc(&memory, 4), cudaSuccess);
  cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGraph_t graph;
  EQUAL(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaDeviceSynchronize();
  EQUAL(value, 0);
  cudaGraphExec_t executable;
  cudaGraphInstantiate(&executable, graph);
  for (int times = 0; times < 3; ++times) {
    value = 0;
    EQUAL(cudaGraphLaunch(executable, stream), cudaSuccess);
    EQUAL(value, 0);
    cudaStreamSynchronize(stream);
    EQUAL(value, 1);
  }
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaFree(memory);

  const auto ends = [&](auto forbidden, cudaError_t error) {
    EQUAL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
    EQUAL(forbidden(), error);
    EQUAL(status(), cudaStreamCaptureStatusInvalidated);
    EQUAL(launch(1, 1, 0, stream), cudaErrorStreamCaptureInvalidated);
    EQUAL(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    EQUAL(status(), cudaStreamCaptureStatusNone);
  };
  ends([&] { return cudaMalloc(&memory, 4); }, cudaErrorStreamCaptureUnsupported);
  ends([&] { return cudaStreamSynchronize(stream); }, cudaErrorStreamCaptureUnsupported);
  ends([&] { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported);
  ends([&] { return cudaMemcpy(&value, &value, 4, cudaMemcpyDefault); },
       cudaErrorStreamCaptureUnsupported);
  EQUAL(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureUnmatched);
  EQUAL(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal),
        cudaErrorStreamCaptureUnsupported);

  // The default stream would have to wait for a blocking one, not for the others.
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal);
  EQUAL(launch(1, 1, 0), cudaSuccess);
  EQUAL(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  cudaStreamCreateWithFlags(&stream, cudaStreamDefault);
  ends([&] { return launch(1, 1, 0); }, cudaErrorStreamCaptureImplicit);
  cudaStreamDestroy(stream);
}

}  // namespace

int main(int count, char** names) { return check::main(count, names); }
