// SPDX-License-Identifier: BSD-3-Clause
// CUDA binding of atrous_pyramid and its gradients: check, early return, guard, allocate, params,
// plan, launch.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../operator_checks.h"
#include "operands.h"
#include "prepare.h"

namespace aspp::cuda {
namespace {

using plan::Pass;

constexpr const char* kOp = "atrous_pyramid";
constexpr Limits kLimits{"on CUDA", INT64_MAX, kMaxBranches, INT32_MAX};

Math math_of(const Tensor& t, bool tf32) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Math::bfloat16;
    case ScalarType::Half: return Math::float16;
    case ScalarType::Double: return Math::float64;
    default: return tf32 ? Math::tf32 : Math::float32;
  }
}

struct Kernel {
  int64_t height, width, out_channels;
};

std::vector<Kernel> kernels_of(const std::vector<Tensor>& weights) {
  std::vector<Kernel> kernels;
  for (const Tensor& w : weights) kernels.push_back({w.size(2), w.size(3), w.size(0)});
  return kernels;
}

// One call of an operator, from the problem to the launch.
class Call {
 public:
  Operands operands;
  PyramidParams params{};

  Call(Pass pass, const Tensor& like, bool tf32, const PyramidShape& shape,
       const std::vector<Kernel>& kernels, const std::vector<int64_t>& rates)
      : operands(kOp, like, math_of(like, tf32)),
        pass_(pass),
        math_(math_of(like, tf32)) {
    prepare(shape, kernels, rates);
    params.batch = operands.narrow("the batch", shape.batch);
    params.height = operands.narrow("the height", shape.height);
    params.width = operands.narrow("the width", shape.width);
    params.in_channels = operands.narrow("the number of channels", shape.channels);
    params.weight_channels = params.grad_weight_channels =
        operands.narrow("the number of channels", operands.padded(shape.channels));
    int64_t first = 0;
    for (size_t b = 0; b < kernels.size(); ++b) {
      BranchOperand& branch = params.branches[b];
      branch.taps = operands.narrow("the taps", kernels[b].height * kernels[b].width);
      branch.out_channels = operands.narrow("the output channels", kernels[b].out_channels);
      branch.out_channel = operands.narrow("the output channels", first);
      first += kernels[b].out_channels;
      out_channels_.push_back(kernels[b].out_channels);
    }
  }

  void set_weights(const std::vector<Tensor>& weights) {
    for (size_t b = 0; b < weights.size(); ++b)
      params.branches[b].weight = operands.weight(weights[b]);
  }

  void set_a(const Rows& rows) {
    params.a = rows.data;
    params.a_pitch = pitch_of(rows);
  }

  void set_b(const Rows& rows) {
    params.b = rows.data;
    params.b_pitch = pitch_of(rows);
  }

  void set_grad(const Tensor& grad) {
    std::vector<int64_t> first;
    set_a(operands.branch_image(grad, out_channels_, first));
    for (size_t b = 0; b < first.size(); ++b)
      params.branches[b].a_channel = operands.narrow("the channels of grad", first[b]);
  }

  void set_out(const Rows& rows) {
    params.out = rows.data;
    params.out_pitch = rows.pitch;
  }

  // Of the result, per channel, into [sum O] tensors of type Sum.
  void set_statistics(const Tensor& mean, const Tensor& squares) {
    const DevicePlan& plan = *prepared_.plan;
    const TileShape tile = tile_shape(math_, prepared_.shape);
    const int64_t parts = int64_t(plan.tiles) * (tile.m / tile.warp_m);
    const int64_t bytes = parts * tile.n * (math_ == Math::float64 ? 8 : 4);
    CombineParams& combine = combine_.emplace();
    combine.tile_means = params.tile_means = operands.allocate(bytes);
    combine.tile_squares = params.tile_squares = operands.allocate(bytes);
    params.tile_counts = static_cast<int32_t*>(operands.allocate(parts * int64_t(sizeof(int32_t))));
    combine.tile_counts = params.tile_counts;
    combine.mean = mean.data_ptr();
    combine.squares = squares.data_ptr();
    combine.rows = tile.m / tile.warp_m;
    combine.tile_n = tile.n;
    combine.branches = int32_t(out_channels_.size());
    for (int32_t b = 0; b < combine.branches; ++b) {
      const BranchOperand& branch = params.branches[b];
      const TileRange tiles = plan.branch_tiles[b];
      combine.branch[b] = {tiles.first, tiles.count, branch.out_channel, branch.out_channels};
    }
  }

  void launch() {
    const DevicePlan& plan = *prepared_.plan;
    plan.describe(params);
    if (plan.counters > 0) {
      const int64_t bytes = plan.counters * int64_t(sizeof(uint32_t));
      params.partials = operands.allocate(prepared_.partial_bytes(math_));
      params.counters = static_cast<uint32_t*>(operands.allocate(bytes));
      check_cuda(kOp, cudaMemsetAsync(params.counters, 0, size_t(bytes), operands.stream()));
    }
    check_cuda(kOp, launch_pyramid_sm80(pass_, math_, prepared_.shape, params, operands.stream()));
    if (combine_) check_cuda(kOp, launch_combine_sm80(math_, *combine_, operands.stream()));
  }

 private:
  // Before any operand is copied: what cannot be planned is refused here.
  void prepare(const PyramidShape& shape, const std::vector<Kernel>& kernels,
               const std::vector<int64_t>& rates) {
    cudaError_t error = cudaSuccess;
    try {
      std::vector<plan::Branch> branches;
      for (size_t b = 0; b < kernels.size(); ++b)
        branches.push_back({{kernels[b].height, kernels[b].width},
                            {rates[2 * b], rates[2 * b + 1]},
                            kernels[b].out_channels});
      const plan::Problem problem(shape.batch, shape.height, shape.width, std::move(branches),
                                  shape.channels);
      error = prepare_pyramid(plan_cache(), pass_, math_, problem, operands.stream(), prepared_);
    } catch (const std::logic_error& refusal) {
      refuse(kOp, ": ", refusal.what());
    } catch (const std::overflow_error& refusal) {
      refuse(kOp, ": ", refusal.what());
    }
    check_cuda(kOp, error);
  }

  // The kernels multiply it in 32 bits.
  int32_t pitch_of(const Rows& rows) const {
    require(rows.pitch <= INT32_MAX / bytes_of(math_), kOp,
            ": from pixel to pixel there must be less than 2^31 bytes on CUDA, got ",
            rows.pitch * bytes_of(math_));
    return int32_t(rows.pitch);
  }

  const Pass pass_;
  const Math math_;
  Prepared prepared_;
  std::optional<CombineParams> combine_;
  std::vector<int64_t> out_channels_;
};

Tensor pyramid(const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> rates,
               std::optional<Tensor> scale, std::optional<Tensor> shift, bool relu, bool tf32) {
  const PyramidShape shape = check_dense(kOp, x, weights, rates, kLimits);
  check_vector(kOp, "scale", scale, x, shape.out_channels);
  check_vector(kOp, "shift", shift, x, shape.out_channels, true);
  const bool channels_last = is_channels_last(x) || any_channels_last(weights);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Call call(Pass::forward, x, tf32, shape, kernels_of(weights), rates);
  call.set_a(call.operands.image(x));
  call.set_weights(weights);
  if (scale.has_value()) call.params.scale = call.operands.vector(*scale);
  if (shift.has_value()) {
    call.params.shift = call.operands.vector(*shift);
    call.params.shift_pitch = shift->dim() == 2 ? shape.out_channels : 0;
  }
  call.params.relu = relu;
  const Rows target = call.operands.image_target(out);
  call.set_out(target);
  call.launch();
  call.operands.deliver(target, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> statistics(const Tensor& x, std::vector<Tensor> weights,
                                              std::vector<int64_t> rates, bool tf32) {
  const PyramidShape shape = check_dense(kOp, x, weights, rates, kLimits);
  require(shape.batch > 0, kOp, ": statistics need at least one sample, got a batch of 0");
  const bool channels_last = is_channels_last(x) || any_channels_last(weights);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t size[] = {shape.out_channels};
  const auto per_channel = [&] {
    return with_memory([&] { return torch::stable::new_empty(x, {size, 1}, type); });
  };
  const Tensor mean = per_channel(), squares = per_channel();

  Call call(Pass::forward, x, tf32, shape, kernels_of(weights), rates);
  call.set_a(call.operands.image(x));
  call.set_weights(weights);
  const Rows target = call.operands.image_target(out);
  call.set_out(target);
  call.set_statistics(mean, squares);
  call.launch();
  call.operands.deliver(target, out);
  return {out, mean, squares};
}

Tensor grad_input(const Tensor& grad, std::vector<Tensor> weights, std::vector<int64_t> rates,
                  bool tf32) {
  const PyramidShape shape = check_dense_grad_input(grad, weights, rates, kLimits);
  const bool channels_last = is_channels_last(grad) || any_channels_last(weights);
  const Tensor out = empty_image(grad, shape.batch, shape.channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Call call(Pass::grad_input, grad, tf32, shape, kernels_of(weights), rates);
  call.set_grad(grad);
  call.set_weights(weights);
  const Rows target = call.operands.image_target(out);
  call.set_out(target);
  call.launch();
  call.operands.deliver(target, out);
  return out;
}

std::vector<Tensor> grad_weight(const Tensor& grad, const Tensor& x, std::vector<int64_t> kernels,
                                std::vector<int64_t> out_channels, std::vector<int64_t> rates,
                                bool tf32) {
  const PyramidShape shape =
      check_dense_grad_weight(grad, x, kernels, out_channels, rates, kLimits);
  std::vector<Kernel> each;
  std::vector<Tensor> results;
  for (size_t b = 0; b < out_channels.size(); ++b) {
    each.push_back({kernels[2 * b], kernels[2 * b + 1], out_channels[b]});
    results.push_back(empty_of(x, {out_channels[b], x.size(1), each[b].height, each[b].width}));
    if (shape.batch == 0) torch::stable::zero_(results[b]);
  }
  if (shape.batch == 0) return results;

  Call call(Pass::grad_weight, x, tf32, shape, each, rates);
  call.set_grad(grad);
  call.set_b(call.operands.image(x));
  std::vector<Rows> targets;
  for (size_t b = 0; b < results.size(); ++b) {
    targets.push_back(call.operands.weight_target(results[b]));
    call.params.branches[b].grad_weight = targets[b].data;
  }
  call.launch();
  for (size_t b = 0; b < results.size(); ++b) call.operands.deliver(targets[b], results[b]);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, ASPP_DEVICE_KEY, m) {
  m.impl("atrous_pyramid", TORCH_BOX(&pyramid));
  m.impl("atrous_pyramid_statistics", TORCH_BOX(&statistics));
  m.impl("atrous_pyramid_grad_input", TORCH_BOX(&grad_input));
  m.impl("atrous_pyramid_grad_weight", TORCH_BOX(&grad_weight));
}

}  // namespace aspp::cuda
