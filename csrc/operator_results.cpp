// SPDX-License-Identifier: BSD-3-Clause
#include "operator_results.h"

#include <array>

// Of torch 2.13 and newer; null where PyTorch is older.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace aspp {

std::string torch_words(const std::string& otherwise) {
  const char* said = nullptr;
  if (torch_exception_get_what_without_backtrace != nullptr)
    said = torch_exception_get_what_without_backtrace();
  const std::string words = said == nullptr ? "" : said;
  if (words.empty()) return otherwise;
  const size_t after_place = words.find("DefaultCPUAllocator");  // a place in PyTorch's sources
  return after_place == std::string::npos ? words : words.substr(after_place);
}

std::string no_memory(const Tensor& like) {
  const bool cpu = like.device().type() == torch::headeronly::DeviceType::CPU;
  return cpu ? "DefaultCPUAllocator: can't allocate memory for a result or its operands"
             : "CUDA out of memory. A result or its operands were asked for";
}

bool any_channels_last(const std::vector<Tensor>& weights) {
  for (const Tensor& w : weights) {
    if (is_channels_last(w)) return true;
  }
  return false;
}

Tensor empty_image(const Tensor& like, int64_t batch, int64_t channels, const PyramidShape& shape,
                   bool channels_last) {
  const std::array<int64_t, 4> size{batch, channels, shape.height, shape.width};
  return with_memory(like, [&] {
    return torch::stable::empty({size.data(), size.size()}, like.scalar_type(), std::nullopt,
                                like.device(), std::nullopt,
                                channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                              : torch::headeronly::MemoryFormat::Contiguous);
  });
}

Tensor empty_as(const Tensor& like) {
  const auto sizes = like.sizes();
  return with_memory(like, [&] { return torch::stable::new_empty(like, sizes); });
}

std::vector<Tensor> empty_each(const std::vector<Tensor>& like, bool needed, bool zero) {
  std::vector<Tensor> made;
  for (size_t i = 0; needed && i < like.size(); ++i) {
    made.push_back(empty_as(like[i]));
    if (zero) torch::stable::zero_(made.back());
  }
  return made;
}

Tensor empty_of(const Tensor& like, const std::vector<int64_t>& sizes) {
  return with_memory(like,
                     [&] { return torch::stable::new_empty(like, {sizes.data(), sizes.size()}); });
}

Tensor empty_bytes(const Tensor& like, int64_t bytes) {
  const int64_t size[] = {bytes};
  return with_memory(like,
                     [&] { return torch::stable::new_empty(like, {size, 1}, ScalarType::Byte); });
}

}  // namespace aspp
