// SPDX-License-Identifier: BSD-3-Clause
#include "operator_checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace aspp {

namespace {

constexpr const char* kDense = "atrous_pyramid";

void check_kernel_limit(const char* op, const std::string& name, int64_t kh, int64_t kw,
                        const Limits& limits) {
  require(kh <= limits.kernel && kw <= limits.kernel, op, ": ", name,
          " must have kernel sizes up to ", limits.kernel, " ", limits.device, ", got ", kh, "x",
          kw);
}

// After all other checks: the sentences that hold everywhere come first.
void check_limits(const char* op, const PyramidShape& shape, size_t branches,
                  const Limits& limits) {
  check_size(op, "the result",
             {std::max<int64_t>(shape.batch, 1), shape.out_channels, shape.height, shape.width});
  require(int64_t(branches) <= limits.branches, op, ": a pyramid must have at most ",
          limits.branches, " branches ", limits.device, ", got ", branches);
  const int64_t pixels = shape.batch * shape.height * shape.width;
  require(pixels <= limits.pixels, op, ": x must have at most ", limits.pixels, " pixels ",
          limits.device, ", got ", shape.batch, " * ", shape.height, " * ", shape.width);
}

// x is described by its shape; `like` has its dtype and device.
PyramidShape check_weights(const char* op, PyramidShape shape, const Tensor& like,
                           const std::vector<Tensor>& weights, const Limits& limits) {
  for (size_t b = 0; b < weights.size(); ++b) {
    const std::string name = entry("weights", b);
    check_kernel(op, name, weights[b]);
    check_like(op, name, weights[b], like);
    require(weights[b].size(1) == shape.channels, op, ": ", name, " has ", weights[b].size(1),
            " input channels but x has ", shape.channels);
    shape.out_channels += weights[b].size(0);
  }
  for (size_t b = 0; b < weights.size(); ++b)
    check_kernel_limit(op, entry("weights", b), weights[b].size(2), weights[b].size(3), limits);
  check_limits(op, shape, weights.size(), limits);
  return shape;
}

void check_depthwise_weight(const char* op, size_t b, const Tensor& weight, const Tensor& x) {
  const std::string name = entry("depthwise_weights", b);
  check_kernel(op, name, weight);
  check_like(op, name, weight, x);
  require(weight.size(0) == x.size(1) && weight.size(1) == 1, op, ": ", name, " must be [",
          x.size(1), ", 1, kh, kw], got shape ", shape_of(weight));
}

void check_depthwise_limits(const char* op, const std::vector<Tensor>& depthwise,
                            const Limits& limits) {
  for (size_t b = 0; b < depthwise.size(); ++b) {
    if (is_none(depthwise[b])) continue;
    check_kernel_limit(op, entry("depthwise_weights", b), depthwise[b].size(2),
                       depthwise[b].size(3), limits);
  }
}

}  // namespace

void check_memory(const char* op, const std::string& name, const Tensor& t) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  require(layout == aoti_torch_layout_strided(), op, ": ", name, " must be a strided tensor");
  if (t.numel() == 0) return;
  const auto item = int64_t(t.element_size());
  int64_t held = 0, needed = t.storage_offset() + 1;
  bool counts = true;
  for (int64_t d = 0; d < t.dim(); ++d) {
    int64_t reach = 0;
    counts = counts && !__builtin_mul_overflow(t.size(d) - 1, t.stride(d), &reach) &&
             !__builtin_add_overflow(needed, reach, &needed);
  }
  counts = counts && !__builtin_mul_overflow(needed, item, &needed);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  require(held > 0 && t.data_ptr() != nullptr, op, ": ", name,
          ": The tensor has a non-zero number of elements, but its data is not allocated yet");
  const auto list = [](const auto& values) {
    return shape_of(std::vector<int64_t>(values.begin(), values.end()));
  };
  require(counts && needed <= held, op, ": ", name, ": sizes ", list(t.sizes()), ", strides ",
          list(t.strides()), ", storage offset ", t.storage_offset(), ", and itemsize ", item,
          " requiring a storage size of ", needed, " are out of bounds for storage of size ", held);
}

PyramidShape check_dense(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                         const std::vector<int64_t>& rates, const Limits& limits) {
  check_image(op, "x", x);
  check_rates(op, rates, weights.size());
  return check_weights(op, {x.size(0), x.size(1), x.size(2), x.size(3), 0}, x, weights, limits);
}

PyramidShape check_dense_grad_input(const Tensor& grad, const std::vector<Tensor>& weights,
                                    const std::vector<int64_t>& rates, const Limits& limits) {
  check_image("atrous_pyramid_grad_input", "grad", grad);
  check_rates(kDense, rates, weights.size());
  check_kernel(kDense, "weights[0]", weights[0]);
  const PyramidShape x{grad.size(0), weights[0].size(1), grad.size(2), grad.size(3), 0};
  check_image_size(kDense, "x", {x.batch, x.channels, x.height, x.width});
  const PyramidShape shape = check_weights(kDense, x, grad, weights, limits);
  check_grad(kDense, grad, grad, shape);
  return shape;
}

PyramidShape check_dense_grad_weight(const Tensor& grad, const Tensor& x,
                                     const std::vector<int64_t>& kernels,
                                     const std::vector<int64_t>& out_channels,
                                     const std::vector<int64_t>& rates, const Limits& limits) {
  constexpr const char* kOp = "atrous_pyramid_grad_weight";
  check_image(kOp, "x", x);
  require(kernels.size() == 2 * out_channels.size(), kOp,
          ": kernels must have two sizes per branch, got ", kernels.size(), " for ",
          out_channels.size(), " branches");
  PyramidShape shape{x.size(0), x.size(1), x.size(2), x.size(3), 0};
  for (size_t b = 0; b < out_channels.size(); ++b) {
    const int64_t kh = kernels[2 * b], kw = kernels[2 * b + 1];
    require(out_channels[b] >= 1 && kh >= 1 && kw >= 1, kOp,
            ": kernel sizes and out_channels must be >= 1, got ", kh, "x", kw, " and ",
            out_channels[b]);
    shape.out_channels += std::min(out_channels[b], kMaxElements);  // the sum must not wrap
  }
  check_rates(kDense, rates, out_channels.size());
  for (size_t b = 0; b < out_channels.size(); ++b)
    check_odd(kDense, entry("weights", b), kernels[2 * b], kernels[2 * b + 1]);
  for (size_t b = 0; b < out_channels.size(); ++b)
    check_size(kDense, entry("weights", b),
               {out_channels[b], x.size(1), kernels[2 * b], kernels[2 * b + 1]});
  check_grad(kDense, grad, x, shape);
  for (size_t b = 0; b < out_channels.size(); ++b)
    check_kernel_limit(kDense, entry("weights", b), kernels[2 * b], kernels[2 * b + 1], limits);
  check_limits(kDense, shape, out_channels.size(), limits);
  return shape;
}

PyramidShape check_separable(const char* op, const Tensor& x, const std::vector<Tensor>& depthwise,
                             const std::vector<Tensor>& pointwise,
                             const std::vector<int64_t>& rates, const Limits& limits) {
  check_image(op, "x", x);
  require(!pointwise.empty(), op,
          ": pointwise_weights must hold at least one branch, got an empty list");
  require(depthwise.size() == pointwise.size(), op,
          ": depthwise_weights must have one entry per branch, got ", depthwise.size(), " for ",
          pointwise.size(), " branches");
  check_rates(op, rates, pointwise.size());
  PyramidShape shape{x.size(0), x.size(1), x.size(2), x.size(3), 0};
  for (size_t b = 0; b < pointwise.size(); ++b) {
    const std::string name = entry("pointwise_weights", b);
    check_kernel(op, name, pointwise[b]);
    check_like(op, name, pointwise[b], x);
    require(pointwise[b].size(2) == 1 && pointwise[b].size(3) == 1, op, ": ", name,
            " must be [O, C, 1, 1], got shape ", shape_of(pointwise[b]));
    require(pointwise[b].size(1) == shape.channels, op, ": ", name, " has ", pointwise[b].size(1),
            " input channels but x has ", shape.channels);
    shape.out_channels += pointwise[b].size(0);
    if (!is_none(depthwise[b])) check_depthwise_weight(op, b, depthwise[b], x);
  }
  check_depthwise_limits(op, depthwise, limits);
  check_limits(op, shape, pointwise.size(), limits);
  return shape;
}

PyramidShape check_depthwise(const char* op, const Tensor& x, const std::vector<Tensor>& depthwise,
                             const std::vector<int64_t>& rates, const Limits& limits) {
  check_image(op, "x", x);
  require(!depthwise.empty(), op,
          ": depthwise_weights must hold at least one branch, got an empty list");
  check_rates(op, rates, depthwise.size());
  for (size_t b = 0; b < depthwise.size(); ++b)
    if (!is_none(depthwise[b])) check_depthwise_weight(op, b, depthwise[b], x);
  require(x.size(0) > 0, op, ": statistics need at least one sample, got a batch of 0");
  const PyramidShape shape{x.size(0), x.size(1), x.size(2), x.size(3), x.size(1)};
  check_depthwise_limits(op, depthwise, limits);
  check_limits(op, shape, depthwise.size(), limits);
  return shape;
}

void check_channel_vector(const char* op, const char* name, const Tensor& v, const Tensor& x,
                          size_t branches) {
  const auto type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  require(v.scalar_type() == type, op, ": ", name, " must have the dtype of x's sums ",
          dtype_name(type), ", got ", dtype_name(v.scalar_type()));
  check_device(op, name, v, x);
  const int64_t values = int64_t(branches) * x.size(1);
  require(v.dim() == 1 && v.size(0) == values, op, ": ", name,
          " must have one value per branch and channel (", values, "), got shape ", shape_of(v));
}

void check_stored(const char* op, const std::vector<Tensor>& stored, const Tensor& x,
                  const std::vector<Tensor>& depthwise) {
  const auto is_given = [](const Tensor& weight) { return !is_none(weight); };
  const auto branches = std::count_if(depthwise.begin(), depthwise.end(), is_given);
  require(stored.empty() || int64_t(stored.size()) == branches, op,
          ": stored must be empty or have one entry per branch with a depthwise weight, got ",
          stored.size(), " for ", branches, " branches");
  for (size_t i = 0; i < stored.size(); ++i) {
    check_like(op, entry("stored", i), stored[i], x);
    require(shape_of(stored[i]) == shape_of(x), op, ": ", entry("stored", i),
            " must have x's shape ", shape_of(x), ", got shape ", shape_of(stored[i]));
  }
}

void check_between(const char* op, const Tensor& x, const std::vector<Tensor>& scale,
                   const std::vector<Tensor>& shift, const std::vector<Tensor>& depthwise) {
  require(scale.size() == shift.size() && (scale.empty() || scale.size() == depthwise.size()), op,
          ": between must have one entry per branch, got ", scale.size(), " for ", depthwise.size(),
          " branches");
  for (size_t b = 0; b < scale.size(); ++b) {
    if (is_none(scale[b]) && is_none(shift[b])) continue;
    const std::string name = entry("between", b);
    require(!is_none(depthwise[b]), op, ": ", name,
            " must be None where the branch has no depthwise weight, got tensors");
    for (const Tensor* t : {&scale[b], &shift[b]}) {
      check_like(op, name, *t, x);
      require(t->dim() == 1 && t->size(0) == x.size(1), op, ": ", name,
              " must have one value per channel (", x.size(1), "), got shape ", shape_of(*t));
    }
  }
}

void check_grad(const char* op, const Tensor& grad, const Tensor& x, const PyramidShape& shape) {
  check_image(op, "grad", grad);
  check_like(op, "grad", grad, x);
  require(grad.size(0) == shape.batch && grad.size(1) == shape.out_channels &&
              grad.size(2) == shape.height && grad.size(3) == shape.width,
          op, ": grad must have the output's shape [", shape.batch, ", ", shape.out_channels, ", ",
          shape.height, ", ", shape.width, "], got ", shape_of(grad));
}

}  // namespace aspp
