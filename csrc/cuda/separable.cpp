// SPDX-License-Identifier: BSD-3-Clause
// CUDA binding of atrous_separable_pyramid and its backward: check, early return, guard, allocate,
// operands, launches.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../operator_checks.h"
#include "fused.h"

namespace aspp::cuda {
namespace {

constexpr const char* kOp = "atrous_separable_pyramid";

std::vector<int64_t> out_channels_of(const std::vector<Tensor>& pointwise) {
  std::vector<int64_t> channels;
  for (const Tensor& p : pointwise) channels.push_back(p.size(0));
  return channels;
}

Tensor separable_pyramid(const Tensor& x, std::vector<Tensor> depthwise,
                         std::vector<Tensor> pointwise, std::vector<int64_t> rates,
                         std::vector<Tensor> between_scale, std::vector<Tensor> between_shift,
                         bool between_relu, std::optional<Tensor> scale,
                         std::optional<Tensor> shift, bool relu, bool tf32) {
  SeparableProblem problem;
  problem.shape = check_separable(kOp, x, depthwise, pointwise, rates, kCudaLimits);
  const PyramidShape& shape = problem.shape;
  check_between(kOp, x, between_scale, between_shift, depthwise);
  check_vector(kOp, "scale", scale, x, shape.out_channels);
  check_vector(kOp, "shift", shift, x, shape.out_channels, true);
  const bool channels_last = is_channels_last(x) || any_channels_last(pointwise);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Operands operands(kOp, x, math_of(x, tf32));
  problem.branches =
      depthwise_branches(operands, shape.channels, depthwise, rates, between_scale, between_shift);
  problem.x = operands.image(x);
  for (const Tensor& p : pointwise) problem.pointwise.push_back(operands.weight(p));
  problem.out_channels = out_channels_of(pointwise);
  problem.between_relu = between_relu;
  if (scale.has_value()) problem.scale = operands.vector(*scale);
  if (shift.has_value()) problem.shift = operands.vector(*shift);
  problem.shift_per_sample = shift.has_value() && shift->dim() == 2;
  problem.relu = relu;
  const Rows target = operands.image_target(out);
  if (!fused_forward(operands, problem, target)) stored_forward(operands, problem, target);
  operands.deliver(target, out);
  return out;
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                             std::vector<Tensor>>;

Gradients separable_backward(const Tensor& grad, const Tensor& x, std::vector<Tensor> depthwise,
                             std::vector<Tensor> pointwise, std::vector<int64_t> rates,
                             std::vector<Tensor> between_scale, std::vector<Tensor> between_shift,
                             bool between_relu, bool need_x, bool need_depthwise,
                             bool need_pointwise, bool need_between, bool tf32) {
  const PyramidShape shape = check_separable(kOp, x, depthwise, pointwise, rates, kCudaLimits);
  check_between(kOp, x, between_scale, between_shift, depthwise);
  check_grad(kOp, grad, x, shape);

  const auto make_results = [&](bool zero) -> Gradients {
    const int64_t empty[] = {0};
    return {need_x ? empty_image(x, shape.batch, shape.channels, shape, is_channels_last(x))
                   : torch::stable::new_empty(x, {empty, 1}),
            empty_each(depthwise, need_depthwise, zero),
            empty_each(pointwise, need_pointwise, zero),
            empty_each(between_scale, need_between, zero),
            empty_each(between_shift, need_between, zero)};
  };
  if (shape.batch == 0) return make_results(true);

  Operands operands(kOp, x, math_of(x, tf32));
  const std::vector<DepthwiseBranch> branches =
      depthwise_branches(operands, shape.channels, depthwise, rates, between_scale, between_shift);
  Gradients result = make_results(false);
  auto& [of_x, of_depthwise, of_pointwise, of_scale, of_shift] = result;
  SeparableGradients to{std::nullopt, of_depthwise, of_pointwise, of_scale, of_shift};
  if (need_x) to.x = of_x;
  stored_backward(operands, shape, operands.image(x), branches, between_relu, pointwise, grad, to);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, ASPP_DEVICE_KEY, m) {
  m.impl("atrous_separable_pyramid", ASPP_BOX(&separable_pyramid));
  m.impl("atrous_separable_pyramid_backward", ASPP_BOX(&separable_backward));
}

}  // namespace aspp::cuda
