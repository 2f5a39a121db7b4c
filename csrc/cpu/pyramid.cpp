// SPDX-License-Identifier: BSD-3-Clause
// CPU binding of atrous_pyramid: every branch directly, padding-free, or by minimal filtering,
// whichever costs less; no concat copy.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <tuple>

#include "forward.h"
#include "polyphase.h"

namespace aspp {
namespace {

constexpr const char* kOp = "atrous_pyramid";

Tensor pyramid(Tensor x, std::vector<Tensor> weights, std::vector<int64_t> rates,
               std::optional<Tensor> scale, std::optional<Tensor> shift, bool relu, bool /*tf32*/,
               int64_t polyphase) {
  PyramidShape shape = check_dense(kOp, x, weights, rates, kCpuLimits);
  check_vector(kOp, "scale", scale, x, shape.out_channels);
  check_vector(kOp, "shift", shift, x, shape.out_channels, true);
  check_polyphase(kOp, polyphase);
  const bool channels_last = is_channels_last(x) || any_channels_last(weights);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, channels_last);
  if (shape.batch == 0) return out;

  Image written = image_of(out);
  if (is_narrow(shape)) {
    weights = turned(weights, shape, rates);
    std::tie(x, shape, rates, written) =
        std::tuple{turned(x), turned(shape), turned(rates), image_of(turned(out))};
  }
  Operands operands(x);
  std::vector<BranchParams> branches = dense_branches(weights, rates);
  PyramidParams params = params_of(image_of(x), shape, branches);
  set_epilogue(params, operands, branches, scale, shift, relu);
  params.out = written;
  const MinimalForms forms = minimal_forms(shape, branches, operands, Polyphase(polyphase), false);
  run_branches(params, forms, minimal_weights(forms, weights, operands), weights, operands);
  return out;
}

std::vector<Tensor> polyphase_weights(std::vector<Tensor> weights, std::vector<int64_t> rates,
                                      int64_t height, int64_t width, int64_t polyphase) {
  constexpr const char* op = "polyphase_weights";
  check_rates(op, rates, weights.size());
  for (size_t b = 0; b < weights.size(); ++b) {
    const std::string name = entry("weights", b);
    check_kernel(op, name, weights[b]);
    check_like(op, name, weights[b], weights[0]);
    require(weights[b].size(1) == weights[0].size(1), op, ": ", name, " has ", weights[b].size(1),
            " input channels but weights[0] has ", weights[0].size(1));
  }
  check_image_size(op, "x", {1, weights[0].size(1), height, width});
  check_polyphase(op, polyphase);
  PyramidShape shape{1, weights[0].size(1), height, width};
  if (is_narrow(shape)) {
    weights = turned(weights, shape, rates);
    std::tie(shape, rates) = std::tuple{turned(shape), turned(rates)};
  }
  Operands operands(weights[0]);
  const MinimalForms forms =
      minimal_forms(shape, dense_branches(weights, rates), operands, Polyphase(polyphase), true);
  return minimal_weights(forms, weights, operands);
}

// [branches, 3]
Tensor polyphase_times(const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> rates,
                       int64_t polyphase) {
  constexpr const char* op = "polyphase_times";
  const PyramidShape shape = check_dense(op, x, weights, rates, kCpuLimits);
  check_polyphase(op, polyphase);
  const Tensor out = empty_image(x, shape.batch, shape.out_channels, shape, is_channels_last(x));
  std::vector<MinimalTimes> times(weights.size(), {std::nan(""), std::nan(""), std::nan("")});
  if (shape.batch > 0) {
    Operands operands(x);
    std::vector<BranchParams> branches = dense_branches(weights, rates);
    PyramidParams params = params_of(image_of(x), shape, branches);
    params.out = image_of(out);
    const MinimalForms forms = minimal_forms(shape, branches, operands, Polyphase(polyphase), true);
    const std::vector<Tensor> matrices = minimal_weights(forms, weights, operands);
    const auto loose = loose_outputs(params, forms, matrices, operands.double_precision());
    run_minimal(params, forms, matrices, weights, loose, operands, &times);
  }
  const int64_t size[] = {int64_t(times.size()), 3};
  const Tensor result = torch::stable::new_empty(x, {size, 2}, ScalarType::Double);
  std::memcpy(result.data_ptr(), times.data(), times.size() * sizeof(MinimalTimes));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CPU, m) {
  m.impl("atrous_pyramid", ASPP_BOX(&pyramid));
  m.impl("polyphase_weights", ASPP_BOX(&polyphase_weights));
  m.impl("polyphase_times", ASPP_BOX(&polyphase_times));
}

}  // namespace aspp
