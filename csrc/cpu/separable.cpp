// SPDX-License-Identifier: BSD-3-Clause
// CPU binding of atrous_separable_pyramid and its backward.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "branches.h"
#include "forward.h"
#include "parallel.h"

namespace aspp {
namespace {

constexpr const char* kOp = "atrous_separable_pyramid";

void add_between(Operands& operands, std::vector<BranchParams>& branches,
                 const std::vector<Tensor>& scale, const std::vector<Tensor>& shift, bool relu) {
  for (size_t b = 0; b < scale.size(); ++b) {
    if (scale[b].numel() == 0) continue;
    branches[b].between_scale = operands.vector(scale[b]);
    branches[b].between_shift = operands.vector(shift[b]);
    branches[b].between_relu = relu;
  }
}

Tensor separable_pyramid(Tensor x, std::vector<Tensor> depthwise, std::vector<Tensor> pointwise,
                         std::vector<int64_t> rates, std::vector<Tensor> between_scale,
                         std::vector<Tensor> between_shift, bool between_relu,
                         std::optional<Tensor> scale, std::optional<Tensor> shift, bool relu,
                         bool /*tf32*/) {
  PyramidShape shape = check_separable(kOp, x, depthwise, pointwise, rates, kCpuLimits);
  check_between(kOp, x, between_scale, between_shift, depthwise);
  check_vector(kOp, "scale", scale, x, shape.out_channels);
  check_vector(kOp, "shift", shift, x, shape.out_channels, true);
  const bool channels_last = is_channels_last(x) || any_channels_last(pointwise);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Image written = image_of(out);
  if (is_narrow(shape)) {
    depthwise = turned(depthwise, shape, rates);
    std::tie(x, shape, rates, written) =
        std::tuple{turned(x), turned(shape), turned(rates), image_of(turned(out))};
  }
  Operands operands(x);
  std::vector<BranchParams> branches = separable_branches(operands, depthwise, pointwise, rates);
  add_between(operands, branches, between_scale, between_shift, between_relu);
  PyramidParams params = params_of(image_of(x), shape, branches);
  set_epilogue(params, operands, branches, scale, shift, relu);
  params.out = written;
  run_forward(params, schedule_of(branches, shape.batch, shape.height, shape.width),
              operands.double_precision());
  return out;
}

using Gradients = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                             std::vector<Tensor>>;

// Rows of gradient in the compute type and the tensor they are returned as.
class Accumulated {
 public:
  Accumulated(Operands& operands, bool needed, size_t count) : operands_(operands) {
    if (needed) rows_.resize(count, nullptr);
  }
  void add(size_t index, int64_t count) {
    if (!rows_.empty()) rows_[index] = operands_.allocate(count);
  }
  void* const* data() const { return rows_.empty() ? nullptr : rows_.data(); }
  void* row(size_t index) const { return rows_[index]; }
  bool needed() const { return !rows_.empty(); }

 private:
  Operands& operands_;
  std::vector<void*> rows_;
};

Gradients separable_backward(Tensor grad, Tensor x, std::vector<Tensor> depthwise,
                             std::vector<Tensor> pointwise, std::vector<int64_t> rates,
                             std::vector<Tensor> between_scale, std::vector<Tensor> between_shift,
                             bool between_relu, bool need_x, bool need_depthwise,
                             bool need_pointwise, bool need_between, bool /*tf32*/) {
  PyramidShape shape = check_separable(kOp, x, depthwise, pointwise, rates, kCpuLimits);
  check_between(kOp, x, between_scale, between_shift, depthwise);
  check_grad(kOp, grad, x, shape);
  need_between = need_between && !between_scale.empty();
  const size_t count = depthwise.size();

  const int64_t empty[] = {0};
  const Tensor grad_x =
      need_x ? empty_image(x, shape.batch, shape.channels, shape, is_channels_last(x))
             : torch::stable::new_empty(x, {empty, 1});
  Image written;
  if (need_x) written = image_of(grad_x);
  // Of two columns the planes of this pass are read along rows in less time.
  const bool narrow = is_narrow(shape) && shape.width == 1;
  if (narrow) {
    for (Tensor& weight : depthwise) weight = is_none(weight) ? weight : turned(weight);
    if (need_x) written = image_of(turned(grad_x));
    std::tie(grad, x, shape, rates) =
        std::tuple{turned(grad), turned(x), turned(shape), turned(rates)};
  }

  Operands operands(x);
  std::vector<BranchParams> branches = separable_branches(operands, depthwise, {}, rates);
  for (size_t b = 0; b < count; ++b) branches[b].out_channels = pointwise[b].size(0);
  add_between(operands, branches, between_scale, between_shift, between_relu);
  const int64_t columns = assign_columns(branches);
  const int64_t pixels = shape.height * shape.width, channels = padded(shape.channels);

  SeparableBackwardParams p;
  p.x = image_of(x);
  p.batch = shape.batch;
  p.channels = shape.channels;
  p.height = shape.height;
  p.width = shape.width;
  p.branches = branches.data();
  p.branch_count = int64_t(count);

  p.grad_x = written;

  std::vector<Image> pointwise_images;
  Accumulated for_depthwise(operands, need_depthwise, count);
  Accumulated for_pointwise(operands, need_pointwise, count);
  Accumulated for_scale(operands, need_between, count), for_shift(operands, need_between, count);
  for (size_t b = 0; b < count; ++b) {
    pointwise_images.push_back(image_of(pointwise[b]));
    for_pointwise.add(b, shape.channels * padded(pointwise[b].size(0)));
    if (branches[b].depthwise != nullptr) {
      for_depthwise.add(b, branches[b].kernel_h * branches[b].kernel_w * channels);
    }
    if (branches[b].between_scale != nullptr) {
      for_scale.add(b, channels);
      for_shift.add(b, channels);
    }
  }
  p.pointwise = pointwise_images.data();
  p.grad_depthwise = for_depthwise.data();
  p.grad_pointwise = for_pointwise.data();
  p.grad_between_scale = for_scale.data();
  p.grad_between_shift = for_shift.data();

  // A row of kPad extra columns keeps the stride off powers of two, which would alias in cache.
  p.grad_stride = columns + kPad;
  void* rows = operands.allocate(shape.batch * pixels * p.grad_stride);
  const Kernels& k = kernels();
  const bool wide = operands.double_precision();
  run_tasks(shape.batch * shape.height, 0, [&](int64_t task, void*) {
    const int64_t n = task / shape.height, y = task % shape.height;
    int64_t channel = 0;
    for (const BranchParams& branch : branches) {
      Image source = image_of(grad);
      source.data = static_cast<char*>(source.data) +
                    channel * source.c_stride * int64_t(grad.element_size());
      const int64_t at = (n * pixels + y * shape.width) * p.grad_stride + branch.column;
      k.to_pixels(source, n, branch.out_channels, shape.width, y, y + 1, operands.offset(rows, at),
                  operands.compute_dtype(), p.grad_stride);
      channel += branch.out_channels;
    }
  });
  p.grad = rows;

  const int64_t blocks = (shape.channels + k.backward_channels - 1) / k.backward_channels;
  run_tasks(blocks, k.backward_scratch(p, wide), [&](int64_t task, void* scratch) {
    k.backward_block(p, task * k.backward_channels, scratch, wide);
  });

  Gradients result{grad_x, {}, {}, {}, {}};
  for (size_t b = 0; b < count; ++b) {
    if (for_depthwise.needed()) {
      Tensor one = branches[b].depthwise != nullptr
                       ? depthwise_gradient(depthwise[b], for_depthwise.row(b), wide)
                       : empty_as(depthwise[b]);
      if (narrow && branches[b].depthwise != nullptr) {
        one = with_memory(one, [&] { return torch::stable::contiguous(turned(one)); });
      }
      std::get<1>(result).push_back(one);
    }
    if (for_pointwise.needed()) {
      std::get<2>(result).push_back(pointwise_gradient(pointwise[b], for_pointwise.row(b), wide));
    }
    if (need_between) {
      const bool here = branches[b].between_scale != nullptr;
      for (auto [list, source] : {std::pair{&std::get<3>(result), &for_scale},
                                  std::pair{&std::get<4>(result), &for_shift}}) {
        list->push_back(here ? vector_gradient(between_scale[b], source->row(b), wide)
                             : empty_as(between_scale[b]));
      }
    }
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CPU, m) {
  m.impl("atrous_separable_pyramid", ASPP_BOX(&separable_pyramid));
  m.impl("atrous_separable_pyramid_backward", ASPP_BOX(&separable_backward));
}

}  // namespace aspp
