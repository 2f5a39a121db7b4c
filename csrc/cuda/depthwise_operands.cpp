// SPDX-License-Identifier: BSD-3-Clause
#include "depthwise_operands.h"

namespace aspp::cuda {

void set_filters(Operands& operands, int64_t channels, const std::vector<Tensor>& depthwise,
                 std::vector<DepthwiseBranch>& branches) {
  const int64_t pitch = operands.padded(channels), bytes = bytes_of(operands.math());
  PackFiltersParams params{};
  params.channels = operands.narrow("the number of channels", channels);
  params.pitch = operands.narrow("the number of channels", pitch);
  for (size_t b = 0; b < depthwise.size(); ++b) {
    const int32_t taps = branches[b].taps;
    if (taps == 0) continue;
    check_size(operands.op(), "an operand", {taps, pitch});
    void* const out = operands.allocate(taps * pitch * bytes);
    branches[b].filter = out;
    params.most_taps = std::max(params.most_taps, taps);
    params.branch[params.branches++] = {operands.vector(depthwise[b]), out, taps};
  }
  check_cuda(operands.op(), launch_pack_filters_sm80(operands.math(), params, operands.stream()));
}

std::vector<const void*> pack_pairs(Operands& operands, int64_t channels,
                                    const std::vector<Tensor>& first,
                                    const std::vector<Tensor>& second) {
  const Math math = operands.math();
  const int64_t pitch = operands.padded(channels);
  const int64_t bytes = 2 * pitch * (math == Math::float64 ? 8 : 4);
  PackAffineParams params{};
  params.channels = operands.narrow("the number of channels", channels);
  params.pitch = operands.narrow("the number of channels", pitch);
  std::vector<const void*> packed(first.size(), nullptr);
  for (size_t b = 0; b < first.size(); ++b) {
    if (first[b].numel() == 0) continue;
    params.of_sums = operands.is_sum(first[b]);
    void* const out = operands.allocate(bytes);
    packed[b] = out;
    params.branch[params.branches++] = {operands.vector(first[b]), operands.vector(second[b]), out};
  }
  check_cuda(operands.op(), launch_pack_affine_sm80(math, params, operands.stream()));
  return packed;
}

std::vector<DepthwiseBranch> depthwise_branches(Operands& operands, int64_t channels,
                                                const std::vector<Tensor>& depthwise,
                                                const std::vector<int64_t>& rates,
                                                const std::vector<Tensor>& between_scale,
                                                const std::vector<Tensor>& between_shift) {
  operands.narrow("the number of channels", operands.padded(channels));
  std::vector<DepthwiseBranch> branches;
  for (size_t b = 0; b < depthwise.size(); ++b) {
    DepthwiseBranch& branch = branches.emplace_back();
    branch = {nullptr, nullptr, 1, 1, int32_t(rates[2 * b]), int32_t(rates[2 * b + 1]), 0};
    if (depthwise[b].numel() == 0) continue;
    branch.kernel_h = operands.narrow("the kernel's height", depthwise[b].size(2));
    branch.kernel_w = operands.narrow("the kernel's width", depthwise[b].size(3));
    branch.taps = operands.narrow("the taps", depthwise[b].size(2) * depthwise[b].size(3));
  }
  set_filters(operands, channels, depthwise, branches);
  const std::vector<const void*> affines =
      pack_pairs(operands, channels, between_scale, between_shift);
  for (size_t b = 0; b < affines.size(); ++b) branches[b].affine = affines[b];
  return branches;
}

DepthwiseShape depthwise_shape(const Operands& operands, const PyramidShape& x) {
  const char* const channels = "the number of channels";
  return {operands.narrow("the batch", x.batch), operands.narrow("the height", x.height),
          operands.narrow("the width", x.width), operands.narrow(channels, x.channels),
          operands.narrow(channels, operands.padded(x.channels))};
}

}  // namespace aspp::cuda
