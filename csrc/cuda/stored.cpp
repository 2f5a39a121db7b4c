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
    check_cuda(operands.op(), launch_depthwise_sm80(operands.math(), depthwise, operands.stream()));
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

}  // namespace aspp::cuda
