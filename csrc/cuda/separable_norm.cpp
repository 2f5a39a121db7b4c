// SPDX-License-Identifier: BSD-3-Clause
// CUDA bindings of the steps of a training batch norm between the separable pyramid's convolutions:
// statistics, forward, sums of the gradient, gradient. Between them the vectors of channels are
// worked out in PyTorch (aspp_ext/ops/separable_norm.py).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../operator_checks.h"
#include "fused.h"

namespace aspp::cuda {
namespace {

constexpr const char* kOp = "atrous_separable_pyramid_batch_norm";

Tensor part(Tensor t, int64_t dim, int64_t first, int64_t count) {
  return torch::stable::narrow(t, dim, first, count);
}

// A vector [branches * C] as one [C] per branch; empty where a branch is plain.
std::vector<Tensor> of_branches(const Tensor& vector, const std::vector<Tensor>& depthwise,
                                int64_t channels) {
  std::vector<Tensor> each;
  for (size_t b = 0; b < depthwise.size(); ++b)
    each.push_back(
        part(vector, 0, int64_t(b) * channels, depthwise[b].numel() == 0 ? 0 : channels));
  return each;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> statistics(const Tensor& x,
                                                           std::vector<Tensor> depthwise,
                                                           std::vector<int64_t> rates, bool store) {
  const PyramidShape shape = check_depthwise(kOp, x, depthwise, rates, kCudaLimits);
  Operands operands(kOp, x, math_of(x, false));
  const std::vector<DepthwiseBranch> branches =
      depthwise_branches(operands, shape.channels, depthwise, rates, {}, {});
  const int64_t pitch = operands.padded(shape.channels);
  std::vector<Tensor> stored;
  std::vector<Rows> rows;
  for (size_t b = 0; store && b < depthwise.size(); ++b) {
    if (branches[b].filter == nullptr) continue;
    stored.push_back(empty_image(x, shape.batch, pitch, shape, true));
    rows.push_back({stored.back().data_ptr(), pitch});
  }
  const auto [mean, squares] =
      depthwise_statistics(operands, x, shape, operands.image(x), branches, rows);
  for (Tensor& t : stored) {
    if (pitch == shape.channels) break;
    t = with_memory(t, [&] {
      return torch::stable::contiguous(part(t, 1, 0, shape.channels),
                                       torch::headeronly::MemoryFormat::ChannelsLast);
    });
  }
  return {mean, squares, stored};
}

// What is stored is read by one tap whose weight is 1, in place of the depthwise convolution.
void read_stored(Operands& operands, const Tensor& x, const std::vector<Tensor>& stored,
                 std::vector<Tensor>& depthwise, std::vector<int64_t>& rates,
                 SeparableProblem& problem) {
  const Tensor one = empty_of(x, {x.size(1), 1, 1, 1});
  torch::stable::fill_(one, 1);
  for (Tensor& weight : depthwise)
    if (weight.numel() > 0) weight = one;
  std::fill(rates.begin(), rates.end(), 1);
  for (const Tensor& t : stored) problem.sources.push_back(operands.image(t));
}

Tensor forward(const Tensor& x, std::vector<Tensor> depthwise, std::vector<Tensor> pointwise,
               std::vector<int64_t> rates, const Tensor& scale, const Tensor& shift, bool relu,
               std::vector<Tensor> stored, bool tf32) {
  SeparableProblem problem;
  problem.shape = check_separable(kOp, x, depthwise, pointwise, rates, kCudaLimits);
  const PyramidShape& shape = problem.shape;
  check_channel_vector(kOp, "scale", scale, x, depthwise.size());
  check_channel_vector(kOp, "shift", shift, x, depthwise.size());
  check_stored(kOp, stored, x, depthwise);
  const bool channels_last = is_channels_last(x) || any_channels_last(pointwise);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Operands operands(kOp, x, math_of(x, tf32));
  if (!stored.empty()) read_stored(operands, x, stored, depthwise, rates, problem);
  problem.branches = depthwise_branches(operands, shape.channels, depthwise, rates,
                                        of_branches(scale, depthwise, shape.channels),
                                        of_branches(shift, depthwise, shape.channels));
  problem.x = operands.image(x);
  for (const Tensor& p : pointwise) {
    problem.pointwise.push_back(operands.weight(p));
    problem.out_channels.push_back(p.size(0));
  }
  problem.between_relu = relu;
  const Rows target = operands.image_target(out);
  if (!stored.empty() || !fused_forward(operands, problem, target))
    stored_forward(operands, problem, target);
  operands.deliver(target, out);
  return out;
}

// The checks that both steps of the gradient make.
PyramidShape check_gradient(const Tensor& grad, const Tensor& x,
                            const std::vector<Tensor>& depthwise,
                            const std::vector<Tensor>& pointwise, const std::vector<int64_t>& rates,
                            const Tensor& scale, const Tensor& shift) {
  const PyramidShape shape = check_separable(kOp, x, depthwise, pointwise, rates, kCudaLimits);
  check_channel_vector(kOp, "scale", scale, x, depthwise.size());
  check_channel_vector(kOp, "shift", shift, x, depthwise.size());
  check_grad(kOp, grad, x, shape);
  return shape;
}

std::tuple<Tensor, Tensor> sums(const Tensor& grad, const Tensor& x, std::vector<Tensor> depthwise,
                                std::vector<Tensor> pointwise, std::vector<int64_t> rates,
                                const Tensor& scale, const Tensor& shift, bool relu, bool tf32) {
  const PyramidShape shape = check_gradient(grad, x, depthwise, pointwise, rates, scale, shift);
  std::vector<Tensor> of_scale_and_shift = empty_each({scale, shift}, true, true);
  const Tensor &of_scale = of_scale_and_shift[0], &of_shift = of_scale_and_shift[1];
  if (shape.batch == 0) return {of_scale, of_shift};

  Operands operands(kOp, x, math_of(x, tf32));
  const std::vector<DepthwiseBranch> branches = depthwise_branches(
      operands, shape.channels, depthwise, rates, of_branches(scale, depthwise, shape.channels),
      of_branches(shift, depthwise, shape.channels));
  const SeparableGradients to{.x = std::nullopt,
                              .depthwise = {},
                              .pointwise = {},
                              .scale = of_branches(of_scale, depthwise, shape.channels),
                              .shift = of_branches(of_shift, depthwise, shape.channels)};
  stored_backward(operands, shape, operands.image(x), branches, relu, pointwise, grad, to);
  return {of_scale, of_shift};
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;

Gradients backward(const Tensor& grad, const Tensor& x, std::vector<Tensor> depthwise,
                   std::vector<Tensor> pointwise, std::vector<int64_t> rates, const Tensor& scale,
                   const Tensor& shift, bool relu, const Tensor& a, const Tensor& b, bool need_x,
                   bool need_depthwise, bool need_pointwise, bool tf32) {
  const PyramidShape shape = check_gradient(grad, x, depthwise, pointwise, rates, scale, shift);
  check_channel_vector(kOp, "a", a, x, depthwise.size());
  check_channel_vector(kOp, "b", b, x, depthwise.size());
  const bool empty = shape.batch == 0;
  const int64_t none[] = {0};
  const Gradients result{
      need_x ? empty_image(x, shape.batch, shape.channels, shape, is_channels_last(x))
             : torch::stable::new_empty(x, {none, 1}),
      empty_each(depthwise, need_depthwise, empty), empty_each(pointwise, need_pointwise, empty)};
  if (empty) return result;

  Operands operands(kOp, x, math_of(x, tf32));
  const auto each = [&](const Tensor& v) { return of_branches(v, depthwise, shape.channels); };
  const std::vector<DepthwiseBranch> branches =
      depthwise_branches(operands, shape.channels, depthwise, rates, each(scale), each(shift));
  SeparableGradients to{.x = std::nullopt,
                        .depthwise = std::get<1>(result),
                        .pointwise = std::get<2>(result),
                        .scale = {},
                        .shift = {},
                        .corrections = pack_pairs(operands, shape.channels, each(a), each(b))};
  if (need_x) to.x = std::get<0>(result);
  stored_backward(operands, shape, operands.image(x), branches, relu, pointwise, grad, to);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, ASPP_DEVICE_KEY, m) {
  m.impl("atrous_depthwise_statistics", ASPP_BOX(&statistics));
  m.impl("atrous_separable_norm", ASPP_BOX(&forward));
  m.impl("atrous_separable_norm_sums", ASPP_BOX(&sums));
  m.impl("atrous_separable_norm_backward", ASPP_BOX(&backward));
}

}  // namespace aspp::cuda
