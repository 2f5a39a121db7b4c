// SPDX-License-Identifier: BSD-3-Clause
// How the bindings allocate what they return.
#pragma once

#include "checks.h"

namespace aspp {

// PyTorch's own sentence on its call that failed last on this thread, or `otherwise`: from torch
// 2.13 on the stable ABI tells it.
std::string torch_words(const std::string& otherwise);
// The phrase by which programs know that memory is short and try less.
std::string no_memory(const Tensor& like);

// A call of PyTorch, which fails in its words.
template <typename F>
auto in_torch_words(const std::string& otherwise, const F& call) {
  try {
    return call();
  } catch (const std::runtime_error&) {
    refuse("aspp_ext: ", torch_words(otherwise));
  }
}
// One that allocates, on the device of `like`.
template <typename F>
auto with_memory(const Tensor& like, const F& allocate) {
  return in_torch_words(no_memory(like), allocate);
}

// An operator's function that tells in PyTorch's words when memory for its own data is short, which
// the stable ABI would tell as Python's MemoryError, or as a line of C++.
template <auto function, typename = decltype(function)>
struct TellsOfMemory;
template <auto function, typename Result, typename... Arguments>
struct TellsOfMemory<function, Result (*)(Arguments...)> {
  static Result call(Arguments... arguments) {
    try {
      return function(std::forward<Arguments>(arguments)...);
    } catch (const std::bad_alloc&) {
      refuse("aspp_ext: ", "DefaultCPUAllocator: can't allocate memory for working buffers");
    }
  }
};
#define ASPP_BOX(function) TORCH_BOX((&TellsOfMemory<function>::call))

bool any_channels_last(const std::vector<Tensor>& weights);

// [batch, channels, H, W] with `like`'s dtype and device
Tensor empty_image(const Tensor& like, int64_t batch, int64_t channels, const PyramidShape& shape,
                   bool channels_last);

Tensor empty_as(const Tensor& like);  // contiguous
// Of each; an empty list where they are not needed.
std::vector<Tensor> empty_each(const std::vector<Tensor>& like, bool needed, bool zero);
Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes);
Tensor empty_bytes(const Tensor& like, int64_t bytes);  // on its device

}  // namespace aspp
