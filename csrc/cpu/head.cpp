// SPDX-License-Identifier: BSD-3-Clause
// CPU binding of aspp_inference, the folded head. The image pooling is summed on the way and, being
// constant over the plane, joins as a per-sample bias at the end. Without a projection it is a
// pyramid.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "head.h"

namespace aspp {
namespace {

constexpr const char* kOp = "aspp_inference";

HeadShape check_head(const Tensor& x, const std::vector<Tensor>& depthwise,
                     const std::vector<Tensor>& weights, const std::vector<int64_t>& rates,
                     const Tensor& shift, const std::optional<Tensor>& pool_weight,
                     const std::optional<Tensor>& pool_shift,
                     const std::optional<Tensor>& project_weight,
                     const std::optional<Tensor>& project_shift,
                     const std::optional<std::vector<Tensor>>& prepared) {
  require(depthwise.size() == weights.size(), kOp,
          ": depthwise_weights must have one entry per branch, got ", depthwise.size(), " for ",
          weights.size(), " branches");
  HeadShape shape;
  shape.pyramid = check_dense(kOp, x, weights, rates, kCpuLimits);
  std::vector<Tensor> deep, point;
  std::vector<int64_t> deep_rates;
  for (size_t b = 0; b < weights.size(); ++b) {
    if (is_none(depthwise[b])) continue;
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
  require(project_weight.has_value() == project_shift.has_value(), kOp,
          ": project_weight and project_shift must be given together");
  require(project_weight.has_value() || !pool_weight.has_value(), kOp,
          ": pool_weight and pool_shift must be None where project_weight is, got tensors");
  if (project_weight.has_value()) {
    const Tensor& project = *project_weight;
    check_like(kOp, "project_weight", project, x);
    const int64_t inputs = shape.pyramid.out_channels + shape.pooled;
    require(project.dim() == 2 && project.size(1) == inputs && project.size(0) >= 1, kOp,
            ": project_weight must be [P, ", inputs, "], got shape ", shape_of(project));
    shape.projected = project.size(0);
    check_vector(kOp, "project_shift", project_shift, x, shape.projected, true);
  }
  require(!prepared.has_value() || prepared->size() == weights.size(), kOp,
          ": prepared must be None or have one entry per branch, got ",
          prepared.has_value() ? prepared->size() : 0, " for ", weights.size(), " branches");
  return shape;
}

// to[o] += sum over r of value(r) * rows[r][o], in stretches: a longer chain in T loses digits.
template <typename T, typename F>
void add_product(int64_t count, const F& value, const Matrix& rows, std::vector<double>& to) {
  constexpr int64_t kStretch = 32;
  std::vector<T> part(to.size());
  for (int64_t first = 0; first < count; first += kStretch) {
    std::fill(part.begin(), part.end(), T(0));
    for (int64_t r = first; r < std::min(first + kStretch, count); ++r) {
      const T factor = value(r);
      const T* row = static_cast<const T*>(rows.data) + r * rows.row;
      for (size_t o = 0; o < part.size(); ++o) part[o] += factor * row[o];
    }
    for (size_t o = 0; o < part.size(); ++o) to[o] += double(part[o]);
  }
}

// bias[:] += project[:, pool] act(pool_weight mean(x[n]) + pool_shift), by sums of x[n]
template <typename T>
void add_pooled(const T* sums, int64_t parts, double pixels, int64_t channels, const Matrix& pool,
                const T* pool_shift, int64_t pooled, bool relu, const Matrix& project,
                int64_t width, T* bias) {
  const auto mean = [&](int64_t c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += double(sums[part * padded(channels) + c]);
    return T(sum / pixels);
  };
  std::vector<double> hidden(pool_shift, pool_shift + padded(pooled));
  add_product<T>(channels, mean, pool, hidden);
  const auto activated = [&](int64_t q) {
    const double value = hidden[size_t(q)];
    return T(relu ? std::max(value, 0.0) : value);
  };
  std::vector<double> total(bias, bias + width);
  add_product<T>(pooled, activated, project, total);
  for (int64_t o = 0; o < width; ++o) bias[o] = T(total[size_t(o)]);
}

// bias[n, :] in the compute type, [N, padded P], from sums of x over parts of each image.
const void* project_bias(Operands& operands, const HeadShape& head, const PixelSums& sums,
                         const std::optional<Tensor>& pool_weight,
                         const std::optional<Tensor>& pool_shift, bool relu,
                         const Tensor& project_weight, const Tensor& project_shift) {
  const PyramidShape& shape = head.pyramid;
  const int64_t width = padded(head.projected);
  void* bias = operands.allocate(shape.batch * width);
  for (int64_t n = 0; n < shape.batch; ++n) {
    operands.vector(project_shift, n, 0, head.projected, operands.offset(bias, n * width));
  }
  if (head.pooled == 0) return bias;
  const Dtype dtype = operands.compute_dtype();
  const Matrix pool = operands.weight(as_kernel(*pool_weight, 0, shape.channels), dtype);
  const Matrix project =
      operands.weight(as_kernel(project_weight, shape.out_channels, head.pooled), dtype);
  const void* base = operands.vector(*pool_shift);
  const auto add = [&](auto element) {
    using T = decltype(element);
    for (int64_t n = 0; n < shape.batch; ++n) {
      const T* first = static_cast<const T*>(sums.data) + n * sums.parts * padded(shape.channels);
      add_pooled<T>(first, sums.parts, double(shape.height * shape.width), shape.channels, pool,
                    static_cast<const T*>(base), head.pooled, relu, project, width,
                    static_cast<T*>(bias) + n * width);
    }
  };
  operands.double_precision() ? add(double{}) : add(float{});
  return bias;
}

Tensor inference(Tensor x, std::vector<Tensor> depthwise, std::vector<Tensor> weights,
                 std::vector<int64_t> rates, const Tensor& shift, std::optional<Tensor> pool_weight,
                 std::optional<Tensor> pool_shift, std::optional<Tensor> project_weight,
                 std::optional<Tensor> project_shift, int64_t polyphase,
                 std::optional<std::vector<Tensor>> prepared, std::optional<bool> channels_last,
                 bool relu, bool project_relu) {
  HeadShape head = check_head(x, depthwise, weights, rates, shift, pool_weight, pool_shift,
                              project_weight, project_shift, prepared);
  check_polyphase(kOp, polyphase);
  PyramidShape& shape = head.pyramid;
  const bool last = channels_last.value_or(is_channels_last(x));
  const Tensor result = empty_image(x, shape.batch, head.out_channels(), shape, last);
  if (shape.batch == 0) return result;

  Tensor out = result;
  if (is_narrow(shape)) {
    weights = turned(weights, shape, rates);
    depthwise = turned(depthwise, shape, rates);
    std::tie(x, shape, rates, out) =
        std::tuple{turned(x), turned(shape), turned(rates), turned(result)};
  }
  Operands operands(x);
  std::vector<BranchParams> branches = dense_branches(weights, rates);
  for (size_t b = 0; b < weights.size(); ++b) {
    if (depthwise[b].numel() == 0) continue;
    branches[b].depthwise = operands.depthwise(depthwise[b]);
    branches[b].kernel_h = depthwise[b].size(2);
    branches[b].kernel_w = depthwise[b].size(3);
  }
  PyramidParams params = params_of(image_of(x), shape, branches);
  set_epilogue(params, operands, branches, std::nullopt, shift, relu);
  MinimalForms forms =
      minimal_forms(shape, branches, operands, Polyphase(polyphase), prepared.has_value());
  if (prepared.has_value()) check_prepared(kOp, forms, weights, *prepared, operands);
  const auto matrices = [&] {
    return prepared.has_value() ? *prepared : minimal_weights(forms, weights, operands);
  };
  if (head.projected == 0) {
    params.out = image_of(out);
    run_branches(params, forms, matrices(), weights, operands);
    return result;
  }
  const HeadCall call{head,
                      params,
                      weights,
                      *project_weight,
                      project_relu,
                      operands,
                      out,
                      [&](const PixelSums& sums) {
                        return project_bias(operands, head, sums, pool_weight, pool_shift, relu,
                                            *project_weight, *project_shift);
                      }};
  // The sums of x are a by-product of a branch that is computed directly.
  if (head.pooled > 0 && all_minimal(forms)) forms.back().reset();
  if (any_minimal(forms)) {
    run_stored(call, forms, matrices());
  } else {
    run_fused(call, branches);
  }
  return result;
}

// Where nothing but the CPU's kernels filters minimally.
std::vector<Tensor> no_polyphase_weights(std::vector<Tensor> weights,
                                         std::vector<int64_t> /*rates*/, int64_t /*height*/,
                                         int64_t /*width*/, int64_t /*polyphase*/) {
  std::vector<Tensor> direct;
  for (const Tensor& w : weights) direct.push_back(empty_of(w, {0}));
  return direct;
}

std::string cpu_isa() { return kernels().isa; }

// Returns what it was.
std::string use_cpu_isa(std::string isa) {
  std::string before = cpu_isa();
  use_kernels(isa);
  return before;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CPU, m) { m.impl("aspp_inference", ASPP_BOX(&inference)); }

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", ASPP_BOX(&cpu_isa));
  m.impl("use_cpu_isa", ASPP_BOX(&use_cpu_isa));
  m.impl("polyphase_weights", ASPP_BOX(&no_polyphase_weights));
}

}  // namespace aspp
