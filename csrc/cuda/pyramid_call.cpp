// SPDX-License-Identifier: BSD-3-Clause
#include "pyramid_call.h"

namespace aspp::cuda {
namespace {

constexpr size_t kPlans = 1024;

// What PyTorch keeps of freed memory may be all that the device has. PyTorch lets go of it before
// it gives an allocation up, and by the stable ABI in no other way: so one is asked for that no
// device has room for, of less than the exabyte that is refused out of hand.
void release_cached_memory(int device) {
  const int64_t size[] = {int64_t(1) << 59};
  try {
    torch::stable::empty(
        {size, 1}, ScalarType::Byte, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::ASPP_DEVICE_KEY, device));
  } catch (const std::runtime_error&) {
  }
}

// Made with the library: a child forked while a static of a function is made would wait for ever.
PlanCache& the_plan_cache = *new PlanCache(kPlans, release_cached_memory);

}  // namespace

PlanCache& plan_cache() { return the_plan_cache; }

Math math_of(const Tensor& t, bool tf32) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Math::bfloat16;
    case ScalarType::Half: return Math::float16;
    case ScalarType::Double: return Math::float64;
    default: return tf32 ? Math::tf32 : Math::float32;
  }
}

std::vector<Kernel> kernels_of(const std::vector<Tensor>& weights) {
  std::vector<Kernel> kernels;
  for (const Tensor& w : weights) kernels.push_back({w.size(2), w.size(3), w.size(0)});
  return kernels;
}

void set_sizes(const Operands& operands, const PyramidShape& shape, WorkParams& params) {
  params.batch = operands.narrow("the batch", shape.batch);
  params.height = operands.narrow("the height", shape.height);
  params.width = operands.narrow("the width", shape.width);
  params.in_channels = operands.narrow("the number of channels", shape.channels);
  params.weight_channels =
      operands.narrow("the number of channels", operands.padded(shape.channels));
}

void set_plan(Operands& operands, const Prepared& prepared, WorkParams& params) {
  const DevicePlan& plan = *prepared.plan;
  plan.describe(params);
  if (plan.counters == 0) return;
  const int64_t bytes = plan.counters * int64_t(sizeof(uint32_t));
  params.partials = operands.allocate(prepared.partial_bytes(operands.math()));
  params.counters = static_cast<uint32_t*>(operands.allocate(bytes));
  check_cuda(operands.op(), cudaMemsetAsync(params.counters, 0, size_t(bytes), operands.stream()));
}

PyramidCall::PyramidCall(Operands& operands, plan::Pass pass, const PyramidShape& shape,
                         const std::vector<Kernel>& kernels, const std::vector<int64_t>& rates)
    : operands_(operands),
      pass_(pass),
      math_(operands.math()) {
  prepare(shape, kernels, rates);
  set_sizes(operands, shape, params);
  params.grad_weight_channels = params.weight_channels;
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

void PyramidCall::set_weights(const std::vector<Tensor>& weights) {
  for (size_t b = 0; b < weights.size(); ++b)
    params.branches[b].weight = operands_.weight(weights[b]);
}

void PyramidCall::set_a(const Rows& rows) {
  params.a = rows.data;
  params.a_pitch = operands_.narrow_pitch(rows);
  for (size_t b = 0; b < out_channels_.size(); ++b) set_a(b, rows);
}

void PyramidCall::set_a(size_t branch, const Rows& rows) {
  params.branches[branch].a = rows.data;
  params.branches[branch].a_pitch = operands_.narrow_pitch(rows);
}

void PyramidCall::set_b(const Rows& rows) {
  params.b = rows.data;
  params.b_pitch = operands_.narrow_pitch(rows);
}

void PyramidCall::set_grad(const Tensor& grad) {
  std::vector<int64_t> first;
  set_a(operands_.branch_image(grad, out_channels_, first));
  for (size_t b = 0; b < first.size(); ++b)
    params.branches[b].a_channel = operands_.narrow("the channels of grad", first[b]);
}

void PyramidCall::set_out(const Rows& rows) {
  params.out = rows.data;
  params.out_pitch = rows.pitch;
}

void PyramidCall::set_epilogue(const void* scale, const void* shift, bool shift_per_sample,
                               bool relu, int64_t channels) {
  params.scale = scale;
  params.shift = shift;
  params.shift_pitch = shift_per_sample ? channels : 0;
  params.relu = relu;
}

void PyramidCall::set_statistics(const Tensor& mean, const Tensor& squares) {
  const DevicePlan& plan = *prepared_.plan;
  const TileShape tile = tile_shape(math_, prepared_.shape);
  const int64_t parts = int64_t(plan.tiles) * (tile.m / tile.warp_m);
  const int64_t bytes = parts * tile.n * (math_ == Math::float64 ? 8 : 4);
  CombineParams& combine = combine_.emplace();
  combine.tile_means = params.tile_means = operands_.allocate(bytes);
  combine.tile_squares = params.tile_squares = operands_.allocate(bytes);
  params.tile_counts = static_cast<int32_t*>(operands_.allocate(parts * int64_t(sizeof(int32_t))));
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

void PyramidCall::launch() {
  const char* const op = operands_.op();
  set_plan(operands_, prepared_, params);
  check_cuda(op, launch_pyramid_sm80(pass_, math_, prepared_.shape, params, operands_.stream()));
  if (combine_) check_cuda(op, launch_combine_sm80(math_, *combine_, operands_.stream()));
}

void PyramidCall::prepare(const PyramidShape& shape, const std::vector<Kernel>& kernels,
                          const std::vector<int64_t>& rates) {
  prepare_or_refuse(operands_, [&] {
    std::vector<plan::Branch> branches;
    for (size_t b = 0; b < kernels.size(); ++b)
      branches.push_back({{kernels[b].height, kernels[b].width},
                          {rates[2 * b], rates[2 * b + 1]},
                          kernels[b].out_channels});
    const plan::Problem problem(shape.batch, shape.height, shape.width, std::move(branches),
                                shape.channels);
    return prepare_pyramid(plan_cache(), pass_, math_, problem, operands_.stream(), prepared_);
  });
}

}  // namespace aspp::cuda
