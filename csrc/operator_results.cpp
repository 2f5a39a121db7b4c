// SPDX-License-Identifier: BSD-3-Clause
#include "operator_results.h"

#include <array>

namespace aspp {

bool any_channels_last(const std::vector<Tensor>& weights) {
  for (const Tensor& w : weights) {
    if (is_channels_last(w)) return true;
  }
  return false;
}

Tensor empty_image(const Tensor& like, int64_t batch, int64_t channels, const PyramidShape& shape,
                   bool channels_last) {
  const std::array<int64_t, 4> size{batch, channels, shape.height, shape.width};
  return with_memory([&] {
    return torch::stable::empty({size.data(), size.size()}, like.scalar_type(), std::nullopt,
                                like.device(), std::nullopt,
                                channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                              : torch::headeronly::MemoryFormat::Contiguous);
  });
}

Tensor empty_as(const Tensor& like) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, sizes);
}

std::vector<Tensor> empty_each(const std::vector<Tensor>& like, bool needed, bool zero) {
  std::vector<Tensor> made;
  for (size_t i = 0; needed && i < like.size(); ++i) {
    made.push_back(with_memory([&] { return empty_as(like[i]); }));
    if (zero) torch::stable::zero_(made.back());
  }
  return made;
}

Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes) {
  return with_memory([&] { return torch::stable::new_empty(like, {sizes.data(), sizes.size()}); });
}

Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  const int64_t size[] = {bytes};
  return with_memory([&] { return torch::stable::new_empty(like, {size, 1}, ScalarType::Byte); });
}

}  // namespace aspp
