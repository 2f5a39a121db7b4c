// SPDX-License-Identifier: BSD-3-Clause
// CPU binding of aspp_inference: the folded head in one pass over the input. The branches of a
// chunk of pixels are projected while they are in cache; the image pooling is summed on the way
// and, being constant over the plane, joins as a per-sample bias in the last, small pass.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "branches.h"
#include "forward.h"
#include "parallel.h"
#include "polyphase.h"

namespace aspp {
namespace {

constexpr const char* kOp = "aspp_inference";

struct HeadShape {
  PyramidShape pyramid;
  int64_t pooled = 0, projected = 0;
};

HeadShape check_head(const Tensor& x, const std::vector<Tensor>& depthwise,
                     const std::vector<Tensor>& weights, const std::vector<int64_t>& rates,
                     const Tensor& shift, const std::optional<Tensor>& pool_weight,
                     const std::optional<Tensor>& pool_shift, const Tensor& project_weight,
                     const Tensor& project_shift,
                     const std::optional<std::vector<Tensor>>& prepared) {
  require(depthwise.size() == weights.size(), kOp,
          ": depthwise_weights must have one entry per branch, got ", depthwise.size(), " for ",
          weights.size(), " branches");
  HeadShape shape;
  shape.pyramid = check_dense(kOp, x, weights, rates, kCpuLimits);
  std::vector<Tensor> deep, point;
  std::vector<int64_t> deep_rates;
  for (size_t b = 0; b < weights.size(); ++b) {
    if (depthwise[b].numel() == 0) continue;
    deep.push_back(depthwise[b]);
    point.push_back(weights[b]);
    deep_rates.insert(deep_rates.end(), {rates[2 * b], rates[2 * b + 1]});
  }
  if (!deep.empty()) check_separable(kOp, x, deep, point, deep_rates, kCpuLimits);
  check_vector(kOp, "shift", shift, x, shape.pyramid.out_channels);
  require(pool_weight.has_value() == pool_shift.has_value(), kOp,
          ": pool_weight and pool_shift must be given together");
  if (pool_weight.has_value()) {
    check_like(kOp, "pool_weight", *pool_weight, x);
    require(pool_weight->dim() == 2 && pool_weight->size(1) == shape.pyramid.channels, kOp,
            ": pool_weight must be [Q, ", shape.pyramid.channels, "], got shape ",
            shape_of(*pool_weight));
    shape.pooled = pool_weight->size(0);
    check_vector(kOp, "pool_shift", pool_shift, x, shape.pooled);
  }
  check_like(kOp, "project_weight", project_weight, x);
  const int64_t inputs = shape.pyramid.out_channels + shape.pooled;
  require(
      project_weight.dim() == 2 && project_weight.size(1) == inputs && project_weight.size(0) >= 1,
      kOp, ": project_weight must be [P, ", inputs, "], got shape ", shape_of(project_weight));
  shape.projected = project_weight.size(0);
  check_vector(kOp, "project_shift", project_shift, x, shape.projected);
  require(!prepared.has_value() || prepared->size() == weights.size(), kOp,
          ": prepared must be None or have one entry per branch, got ",
          prepared.has_value() ? prepared->size() : 0, " for ", weights.size(), " branches");
  return shape;
}

// Columns [first, first + count) of [O, K], as the [O, count, 1, 1] that Operands::weight takes.
Tensor as_kernel(Tensor matrix, int64_t first, int64_t count) {
  const Tensor part = torch::stable::narrow(matrix, 1, first, count);
  return torch::stable::unsqueeze(torch::stable::unsqueeze(part, 2), 3);
}

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

// bias[n, :] = project_shift + project[:, pool] relu(pool_weight mean(x[n]) + pool_shift)
template <typename T>
void head_bias(const T* sums, int64_t parts, double pixels, int64_t channels, const Matrix* pool,
               const T* pool_shift, int64_t pooled, const Matrix* project, const T* project_shift,
               int64_t width, T* bias) {
  for (int64_t o = 0; o < width; ++o) bias[o] = project_shift[o];
  if (pool == nullptr) return;
  const int64_t stride = padded(channels);
  std::vector<T> hidden(size_t(padded(pooled)), T(0));
  for (int64_t q = 0; q < pooled; ++q) hidden[size_t(q)] = pool_shift[q];
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += double(sums[part * stride + c]);
    const T mean = T(total / pixels);
    const T* row = static_cast<const T*>(pool->data) + c * pool->row;
    for (int64_t q = 0; q < pooled; ++q) hidden[size_t(q)] += mean * row[q];
  }
  for (int64_t q = 0; q < pooled; ++q) {
    const T h = hidden[size_t(q)] < T(0) ? T(0) : hidden[size_t(q)];
    const T* row = static_cast<const T*>(project->data) + q * project->row;
    for (int64_t o = 0; o < width; ++o) bias[o] += h * row[o];
  }
}

// bias[n, :] in the compute type, [N, padded P], from sums of x over parts of each image.
const void* project_bias(Operands& operands, const HeadShape& head, const PixelSums& sums,
                         const std::optional<Tensor>& pool_weight,
                         const std::optional<Tensor>& pool_shift, const Tensor& project_weight,
                         const Tensor& project_shift) {
  const PyramidShape& shape = head.pyramid;
  const int64_t width = padded(head.projected);
  Matrix pool, pool_project;
  const void* pool_bias = nullptr;
  if (head.pooled > 0) {
    const Dtype dtype = operands.compute_dtype();
    pool = operands.weight(as_kernel(*pool_weight, 0, shape.channels), dtype);
    pool_project =
        operands.weight(as_kernel(project_weight, shape.out_channels, head.pooled), dtype);
    pool_bias = operands.vector(*pool_shift);
  }
  const void* base = operands.vector(project_shift);
  void* bias = operands.allocate(shape.batch * width);
  const auto fill = [&](auto element) {
    using T = decltype(element);
    for (int64_t n = 0; n < shape.batch; ++n) {
      const int64_t first = n * sums.parts * padded(shape.channels);
      head_bias<T>(static_cast<const T*>(sums.data) + (head.pooled > 0 ? first : 0), sums.parts,
                   double(shape.height * shape.width), shape.channels,
                   head.pooled > 0 ? &pool : nullptr, static_cast<const T*>(pool_bias), head.pooled,
                   &pool_project, static_cast<const T*>(base), width,
                   static_cast<T*>(bias) + n * width);
    }
  };
  operands.double_precision() ? fill(double{}) : fill(float{});
  return bias;
}

// The branches of a chunk of pixels are projected while they are in cache. The bias, which needs
// all of x, joins in a last, small pass.
template <typename Bias>
void run_fused(PyramidParams params, std::vector<BranchParams>& branches,
               const std::vector<Tensor>& weights, const Tensor& project_weight,
               const HeadShape& head, Operands& operands, const Tensor& out, Bias&& bias_of) {
  const PyramidShape& shape = head.pyramid;
  const bool wide = operands.double_precision();
  const int64_t width = padded(head.projected);
  for (size_t b = 0; b < branches.size(); ++b) set_weight(operands, branches[b], weights[b]);
  const Matrix project = project_rows(operands, project_weight, branches, params.columns);
  params.project = project.data;
  params.project_row = project.row;
  params.project_columns = width;
  params.raw = operands.allocate(shape.batch * shape.height * shape.width * width);
  const Schedule schedule = schedule_of(branches, shape.batch, shape.height, shape.width);
  const PixelSums sums = sums_of(params, schedule, head.pooled > 0, operands);
  params.pixel_sums = sums.data;
  run_forward(params, schedule, wide);

  const FinishParams finish{params.raw,   width,       bias_of(sums), image_of(out),
                            shape.height, shape.width, head.projected};
  run_tasks(shape.batch * shape.height, shape.width * width * (wide ? 8 : 4),
            [&](int64_t task, void* scratch) {
              const int64_t y = task % shape.height;
              kernels().finish_rows(finish, task / shape.height, y, y + 1, scratch, wide);
            });
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

// With branches by minimal filtering, whose chunks are of other pixels: branches into memory, then
// their share of the projection as a 1x1 convolution, the last with the bias as its shift.
template <typename Bias>
void run_stored(const PyramidParams& params, const MinimalForms& forms,
                const std::vector<Tensor>& weights, const std::vector<Tensor>& matrices,
                const Tensor& project_weight, const HeadShape& head, Operands& operands,
                const Tensor& out, Bias&& bias_of) {
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
  PixelSums sums;
  for (size_t g = 0; g < groups.size(); ++g) {
    const Together& group = groups[g];
    const int64_t first = params.branches[group.first].channel, channels = group.channels(params);
    const Image activated = pixels(stored, channels);
    PyramidParams branches = params;
    branches.out = channels_from(activated, -first);
    MinimalForms some(forms.size());
    std::copy(&forms[group.first], &forms[group.first] + group.count(), &some[group.first]);
    std::vector<size_t> rest = run_minimal(branches, some, matrices, operands);
    std::erase_if(rest, [&](size_t b) { return b < group.first || b >= group.last; });
    const bool want_sums = head.pooled > 0 && sums.data == nullptr;
    const PixelSums found = run_directly(branches, rest, weights, operands, want_sums);
    if (found.data != nullptr) sums = found;

    const Tensor kernel = as_kernel(project_weight, first, channels);
    std::vector<BranchParams> project = dense_branches({kernel}, {1, 1});
    PyramidShape share = shape;
    share.channels = channels;
    PyramidParams last = params_of(activated, share, project);
    last.out = pixels(projected, width);
    if (g > 0) last.residual = projected;
    if (g + 1 == groups.size()) {
      last.shift = bias_of(sums);
      last.shift_n_stride = last.columns;
      last.relu = true;
      last.out = image_of(out);
    }
    run_directly(last, {0}, {kernel}, operands);
  }
}

Tensor inference(const Tensor& x, std::vector<Tensor> depthwise, std::vector<Tensor> weights,
                 std::vector<int64_t> rates, const Tensor& shift, std::optional<Tensor> pool_weight,
                 std::optional<Tensor> pool_shift, const Tensor& project_weight,
                 const Tensor& project_shift, bool polyphase,
                 std::optional<std::vector<Tensor>> prepared) {
  const HeadShape head = check_head(x, depthwise, weights, rates, shift, pool_weight, pool_shift,
                                    project_weight, project_shift, prepared);
  const PyramidShape& shape = head.pyramid;
  const Tensor out = empty_image(x, shape.batch, head.projected, shape, is_channels_last(x));
  if (shape.batch == 0) return out;

  Operands operands(x);
  std::vector<BranchParams> branches = dense_branches(weights, rates);
  for (size_t b = 0; b < weights.size(); ++b) {
    if (depthwise[b].numel() == 0) continue;
    branches[b].depthwise = operands.depthwise(depthwise[b]);
    branches[b].kernel_h = depthwise[b].size(2);
    branches[b].kernel_w = depthwise[b].size(3);
  }
  PyramidParams params = params_of(image_of(x), shape, branches);
  set_epilogue(params, operands, branches, std::nullopt, shift, true);
  const auto bias_of = [&](const PixelSums& sums) {
    return project_bias(operands, head, sums, pool_weight, pool_shift, project_weight,
                        project_shift);
  };
  MinimalForms forms(branches.size());
  if (polyphase) forms = minimal_forms(shape, branches, operands, prepared.has_value());
  // The sums of x are a by-product of a branch that is computed directly.
  if (head.pooled > 0 && all_minimal(forms)) forms.back().reset();
  if (any_minimal(forms)) {
    const std::vector<Tensor> matrices =
        minimal_weights(kOp, forms, weights, prepared.value_or(std::vector<Tensor>{}), operands);
    run_stored(params, forms, weights, matrices, project_weight, head, operands, out, bias_of);
  } else {
    run_fused(params, branches, weights, project_weight, head, operands, out, bias_of);
  }
  return out;
}

// Where nothing but the CPU's kernels filters minimally.
std::vector<Tensor> no_polyphase_weights(std::vector<Tensor> weights,
                                         std::vector<int64_t> /*rates*/, int64_t /*batch*/,
                                         int64_t /*height*/, int64_t /*width*/) {
  std::vector<Tensor> direct;
  for (const Tensor& w : weights) direct.push_back(empty_of(w, {0}));
  return direct;
}

std::string cpu_isa() { return kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CPU, m) { m.impl("aspp_inference", TORCH_BOX(&inference)); }

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("polyphase_weights", TORCH_BOX(&no_polyphase_weights));
}

}  // namespace aspp
