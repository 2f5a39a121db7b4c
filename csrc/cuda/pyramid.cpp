// SPDX-License-Identifier: BSD-3-Clause
// CUDA binding of atrous_pyramid and its gradients: check, early return, guard, allocate, params,
// plan, launch.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../operator_checks.h"
#include "pyramid_call.h"

namespace aspp::cuda {
namespace {

using plan::Pass;

constexpr const char* kOp = "atrous_pyramid";

Tensor pyramid(const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> rates,
               std::optional<Tensor> scale, std::optional<Tensor> shift, bool relu, bool tf32,
               int64_t polyphase) {
  const PyramidShape shape = check_dense(kOp, x, weights, rates, kCudaLimits);
  check_vector(kOp, "scale", scale, x, shape.out_channels);
  check_vector(kOp, "shift", shift, x, shape.out_channels, true);
  check_polyphase(kOp, polyphase);
  const bool channels_last = is_channels_last(x) || any_channels_last(weights);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Operands operands(kOp, x, math_of(x, tf32));
  PyramidCall call(operands, Pass::forward, shape, kernels_of(weights), rates);
  call.set_a(operands.image(x));
  call.set_weights(weights);
  call.set_epilogue(scale.has_value() ? operands.vector(*scale) : nullptr,
                    shift.has_value() ? operands.vector(*shift) : nullptr,
                    shift.has_value() && shift->dim() == 2, relu, shape.out_channels);
  const Rows target = operands.image_target(out);
  call.set_out(target);
  call.launch();
  operands.deliver(target, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& x, std::vector<Tensor> weights,
                                              std::vector<int64_t> rates, bool tf32) {
  const PyramidShape shape = check_dense(kOp, x, weights, rates, kCudaLimits);
  require(shape.batch > 0, kOp, ": statistics need at least one sample, got a batch of 0");
  const bool channels_last = is_channels_last(x) || any_channels_last(weights);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t size[] = {shape.out_channels};
  const auto per_channel = [&] {
    return with_memory(x, [&] { return torch::stable::new_empty(x, {size, 1}, type); });
  };
  const Tensor mean = per_channel(), squares = per_channel();

  Operands operands(kOp, x, math_of(x, tf32));
  PyramidCall call(operands, Pass::forward, shape, kernels_of(weights), rates);
  call.set_a(operands.image(x));
  call.set_weights(weights);
  const Rows target = operands.image_target(out);
  call.set_out(target);
  call.set_statistics(mean, squares);
  call.launch();
  operands.deliver(target, out);
  return {out, mean, squares};
}

Tensor grad_input(const Tensor& grad, std::vector<Tensor> weights, std::vector<int64_t> rates,
                  bool tf32, int64_t polyphase) {
  const PyramidShape shape = check_dense_grad_input(grad, weights, rates, kCudaLimits);
  check_polyphase(kOp, polyphase);
  const bool channels_last = is_channels_last(grad) || any_channels_last(weights);
  const Tensor out = empty_image(grad, shape.batch, shape.channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Operands operands(kOp, grad, math_of(grad, tf32));
  PyramidCall call(operands, Pass::grad_input, shape, kernels_of(weights), rates);
  call.set_grad(grad);
  call.set_weights(weights);
  const Rows target = operands.image_target(out);
  call.set_out(target);
  call.launch();
  operands.deliver(target, out);
  return out;
}

std::vector<Tensor> grad_weight(const Tensor& grad, const Tensor& x, std::vector<int64_t> kernels,
                                std::vector<int64_t> out_channels, std::vector<int64_t> rates,
                                bool tf32, int64_t polyphase) {
  const PyramidShape shape =
      check_dense_grad_weight(grad, x, kernels, out_channels, rates, kCudaLimits);
  check_polyphase(kOp, polyphase);
  std::vector<Kernel> each;
  std::vector<Tensor> results;
  for (size_t b = 0; b < out_channels.size(); ++b) {
    each.push_back({kernels[2 * b], kernels[2 * b + 1], out_channels[b]});
    results.push_back(empty_of(x, {out_channels[b], x.size(1), each[b].height, each[b].width}));
    if (shape.batch == 0) torch::stable::zero_(results[b]);
  }
  if (shape.batch == 0) return results;

  Operands operands(kOp, x, math_of(x, tf32));
  PyramidCall call(operands, Pass::grad_weight, shape, each, rates);
  call.set_grad(grad);
  call.set_b(operands.image(x));
  std::vector<Rows> targets;
  for (size_t b = 0; b < results.size(); ++b) {
    targets.push_back(operands.weight_target(results[b]));
    call.params.branches[b].grad_weight = targets[b].data;
  }
  call.launch();
  for (size_t b = 0; b < results.size(); ++b) operands.deliver(targets[b], results[b]);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, ASPP_DEVICE_KEY, m) {
  m.impl("atrous_pyramid", ASPP_BOX(&pyramid));
  m.impl("atrous_pyramid_statistics", ASPP_BOX(&statistics));
  m.impl("atrous_pyramid_grad_input", ASPP_BOX(&grad_input));
  m.impl("atrous_pyramid_grad_weight", ASPP_BOX(&grad_weight));
}

}  // namespace aspp::cuda
