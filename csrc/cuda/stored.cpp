// SPDX-License-Identifier: BSD-3-Clause
#include "stored.h"

namespace aspp::cuda {
namespace {

Rows skip(const Rows& rows, int64_t pixels, int64_t bytes) {
  return {static_cast<char*>(rows.data) + pixels * rows.pitch * bytes, rows.pitch};
}

const void* skip_samples(const SeparableProblem& problem, int64_t samples, int64_t bytes) {
  if (problem.shift == nullptr || !problem.shift_per_sample) return problem.shift;
  return static_cast<const char*>(problem.shift) + samples * problem.shape.out_channels * bytes;
}

void launch(const Operands& operands, const DepthwiseParams& params) {
  check_cuda(operands.op(), launch_depthwise_sm80(operands.math(), params, operands.stream()));
}

}  // namespace

void stored_forward(Operands& operands, const SeparableProblem& problem, const Rows& out) {
  const PyramidShape& shape = problem.shape;
  const int64_t plane = shape.height * shape.width, bytes = bytes_of(operands.math());
  int64_t stored = 0;
  std::vector<Kernel> kernels;
  for (size_t b = 0; b < problem.branches.size(); ++b) {
    stored += problem.branches[b].filter != nullptr;
    kernels.push_back({1, 1, problem.out_channels[b]});
  }
  const std::vector<int64_t> rates(2 * kernels.size(), 1);

  // Slices of one size but the last, so that few plans are made.
  const int64_t image_bytes = stored * plane * operands.padded(shape.channels) * bytes;
  const int64_t fitting = image_bytes == 0 ? shape.batch : kStoredBytes / image_bytes;
  const int64_t most = std::clamp<int64_t>(fitting, 1, shape.batch);
  const int64_t slices = (shape.batch + most - 1) / most;
  const int64_t images = (shape.batch + slices - 1) / slices;

  std::vector<Rows> reads(kernels.size(), problem.x);
  DepthwiseParams depthwise{};
  depthwise.relu = problem.between_relu;
  depthwise.x_pitch = problem.x.pitch;
  for (size_t b = 0; b < kernels.size(); ++b) {
    if (problem.branches[b].filter == nullptr) continue;
    reads[b] = operands.allocate_rows(images * plane, shape.channels);
    depthwise.out_pitch = reads[b].pitch;
    depthwise.branch[depthwise.branches++] = {problem.branches[b], reads[b].data};
  }

  for (int64_t first = 0; first < shape.batch; first += images) {
    const int64_t count = std::min(images, shape.batch - first);
    const Rows x = skip(problem.x, first * plane, bytes);
    PyramidShape slice = shape;
    slice.batch = count;
    PyramidCall call(operands, plan::Pass::forward, slice, kernels, rates);
    depthwise.shape = depthwise_shape(operands, slice);
    depthwise.x = x.data;
    if (problem.sources.empty()) launch(operands, depthwise);
    for (size_t i = 0; i < problem.sources.size(); ++i) {
      DepthwiseParams one = depthwise;
      one.x = skip(problem.sources[i], first * plane, bytes).data;
      one.x_pitch = problem.sources[i].pitch;
      one.branches = 1;
      one.branch[0] = depthwise.branch[i];
      launch(operands, one);
    }
    for (size_t b = 0; b < kernels.size(); ++b) {
      call.params.branches[b].weight = problem.pointwise[b];
      call.set_a(b, problem.branches[b].filter == nullptr ? x : reads[b]);
    }
    call.set_epilogue(problem.scale, skip_samples(problem, first, bytes), problem.shift_per_sample,
                      problem.relu, shape.out_channels);
    call.set_out(skip(out, first * plane, bytes));
    call.launch();
  }
}

DepthwiseMoments depthwise_statistics(Operands& operands, const Tensor& like,
                                      const PyramidShape& shape, const Rows& x,
                                      const std::vector<DepthwiseBranch>& branches,
                                      const std::vector<Rows>& results) {
  const Math math = operands.math();
  const auto type = math == Math::float64 ? ScalarType::Double : ScalarType::Float;
  const int64_t size[] = {int64_t(branches.size()) * shape.channels};
  const auto per_channel = [&] {
    Tensor t = with_memory(like, [&] { return torch::stable::new_empty(like, {size, 1}, type); });
    return torch::stable::zero_(t);
  };
  const DepthwiseMoments moments{per_channel(), per_channel()};

  DepthwiseParams params{};
  CombineParams combine{};
  params.shape = depthwise_shape(operands, shape);
  params.x = x.data;
  params.x_pitch = x.pitch;
  const int columns = depthwise_columns(math);
  const int64_t tiles =
      depthwise_tiles(params.shape) * depthwise_column_tiles(params.shape, columns);
  for (size_t b = 0; b < branches.size(); ++b) {
    if (branches[b].filter == nullptr) continue;
    const int64_t own = params.branches++;
    params.branch[own] = {branches[b], nullptr};
    if (!results.empty()) {
      params.branch[own].out = results[size_t(own)].data;
      params.out_pitch = results[size_t(own)].pitch;
    }
    combine.branch[own] = {
        operands.narrow("the tiles of all branches", own * tiles),
        operands.narrow("the tiles of a branch", tiles),
        operands.narrow("the channels of all branches", int64_t(b) * shape.channels),
        params.shape.channels};
  }
  if (params.branches == 0) return moments;
  const int64_t parts = params.branches * tiles;
  const int64_t bytes = parts * columns * (math == Math::float64 ? 8 : 4);
  combine.tile_means = params.tile_means = operands.allocate(bytes);
  combine.tile_squares = params.tile_squares = operands.allocate(bytes);
  params.tile_counts = static_cast<int32_t*>(operands.allocate(parts * int64_t(sizeof(int32_t))));
  combine.tile_counts = params.tile_counts;
  combine.mean = moments.mean.data_ptr();
  combine.squares = moments.squares.data_ptr();
  combine.rows = 1;
  combine.tile_n = columns;
  combine.branches = params.branches;
  launch(operands, params);
  check_cuda(operands.op(), launch_combine_sm80(math, combine, operands.stream()));
  return moments;
}

}  // namespace aspp::cuda
