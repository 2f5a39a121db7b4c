// SPDX-License-Identifier: BSD-3-Clause
// Streams, captures, graphs.
#include "runtime.h"

namespace aspp::cuda::emulation {
namespace {

bool is_default(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

}  // namespace

cudaStreamCaptureMode& capture_mode() {
  static thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}

bool exists(cudaStream_t stream) {
  const std::lock_guard lock(Runtime::get().mutex);
  return is_default(stream) || Runtime::get().streams.count(stream);
}

void drain(cudaStream_t stream) {
  if (is_default(stream) || !exists(stream)) return;
  const std::lock_guard turn(stream->turn);
  StreamWork work;
  {
    const std::lock_guard lock(Runtime::get().mutex);
    work.swap(stream->waiting);
  }
  for (const auto& step : work) step();
}

void drain_all(int device, bool blocking) {
  std::vector<cudaStream_t> chosen;
  {
    const std::lock_guard lock(Runtime::get().mutex);
    for (cudaStream_t stream : Runtime::get().streams) {
      if (device >= 0 && stream->device != device) continue;
      if (!blocking || !(stream->flags & cudaStreamNonBlocking)) chosen.push_back(stream);
    }
  }
  for (cudaStream_t stream : chosen) drain(stream);
}

cudaError_t submit(cudaStream_t stream, std::function<void()> work) {
  if (!exists(stream)) return cudaErrorInvalidResourceHandle;
  if (!is_default(stream)) {
    {
      const std::lock_guard lock(Runtime::get().mutex);
      if (stream->capture == cudaStreamCaptureStatusInvalidated) {
        return cudaErrorStreamCaptureInvalidated;
      }
      const bool captured = stream->capture == cudaStreamCaptureStatusActive;
      (captured ? stream->captured : stream->waiting).push_back(std::move(work));
      if (captured || !stream->eager) return cudaSuccess;
    }
    drain(stream);
    return cudaSuccess;
  }
  {
    const std::lock_guard lock(Runtime::get().mutex);
    for (cudaStream_t other : Runtime::get().streams) {
      const bool blocking = !(other->flags & cudaStreamNonBlocking);
      if (blocking && other->capture == cudaStreamCaptureStatusActive) {
        other->capture = cudaStreamCaptureStatusInvalidated;
        return cudaErrorStreamCaptureImplicit;
      }
    }
  }
  drain_all(current_device(), true);
  work();
  return cudaSuccess;
}

cudaError_t forbidden_by_capture() {
  if (capture_mode() == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  const std::lock_guard lock(Runtime::get().mutex);
  for (cudaStream_t stream : Runtime::get().streams) {
    if (stream->capture == cudaStreamCaptureStatusActive &&
        stream->mode != cudaStreamCaptureModeRelaxed) {
      stream->capture = cudaStreamCaptureStatusInvalidated;
      return cudaErrorStreamCaptureUnsupported;
    }
  }
  return cudaSuccess;
}

}  // namespace aspp::cuda::emulation

using namespace aspp::cuda::emulation;

cudaError_t cudaDeviceSynchronize() {
  const auto forbidden = forbidden_by_capture();
  if (forbidden == cudaSuccess) drain_all(current_device(), false);
  return record({.call = "cudaDeviceSynchronize", .result = forbidden});
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = new CUstream_st{current_device(), flags};
  {
    const std::lock_guard lock(Runtime::get().mutex);
    Runtime::get().streams.insert(*stream);
  }
  return record({.call = "cudaStreamCreateWithFlags", .stream = *stream});
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (is_default(stream) || !exists(stream)) {
    return record({.call = "cudaStreamDestroy", .result = cudaErrorInvalidResourceHandle});
  }
  drain(stream);
  {
    const std::lock_guard lock(Runtime::get().mutex);
    Runtime::get().streams.erase(stream);
  }
  const auto result = record({.call = "cudaStreamDestroy", .stream = stream});
  delete stream;
  return result;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const auto answer = [&] {
    if (!exists(stream)) return cudaErrorInvalidResourceHandle;
    if (is_default(stream)) {
      drain_all(current_device(), true);
      return cudaSuccess;
    }
    {
      const std::lock_guard lock(Runtime::get().mutex);
      if (stream->capture != cudaStreamCaptureStatusNone) {
        stream->capture = cudaStreamCaptureStatusInvalidated;
        return cudaErrorStreamCaptureUnsupported;
      }
    }
    drain(stream);
    return cudaSuccess;
  };
  return record({.call = "cudaStreamSynchronize", .result = answer(), .stream = stream});
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const auto answer = [&] {
    if (!exists(stream)) return cudaErrorInvalidResourceHandle;
    const std::lock_guard lock(Runtime::get().mutex);
    *status = is_default(stream) ? cudaStreamCaptureStatusNone : stream->capture;
    return cudaSuccess;
  };
  return record({.call = "cudaStreamIsCapturing", .result = answer(), .stream = stream});
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode());
  return record({.call = "cudaThreadExchangeStreamCaptureMode"});
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const auto answer = [&] {
    if (is_default(stream)) return cudaErrorStreamCaptureUnsupported;
    if (!exists(stream)) return cudaErrorInvalidResourceHandle;
    const std::lock_guard lock(Runtime::get().mutex);
    if (stream->capture != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
    stream->capture = cudaStreamCaptureStatusActive;
    stream->mode = mode;
    return cudaSuccess;
  };
  return record({.call = "cudaStreamBeginCapture", .result = answer(), .stream = stream});
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const auto answer = [&] {
    *graph = nullptr;
    if (is_default(stream)) return cudaErrorStreamCaptureUnmatched;
    if (!exists(stream)) return cudaErrorInvalidResourceHandle;
    const std::lock_guard lock(Runtime::get().mutex);
    const auto status = std::exchange(stream->capture, cudaStreamCaptureStatusNone);
    StreamWork work;
    work.swap(stream->captured);
    if (status == cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnmatched;
    if (status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;
    *graph = new CUgraph_st{std::move(work)};
    return cudaSuccess;
  };
  return record({.call = "cudaStreamEndCapture", .result = answer(), .stream = stream});
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return record({.call = "cudaGraphInstantiate"});
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const auto work = std::make_shared<const StreamWork>(executable->work);
  const auto result = submit(stream, [work] {
    for (const auto& step : *work) {
      auto again = step;
      again();
    }
  });
  return record({.call = "cudaGraphLaunch", .result = result, .stream = stream});
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return record({.call = "cudaGraphDestroy"});
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return record({.call = "cudaGraphExecDestroy"});
}
