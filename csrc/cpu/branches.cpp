// SPDX-License-Identifier: BSD-3-Clause
#include "branches.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

namespace aspp {

std::vector<BranchParams> separable_branches(Operands& operands,
                                             const std::vector<Tensor>& depthwise,
                                             const std::vector<Tensor>& pointwise,
                                             const std::vector<int64_t>& rates) {
  std::vector<BranchParams> branches(depthwise.size());
  for (size_t b = 0; b < depthwise.size(); ++b) {
    BranchParams& branch = branches[b];
    branch.rate_h = rates[2 * b];
    branch.rate_w = rates[2 * b + 1];
    if (depthwise[b].numel() > 0) {
      branch.depthwise = operands.depthwise(depthwise[b]);
      branch.kernel_h = depthwise[b].size(2);
      branch.kernel_w = depthwise[b].size(3);
    }
    if (pointwise.empty()) continue;
    set_weight(operands, branch, pointwise[b]);
    branch.out_channels = pointwise[b].size(0);
  }
  return branches;
}

std::vector<BranchParams> dense_branches(const std::vector<Tensor>& weights,
                                         const std::vector<int64_t>& rates) {
  std::vector<BranchParams> branches(weights.size());
  for (size_t b = 0; b < weights.size(); ++b) {
    branches[b].kernel_h = weights[b].size(2);
    branches[b].kernel_w = weights[b].size(3);
    branches[b].rate_h = rates[2 * b];
    branches[b].rate_w = rates[2 * b + 1];
    branches[b].out_channels = weights[b].size(0);
  }
  return branches;
}

void set_weight(Operands& operands, BranchParams& branch, const Tensor& weight) {
  const Matrix matrix = operands.weight(weight);
  branch.weight = matrix.data;
  branch.weight_tap = matrix.tap;
  branch.weight_row = matrix.row;
}

Tensor live_taps(const Tensor& weight, const PyramidShape& map, const int64_t* rates) {
  Tensor live = weight;
  for (const auto& [dim, size, rate] :
       {std::tuple{2, map.height, rates[0]}, std::tuple{3, map.width, rates[1]}}) {
    const int64_t radius = weight.size(dim) / 2, reach = std::min(radius, (size - 1) / rate);
    live = torch::stable::narrow(live, dim, radius - reach, 2 * reach + 1);
  }
  return live;
}

bool is_narrow(const PyramidShape& map) { return map.width <= 2 && map.height > map.width; }

PyramidShape turned(PyramidShape map) {
  std::swap(map.height, map.width);
  return map;
}

std::vector<int64_t> turned(const std::vector<int64_t>& rates) {
  std::vector<int64_t> exchanged = rates;
  for (size_t b = 0; b < rates.size(); b += 2) std::swap(exchanged[b], exchanged[b + 1]);
  return exchanged;
}

std::vector<Tensor> turned(const std::vector<Tensor>& weights, const PyramidShape& map,
                           const std::vector<int64_t>& rates) {
  std::vector<Tensor> exchanged;
  for (size_t b = 0; b < weights.size(); ++b) {
    const Tensor& weight = weights[b];
    exchanged.push_back(is_none(weight) ? weight : turned(live_taps(weight, map, &rates[2 * b])));
  }
  return exchanged;
}

PyramidParams params_of(const Image& x, const PyramidShape& shape,
                        std::vector<BranchParams>& branches) {
  PyramidParams params;
  params.x = x;
  params.batch = shape.batch;
  params.channels = shape.channels;
  params.height = shape.height;
  params.width = shape.width;
  params.branches = branches.data();
  params.branch_count = int64_t(branches.size());
  params.columns = assign_columns(branches);
  return params;
}

void set_epilogue(PyramidParams& params, Operands& operands,
                  const std::vector<BranchParams>& branches, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift, bool relu) {
  if (scale.has_value()) params.scale = columns_of(operands, *scale, 1, branches, params.columns);
  if (shift.has_value()) {
    const int64_t rows = shift->dim() == 2 ? shift->size(0) : 1;
    params.shift = columns_of(operands, *shift, rows, branches, params.columns);
    params.shift_n_stride = shift->dim() == 2 ? params.columns : 0;
  }
  params.relu = relu;
}

namespace {

// [rows, channels] in the compute type -> element (row, channel) of an image one row high.
void store(const void* rows, int64_t stride, int64_t count, int64_t channels, Image out,
           bool wide) {
  kernels().from_pixels(rows, stride, count, channels, out, wide);
}

}  // namespace

Tensor depthwise_gradient(const Tensor& like, const void* rows, bool wide) {
  const Tensor out = empty_as(like);
  const int64_t taps = like.size(2) * like.size(3);
  store(rows, padded(like.size(0)), taps, like.size(0),
        {out.data_ptr(), dtype_of(out), 0, taps, 0, 1}, wide);
  return out;
}

Tensor pointwise_gradient(const Tensor& like, const void* rows, bool wide) {
  const Tensor out = empty_as(like);
  store(rows, padded(like.size(0)), like.size(1), like.size(0),
        {out.data_ptr(), dtype_of(out), 0, like.size(1), 0, 1}, wide);
  return out;
}

Tensor vector_gradient(const Tensor& like, const void* row, bool wide) {
  const Tensor out = empty_as(like);
  store(row, padded(like.size(0)), 1, like.size(0), {out.data_ptr(), dtype_of(out), 0, 1, 0, 0},
        wide);
  return out;
}

}  // namespace aspp
