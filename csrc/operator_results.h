// SPDX-License-Identifier: BSD-3-Clause
// How the bindings allocate what they return.
#pragma once

#include "checks.h"

namespace aspp {

// The stable ABI loses the words of a failed allocation (torch 2.11 to 2.12), so ours say it.
template <typename F>
auto with_memory(const F& allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error& error) {
    refuse("aspp_ext: not enough memory for a result or its operands (", error.what(), ")");
  }
}

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
