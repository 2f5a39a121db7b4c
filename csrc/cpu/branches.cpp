// SPDX-License-Identifier: BSD-3-Clause
#include "branches.h"

#include <array>

namespace aspp {

namespace {

void check_kernel_limit(const char* op, const std::string& name, const Tensor& w) {
  require(w.size(2) <= kMaxKernel && w.size(3) <= kMaxKernel, op, ": ", name,
          " must have kernel sizes up to ", kMaxKernel, " on the CPU, got ", w.size(2), "x",
          w.size(3));
}

void check_result(const char* op, const PyramidShape& shape) {
  check_size(op, "the result",
             {std::max<int64_t>(shape.batch, 1), shape.out_channels, shape.height, shape.width});
}

}  // namespace

PyramidShape check_dense(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                         const std::vector<int64_t>& rates) {
  check_image(op, "x", x);
  check_rates(op, rates, weights.size());
  PyramidShape shape{x.size(0), x.size(1), x.size(2), x.size(3), 0};
  for (size_t b = 0; b < weights.size(); ++b) {
    const std::string name = entry("weights", b);
    check_kernel(op, name, weights[b]);
    check_like(op, name, weights[b], x);
    require(weights[b].size(1) == shape.channels, op, ": ", name, " has ", weights[b].size(1),
            " input channels but x has ", shape.channels);
    check_kernel_limit(op, name, weights[b]);
    shape.out_channels += weights[b].size(0);
  }
  check_result(op, shape);
  return shape;
}

PyramidShape check_separable(const char* op, const Tensor& x, const std::vector<Tensor>& depthwise,
                             const std::vector<Tensor>& pointwise,
                             const std::vector<int64_t>& rates) {
  check_image(op, "x", x);
  require(!pointwise.empty(), op,
          ": pointwise_weights must hold at least one branch, got an empty list");
  require(depthwise.size() == pointwise.size(), op,
          ": depthwise_weights must have one entry per branch, got ", depthwise.size(), " for ",
          pointwise.size(), " branches");
  check_rates(op, rates, pointwise.size());
  PyramidShape shape{x.size(0), x.size(1), x.size(2), x.size(3), 0};
  for (size_t b = 0; b < pointwise.size(); ++b) {
    const std::string name = entry("pointwise_weights", b);
    check_kernel(op, name, pointwise[b]);
    check_like(op, name, pointwise[b], x);
    require(pointwise[b].size(2) == 1 && pointwise[b].size(3) == 1, op, ": ", name,
            " must be [O, C, 1, 1], got shape ", shape_of(pointwise[b]));
    require(pointwise[b].size(1) == shape.channels, op, ": ", name, " has ", pointwise[b].size(1),
            " input channels but x has ", shape.channels);
    shape.out_channels += pointwise[b].size(0);
    if (depthwise[b].numel() == 0) continue;
    const std::string depth = entry("depthwise_weights", b);
    check_kernel(op, depth, depthwise[b]);
    check_like(op, depth, depthwise[b], x);
    require(depthwise[b].size(0) == shape.channels && depthwise[b].size(1) == 1, op, ": ", depth,
            " must be [", shape.channels, ", 1, kh, kw], got shape ", shape_of(depthwise[b]));
    check_kernel_limit(op, depth, depthwise[b]);
  }
  check_result(op, shape);
  return shape;
}

void check_between(const char* op, const Tensor& x, const std::vector<Tensor>& scale,
                   const std::vector<Tensor>& shift, const std::vector<Tensor>& depthwise) {
  require(scale.size() == shift.size() && (scale.empty() || scale.size() == depthwise.size()), op,
          ": between must have one entry per branch, got ", scale.size(), " for ", depthwise.size(),
          " branches");
  for (size_t b = 0; b < scale.size(); ++b) {
    if (scale[b].numel() == 0 && shift[b].numel() == 0) continue;
    const std::string name = entry("between", b);
    require(depthwise[b].numel() > 0, op, ": ", name,
            " must be None where the branch has no depthwise weight, got tensors");
    for (const Tensor* t : {&scale[b], &shift[b]}) {
      check_like(op, name, *t, x);
      require(t->dim() == 1 && t->size(0) == x.size(1), op, ": ", name,
              " must have one value per channel (", x.size(1), "), got shape ", shape_of(*t));
    }
  }
}

void check_grad(const char* op, const Tensor& grad, const Tensor& x, const PyramidShape& shape) {
  check_image(op, "grad", grad);
  check_like(op, "grad", grad, x);
  require(grad.size(0) == shape.batch && grad.size(1) == shape.out_channels &&
              grad.size(2) == shape.height && grad.size(3) == shape.width,
          op, ": grad must have the output's shape [", shape.batch, ", ", shape.out_channels, ", ",
          shape.height, ", ", shape.width, "], got ", shape_of(grad));
}

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
    const Matrix weight = operands.weight(pointwise[b]);
    branch.weight = weight.data;
    branch.weight_row = weight.row;
    branch.out_channels = pointwise[b].size(0);
  }
  return branches;
}

BranchParams dense_branch(Operands& operands, const Tensor& weight, int64_t rate_h,
                          int64_t rate_w) {
  BranchParams branch;
  const Matrix matrix = operands.weight(weight);
  branch.weight = matrix.data;
  branch.weight_tap = matrix.tap;
  branch.weight_row = matrix.row;
  branch.kernel_h = weight.size(2);
  branch.kernel_w = weight.size(3);
  branch.rate_h = rate_h;
  branch.rate_w = rate_w;
  branch.out_channels = weight.size(0);
  return branch;
}

PyramidParams params_of(const Tensor& x, const PyramidShape& shape,
                        std::vector<BranchParams>& branches) {
  PyramidParams params;
  params.x = image_of(x);
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

namespace {

// [rows, channels] in the compute type -> element (row, channel) of an image one row high.
void store(const void* rows, int64_t stride, int64_t count, int64_t channels, Image out,
           bool wide) {
  kernels().from_pixels(rows, stride, count, channels, out, wide);
}

}  // namespace

Tensor empty_as(const Tensor& like) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, sizes);
}

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
