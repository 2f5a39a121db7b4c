// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <cstring>

#include "head.h"
#include "parallel.h"

namespace aspp {

namespace {

// One row of the projection per accumulator column; padding columns project to nothing.
Matrix project_rows(Operands& operands, const Tensor& project,
                    const std::vector<BranchParams>& branches, int64_t columns) {
  int64_t outputs = 0;
  for (const BranchParams& branch : branches) outputs += branch.out_channels;
  if (columns == outputs) return operands.weight(as_kernel(project, 0, outputs));
  const Dtype dtype = operands.product_dtype();
  const int64_t row = padded(project.size(0));
  const int64_t element = dtype == Dtype::kBFloat16 ? 2 : dtype == Dtype::kFloat32 ? 4 : 8;
  char* rows = static_cast<char*>(operands.allocate_zeros(columns * row, dtype));
  int64_t first = 0;
  for (const BranchParams& branch : branches) {
    const Matrix part = operands.weight(as_kernel(project, first, branch.out_channels));
    for (int64_t i = 0; i < branch.out_channels; ++i) {
      std::memcpy(rows + (branch.column + i) * row * element,
                  static_cast<const char*>(part.data) + i * part.row * element,
                  size_t(row * element));
    }
    first += branch.out_channels;
  }
  return {rows, 0, row};
}

// Branches [first, last) that are in memory at the same time.
struct Together {
  size_t first, last;

  size_t count() const { return last - first; }
  int64_t channels(const PyramidParams& params) const {
    const BranchParams& end = params.branches[last - 1];
    return end.channel + end.out_channels - params.branches[first].channel;
  }
};

// All of them where they take no more memory than x. Else as many as fit beside what is projected
// so far, at least one.
std::vector<Together> group_branches(const PyramidParams& params, const HeadShape& head) {
  if (head.pyramid.out_channels <= params.channels) return {{0, size_t(params.branch_count)}};
  const int64_t room = params.channels - padded(head.projected);
  std::vector<Together> groups;
  int64_t used = 0;
  for (size_t b = 0; b < size_t(params.branch_count); ++b) {
    used += params.branches[b].out_channels;
    if (b == 0 || used > room) {
      groups.push_back({b, b + 1});
      used = params.branches[b].out_channels;
    } else {
      groups.back().last = b + 1;
    }
  }
  return groups;
}

}  // namespace

void run_fused(const HeadCall& call, std::vector<BranchParams>& branches) {
  const HeadShape& head = call.head;
  const PyramidShape& shape = head.pyramid;
  Operands& operands = call.operands;
  PyramidParams params = call.params;
  const bool wide = operands.double_precision();
  const int64_t width = padded(head.projected);
  for (size_t b = 0; b < branches.size(); ++b) set_weight(operands, branches[b], call.weights[b]);
  const Matrix project = project_rows(operands, call.project_weight, branches, params.columns);
  params.project = project.data;
  params.project_row = project.row;
  params.project_columns = width;
  params.raw = operands.allocate(shape.batch * shape.height * shape.width * width);
  const Schedule schedule = schedule_of(branches, shape.batch, shape.height, shape.width);
  const PixelSums sums = sums_of(params, schedule, head.pooled > 0, operands);
  params.pixel_sums = sums.data;
  run_forward(params, schedule, wide);

  const FinishParams finish{params.raw,   width,       call.bias(sums), image_of(call.out),
                            shape.height, shape.width, head.projected,  call.project_relu};
  run_tasks(shape.batch * shape.height, shape.width * width * (wide ? 8 : 4),
            [&](int64_t task, void* scratch) {
              const int64_t y = task % shape.height;
              kernels().finish_rows(finish, task / shape.height, y, y + 1, scratch, wide);
            });
}

void run_stored(const HeadCall& call, const MinimalForms& forms,
                const std::vector<Tensor>& matrices) {
  const PyramidParams& params = call.params;
  const HeadShape& head = call.head;
  Operands& operands = call.operands;
  const PyramidShape& shape = head.pyramid;
  const int64_t plane = shape.height * shape.width, width = padded(head.projected);
  const auto pixels = [&](void* data, int64_t channels) {  // [N, H, W, channels]
    return Image{data, operands.compute_dtype(), plane * channels,
                 1,    shape.width * channels,   channels};
  };
  const std::vector<Together> groups = group_branches(params, head);
  int64_t widest = 0;
  for (const Together& group : groups) widest = std::max(widest, group.channels(params));
  void* const stored = operands.allocate(shape.batch * plane * widest);
  void* const projected =
      groups.size() > 1 ? operands.allocate(shape.batch * plane * width) : nullptr;
  const auto loose = loose_outputs(params, forms, matrices, operands.double_precision());
  PixelSums sums;
  for (size_t g = 0; g < groups.size(); ++g) {
    const Together& group = groups[g];
    const int64_t first = params.branches[group.first].channel, channels = group.channels(params);
    const Image activated = pixels(stored, channels);
    PyramidParams branches = params;
    branches.out = channels_from(activated, -first);
    MinimalForms some(forms.size());
    std::copy(&forms[group.first], &forms[group.first] + group.count(), &some[group.first]);
    std::vector<size_t> rest = run_minimal(branches, some, matrices, call.weights, loose, operands);
    std::erase_if(rest, [&](size_t b) { return b < group.first || b >= group.last; });
    const bool want_sums = head.pooled > 0 && sums.data == nullptr;
    const PixelSums found = run_directly(branches, rest, call.weights, operands, want_sums);
    if (found.data != nullptr) sums = found;

    const Tensor kernel = as_kernel(call.project_weight, first, channels);
    std::vector<BranchParams> project = dense_branches({kernel}, {1, 1});
    PyramidShape share = shape;
    share.channels = channels;
    PyramidParams last = params_of(activated, share, project);
    last.out = pixels(projected, width);
    if (g > 0) last.residual = projected;
    if (g + 1 == groups.size()) {
      last.shift = call.bias(sums);
      last.shift_n_stride = last.columns;
      last.relu = call.project_relu;
      last.out = image_of(call.out);
    }
    run_directly(last, {0}, {kernel}, operands);
  }
}

}  // namespace aspp
