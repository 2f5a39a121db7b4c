// SPDX-License-Identifier: BSD-3-Clause
// CPU bindings of the dense pyramid's gradients: by minimal filtering where that costs less, else
// oneDNN's, reached through the dispatcher so that no Python is needed.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "forward.h"
#include "polyphase.h"

namespace aspp {
namespace {

// One branch of aten::convolution_backward: the gradient of the input or of the weight.
Tensor convolution_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight,
                            const int64_t* rates, bool of_weight) {
  const int64_t stride[] = {1, 1}, none[] = {0, 0};
  // Beyond the map only the centre tap lives, whatever the rate; oneDNN counts in 32 bits.
  const int64_t rate[] = {std::min(rates[0], x.size(2)), std::min(rates[1], x.size(3))};
  const int64_t padding[] = {weight.size(2) / 2 * rate[0], weight.size(3) / 2 * rate[1]};
  const int32_t mask[] = {!of_weight, of_weight, false};
  AtenTensorHandle result[3] = {nullptr, nullptr, nullptr};
  in_torch_words("PyTorch computes no gradient of this convolution, or has not the memory", [&] {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
        grad.get(), x.get(), weight.get(), nullptr, 0, stride, 2, padding, 2, rate, 2, 0, none, 2,
        1, mask, 3, &result[0], &result[1], &result[2]));
  });
  Tensor wanted;
  for (int i = 0; i < 3; ++i) {
    if (result[i] == nullptr) continue;
    const Tensor owned(result[i]);
    if (i == int(of_weight)) wanted = owned;
  }
  return wanted;
}

Tensor channels_last_copy(const Tensor& t) {
  return with_memory(t, [&] {
    return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
  });
}

// The forms of a gradient in float32 or float64; half precision is left to oneDNN.
MinimalForms gradient_forms(const PyramidShape& shape, const std::vector<BranchParams>& branches,
                            const Operands& operands, const Tensor& grad, int64_t polyphase) {
  if (dtype_of(grad) != operands.compute_dtype()) return MinimalForms(branches.size());
  return minimal_forms(shape, branches, operands, Polyphase(polyphase), false);
}

// Of some branches the sum of the gradients of the input, channels_last, by oneDNN.
Tensor grad_input_directly(const Tensor& grad, const PyramidShape& shape,
                           const std::vector<Tensor>& weights, const std::vector<int64_t>& rates,
                           const std::vector<size_t>& listed) {
  Tensor source = channels_last_copy(grad);
  // Of the missing operand convolution_backward reads the shape alone.
  const Tensor like = empty_image(grad, shape.batch, shape.channels, shape, true);
  Tensor sum;
  int64_t first = 0;
  for (size_t b = 0, done = 0; b < weights.size(); ++b) {
    if (done < listed.size() && listed[done] == b) {
      const Tensor part =
          channels_last_copy(torch::stable::narrow(source, 1, first, weights[b].size(0)));
      const Tensor one = convolution_gradient(
          part, like, live_taps(weights[b], shape, &rates[2 * b]), &rates[2 * b], false);
      // there is no stable add
      sum = done++ == 0 ? one
                        : with_memory(one, [&] { return torch::stable::subtract(sum, one, -1.0); });
    }
    first += weights[b].size(0);
  }
  return sum;
}

// Adds the branches that have a form to `sum`; the first of them writes it if it is `fresh`.
void add_grad_input(const Tensor& grad, const PyramidShape& shape,
                    const std::vector<BranchParams>& branches, const MinimalForms& forms,
                    const std::vector<Tensor>& weights, const Tensor& sum, bool fresh) {
  for (size_t b = 0; b < forms.size(); ++b) {
    if (!forms[b]) continue;
    Operands operands(grad);  // of one branch, whose matrices are freed with it
    const Tensor matrices = combine_taps(*forms[b], weights[b], true, operands);
    const bool wide = operands.double_precision();
    const PyramidShape of_grad{shape.batch, branches[b].out_channels, shape.height, shape.width};
    const Image x = channels_from(image_of(grad), branches[b].channel);
    const LooseOutputs loose =
        loose_outputs({forms[b]}, {energies_of_taps(matrices)}, pixel_energies(x, of_grad, wide),
                      shape.batch, wide)[0];
    PolyphaseParams p;
    p.x = x;
    p.channels = of_grad.channels;
    p.height = shape.height;
    p.width = shape.width;
    p.out_channels = shape.channels;
    p.weights = matrices.data_ptr();
    p.out = image_of(sum);
    p.accumulate = !fresh;
    fresh = false;
    run_polyphase({{p, forms[b].get(), &loose}}, shape.batch, wide);
    if (loose.marked.empty()) continue;

    std::vector<BranchParams> mirrored{branches[b]};
    mirrored[0].out_channels = shape.channels;
    set_weight(operands, mirrored[0], torch::stable::transpose(weights[b], 0, 1));
    mirrored[0].weight = operands.offset(
        mirrored[0].weight, (weights[b].size(2) * weights[b].size(3) - 1) * mirrored[0].weight_tap);
    mirrored[0].weight_tap *= -1;
    PyramidParams direct = params_of(x, of_grad, mirrored);
    direct.out = p.out;
    direct.accumulate = p.accumulate;
    run_marked(direct, mirrored[0], loose.marked, wide);
  }
}

Tensor grad_input(const Tensor& grad, std::vector<Tensor> weights, std::vector<int64_t> rates,
                  bool /*tf32*/, int64_t polyphase) {
  const PyramidShape shape = check_dense_grad_input(grad, weights, rates, kCpuLimits);
  check_polyphase("atrous_pyramid", polyphase);
  const bool channels_last = is_channels_last(grad) || any_channels_last(weights);
  Tensor result = empty_image(grad, shape.batch, shape.channels, shape, channels_last);
  if (shape.batch == 0) return result;
  std::vector<BranchParams> branches = dense_branches(weights, rates);
  assign_columns(branches);
  const MinimalForms forms = gradient_forms(shape, branches, Operands(grad), grad, polyphase);
  std::vector<size_t> direct;
  for (size_t b = 0; b < forms.size(); ++b) {
    if (!forms[b]) direct.push_back(b);
  }
  Tensor sum;
  if (direct.empty()) {
    sum = is_channels_last(result) ? result
                                   : empty_image(grad, shape.batch, shape.channels, shape, true);
  } else {
    sum = grad_input_directly(grad, shape, weights, rates, direct);
  }
  add_grad_input(grad, shape, branches, forms, weights, sum, direct.empty());
  if (sum.data_ptr() != result.data_ptr()) torch::stable::copy_(result, sum);
  return result;
}

std::vector<Tensor> grad_weight(const Tensor& grad, const Tensor& x, std::vector<int64_t> kernels,
                                std::vector<int64_t> out_channels, std::vector<int64_t> rates,
                                bool /*tf32*/, int64_t polyphase) {
  const PyramidShape shape =
      check_dense_grad_weight(grad, x, kernels, out_channels, rates, kCpuLimits);
  check_polyphase("atrous_pyramid", polyphase);
  std::vector<Tensor> result;
  for (size_t b = 0; b < out_channels.size(); ++b) {
    result.push_back(empty_of(x, {out_channels[b], x.size(1), kernels[2 * b], kernels[2 * b + 1]}));
    if (shape.batch == 0) torch::stable::zero_(result.back());
  }
  if (shape.batch == 0) return result;
  // In bfloat16 oneDNN's weight gradient of channels_last operands whose channels are no multiple
  // of 16 reads and writes out of bounds.
  const bool unsafe = x.scalar_type() == ScalarType::BFloat16 && x.size(1) % 16 != 0;
  const auto copy = [&](const Tensor& t) {
    return unsafe ? with_memory(t, [&] { return torch::stable::contiguous(t); })
                  : channels_last_copy(t);
  };
  Tensor source = copy(grad);
  const Tensor input = copy(x);
  std::vector<BranchParams> branches = dense_branches(result, rates);
  assign_columns(branches);
  const Operands operands(x);
  const MinimalForms forms = gradient_forms(shape, branches, operands, grad, polyphase);
  std::vector<double> pixels;
  if (any_minimal(forms)) {
    pixels = pixel_energies(image_of(input), shape, operands.double_precision());
  }
  for (size_t b = 0; b < result.size(); ++b) {
    const int64_t first = branches[b].channel;
    if (forms[b]) {
      const Image part = channels_from(image_of(source), first);
      const bool wide = operands.double_precision();
      const PyramidShape of_grad{shape.batch, out_channels[b], shape.height, shape.width};
      const std::vector<double> grads = pixel_energies(part, of_grad, wide);
      if (!is_loose(*forms[b], pixels, grads, shape.batch, wide)) {
        run_grad_weight(*forms[b], image_of(input), part, shape.batch, result[b], wide);
        clear_zeros(*forms[b], image_of(input), pixels, part, grads, shape.batch, result[b], wide);
        continue;
      }
    }
    const Tensor part = copy(torch::stable::narrow(source, 1, first, out_channels[b]));
    // Of the other taps oneDNN's gradient in bfloat16 is what was in memory, from sizes of 5 on.
    Tensor live = live_taps(result[b], shape, &rates[2 * b]);
    const Tensor one = convolution_gradient(part, input, live, &rates[2 * b], true);
    if (live.numel() < result[b].numel()) torch::stable::zero_(result[b]);
    torch::stable::copy_(live, one);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CPU, m) {
  m.impl("atrous_pyramid_grad_input", ASPP_BOX(&grad_input));
  m.impl("atrous_pyramid_grad_weight", ASPP_BOX(&grad_weight));
}

}  // namespace aspp
