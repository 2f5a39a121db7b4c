// SPDX-License-Identifier: BSD-3-Clause
// Where a binding's work goes, PyTorch's current stream on the device of a tensor, and memory for
// it.
#pragma once

#include "../operator_results.h"

#ifdef ASPP_EMULATE

#include <deque>

#include "emulation/emulation.h"
#include "emulation/unwritten.h"

#define ASPP_DEVICE_KEY CPU

namespace aspp::cuda {

class CurrentStream {
 public:
  explicit CurrentStream(const Tensor&) {}
  cudaStream_t get() const { return emulation::current_stream(); }
  Tensor allocate(const Tensor& like, int64_t bytes) {
    return memory_.emplace_back(empty_bytes(like, bytes), bytes).tensor;
  }

 private:
  struct Memory {
    Memory(const Tensor& t, int64_t bytes) : tensor(t), tracked(t.data_ptr(), size_t(bytes)) {}
    const Tensor tensor;
    const emulation::Tracked tracked;  // no longer than the tensor lives
  };
  std::deque<Memory> memory_;
};

}  // namespace aspp::cuda

#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define ASPP_DEVICE_KEY CUDA

namespace aspp::cuda {

// As long as it lives the tensor's device is the current one.
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t get() const { return stream_; }
  Tensor allocate(const Tensor& like, int64_t bytes) { return empty_bytes(like, bytes); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace aspp::cuda

#endif
