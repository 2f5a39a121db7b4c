// SPDX-License-Identifier: BSD-3-Clause
#include <numeric>

#include "stored.h"

namespace aspp::cuda {
namespace {

const std::vector<int64_t> kPointwiseRates{1, 1};

// Blocks that a gradient of weights is cut into, and parts of the pixels at most: enough for every
// device, and few enough to be added up soon. The same everywhere, as bits depend on it.
constexpr int64_t kBlocks = 2048;
constexpr int64_t kMaxParts = 512;

}  // namespace

StoredBackward::StoredBackward(Operands& operands, const PyramidShape& shape, const Rows& x,
                               const std::vector<DepthwiseBranch>& branches, bool between_relu)
    : operands_(operands),
      shape_(shape),
      x_(x),
      branches_(branches),
      relu_(between_relu),
      pixels_(depthwise_shape(operands, shape)) {}

void StoredBackward::back(const Rows& grad, int64_t first_channel, const Tensor& pointwise,
                          const Rows& to) {
  PyramidShape padded = shape_;  // what reads these rows reads whole chunks of them
  padded.channels = pixels_.pitch;
  PyramidCall call(operands_, plan::Pass::grad_input, padded, {{1, 1, pointwise.size(0)}},
                   kPointwiseRates);
  call.set_a(grad);
  call.params.branches[0].a_channel = operands_.narrow("the channels of grad", first_channel);
  call.set_weights({pointwise});
  call.set_out(to);
  call.launch();
}

void StoredBackward::pointwise(const Rows& grad, int64_t first_channel, const Rows& operand,
                               const Tensor& to) {
  PyramidCall call(operands_, plan::Pass::grad_weight, shape_, {{1, 1, to.size(0)}},
                   kPointwiseRates);
  call.set_a(grad);
  call.params.branches[0].a_channel = operands_.narrow("the channels of grad", first_channel);
  call.set_b(operand);
  const Rows target = operands_.weight_target(to);
  call.params.branches[0].grad_weight = target.data;
  call.launch();
  operands_.deliver(target, to);
}

void StoredBackward::operand(size_t b, const Rows& to) {
  DepthwiseParams params{};
  params.shape = pixels_;
  params.x = x_.data;
  params.x_pitch = x_.pitch;
  params.out_pitch = to.pitch;
  params.relu = relu_;
  params.branches = 1;
  params.branch[0] = {branches_[b], to.data};
  check_cuda(operands_.op(), launch_depthwise_sm80(operands_.math(), params, operands_.stream()));
}

void StoredBackward::between(BetweenGradParams& params, size_t b, const Rows& back, void* grad,
                             const Rows& operand) {
  params.shape = pixels_;
  params.x = x_.data;
  params.x_pitch = x_.pitch;
  params.back = back.data;
  params.back_pitch = back.pitch;
  params.branch = branches_[b];
  params.relu = relu_;
  params.grad = grad;
  params.out = operand.data;
  params.out_pitch = operand.pitch;
  check_cuda(operands_.op(),
             launch_between_grad_sm80(operands_.math(), params, operands_.stream()));
}

void StoredBackward::between(size_t b, const Rows& back, void* grad, const Rows& operand,
                             const void* correction) {
  BetweenGradParams params{};
  params.correction = correction;
  between(params, b, back, grad, operand);
}

void StoredBackward::between(size_t b, const Rows& back, void* grad, const Rows& operand,
                             const Tensor& scale, const Tensor& shift) {
  const int64_t tiles = depthwise_tiles(pixels_), pitch = pixels_.pitch;
  BetweenGradParams params{};
  params.sums = operands_.allocate(tiles * 2 * pitch * sum_bytes());
  between(params, b, back, grad, operand);
  SumPartsParams parts{};
  parts.parts = tiles;
  parts.part_step = 2 * pitch;
  parts.kernel_h = parts.kernel_w = parts.window_h = parts.window_w = 1;
  parts.channel_step = 1;
  parts.out_is_sum = operands_.is_sum(scale);
  for (int row = 0; row < 2; ++row) {
    parts.sums = static_cast<const char*>(params.sums) + row * pitch * sum_bytes();
    parts.out = (row == 0 ? scale : shift).data_ptr();
    sum_parts(parts);
  }
}

void StoredBackward::depthwise(size_t b, const Rows& grad, const Tensor& to) {
  const DepthwiseBranch& branch = branches_[b];
  DepthwiseGradWeightParams params{};
  params.shape = pixels_;
  params.x = x_.data;
  params.x_pitch = x_.pitch;
  params.grad = grad.data;
  params.grad_pitch = grad.pitch;
  params.branch = branch;
  SumPartsParams parts{};
  parts.kernel_h = branch.kernel_h;
  parts.kernel_w = branch.kernel_w;
  parts.window_h = 2 * depthwise_reach(branch.kernel_h, branch.rate_h, pixels_.height) + 1;
  parts.window_w = 2 * depthwise_reach(branch.kernel_w, branch.rate_w, pixels_.width) + 1;
  const int64_t of_part = depthwise_groups(pixels_, branch) *
                          depthwise_column_tiles(pixels_, depthwise_columns(operands_.math()));
  const int64_t most = std::min(kMaxParts, depthwise_tiles(pixels_));
  params.parts = int32_t(std::clamp<int64_t>(kBlocks / of_part, 1, most));
  parts.parts = params.parts;
  parts.part_step = int64_t(parts.window_h) * parts.window_w * pixels_.pitch;
  check_size(operands_.op(), "a gradient's sums", {parts.parts, parts.part_step});
  parts.sums = params.sums = operands_.allocate(parts.parts * parts.part_step * sum_bytes());
  check_cuda(operands_.op(),
             launch_depthwise_grad_weight_sm80(operands_.math(), params, operands_.stream()));
  parts.out = to.data_ptr();
  parts.channel_step = branch.taps;
  sum_parts(parts);
}

void StoredBackward::sum_parts(const SumPartsParams& given) {
  SumPartsParams params = given;
  params.channels = pixels_.channels;
  params.pitch = pixels_.pitch;
  check_cuda(operands_.op(), launch_sum_parts_sm80(operands_.math(), params, operands_.stream()));
}

void StoredBackward::input(const std::vector<Rows>& grads, const Rows& to) {
  DepthwiseGradInputParams params{};
  params.shape = pixels_;
  params.grad_pitch = grads[0].pitch;
  params.out = to.data;
  params.out_pitch = to.pitch;
  params.branches = int32_t(grads.size());
  for (size_t b = 0; b < grads.size(); ++b) {
    const DepthwiseBranch& branch = branches_[b];
    params.branch[b] = {branch, grads[b].data};
    if (depthwise_reach(branch.kernel_h, branch.rate_h, pixels_.height) > 0)
      params.phase = std::gcd(params.phase, branch.rate_h);
  }
  params.phase = std::max(params.phase, 1);
  check_cuda(operands_.op(),
             launch_depthwise_grad_input_sm80(operands_.math(), params, operands_.stream()));
}

void stored_backward(Operands& operands, const PyramidShape& shape, const Rows& x,
                     const std::vector<DepthwiseBranch>& branches, bool between_relu,
                     const std::vector<Tensor>& pointwise, const Tensor& grad,
                     const SeparableGradients& to) {
  std::vector<int64_t> channels, first;  // of the branches in grads
  for (const Tensor& p : pointwise) channels.push_back(p.size(0));
  const Rows grads = operands.branch_image(grad, channels, first);
  StoredBackward steps(operands, shape, x, branches, between_relu);
  const int64_t pixels = shape.batch * shape.height * shape.width;
  // Of one branch after the other, but what the gradient of x waits for.
  Rows back, stored;
  std::vector<Rows> for_x;
  for (size_t b = 0; b < branches.size(); ++b) {
    const bool is_plain = branches[b].filter == nullptr;
    const bool has_between = branches[b].affine != nullptr;
    const bool for_depthwise = !to.depthwise.empty() && !is_plain;
    const bool for_between = !to.scale.empty() && has_between;
    const bool for_pointwise = !to.pointwise.empty();
    const bool needs_back = to.x.has_value() || for_depthwise || for_between;
    Rows operand = x;
    if (for_pointwise && !is_plain) {
      if (stored.data == nullptr) stored = operands.allocate_rows(pixels, shape.channels);
      operand = stored;
    }
    if (needs_back) {
      if (to.x.has_value() || back.data == nullptr)
        back = operands.allocate_rows(pixels, shape.channels);
      steps.back(grads, first[b], pointwise[b], back);
    }
    if (needs_back && has_between) {
      void* const of_e = to.x.has_value() || for_depthwise ? back.data : nullptr;
      const Rows for_product = for_pointwise ? operand : Rows{};
      if (for_between)
        steps.between(b, back, of_e, for_product, to.scale[b], to.shift[b]);
      else
        steps.between(b, back, of_e, for_product,
                      to.corrections.empty() ? nullptr : to.corrections[b]);
    } else if (for_pointwise && !is_plain) {
      steps.operand(b, operand);
    }
    if (for_pointwise) steps.pointwise(grads, first[b], operand, to.pointwise[b]);
    if (for_depthwise) steps.depthwise(b, back, to.depthwise[b]);
    for_x.push_back(back);
  }
  if (!to.x.has_value()) return;
  const Rows target = operands.image_target(*to.x);
  steps.input(for_x, target);
  operands.deliver(target, *to.x);
}

}  // namespace aspp::cuda
