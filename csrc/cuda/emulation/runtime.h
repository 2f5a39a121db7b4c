// SPDX-License-Identifier: BSD-3-Clause
// The runtime's state, shared by its sources.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include "emulation.h"

using StreamWork = std::vector<std::function<void()>>;

struct CUgraph_st {
  StreamWork work;
};
struct CUgraphExec_st {
  StreamWork work;
};
struct CUstream_st {
  int device = 0;
  unsigned flags = 0;
  bool eager = false;  // does its work at once
  StreamWork waiting = {};
  std::mutex turn = {};  // who holds it does the stream's work
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  StreamWork captured = {};
};

namespace aspp::cuda::emulation {

struct Runtime {
  std::mutex mutex;  // of everything below
  std::vector<Device> devices{kDevices[0]};
  std::map<uintptr_t, size_t> allocations;  // where, bytes
  std::map<std::pair<int, const void*>, size_t> allowed_shared;
  std::set<cudaStream_t> streams;
  std::deque<Event> log;
  uint64_t seed;
  unsigned threads;
  unsigned allocations_to_fail = 0;
  std::atomic<bool> dry = false;  // read without the mutex

  static Runtime& get();
};

// Writes down the event, remembers its error as the thread's last one, returns it.
cudaError_t record(Event event);
// The thread's.
int& current_device();
cudaError_t& last_error();
cudaStreamCaptureMode& capture_mode();

bool exists(cudaStream_t stream);
// Does, queues or captures the work, as the stream's state asks.
cudaError_t submit(cudaStream_t stream, std::function<void()> work);
// All that waits on the stream.
void drain(cudaStream_t stream);
// The device's streams but, if `blocking` only, those that do not wait for the default stream.
void drain_all(int device, bool blocking);
// cudaErrorStreamCaptureUnsupported where a capture forbids this thread what may synchronise; ends
// that capture.
cudaError_t forbidden_by_capture();

}  // namespace aspp::cuda::emulation
