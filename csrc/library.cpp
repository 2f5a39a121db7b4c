// SPDX-License-Identifier: BSD-3-Clause
// Every operator's schema. Fakes, gradients and autocast are in aspp_ext/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(aspp_ext, m) {
  // x [N, C, H, W], weights[b] [O_b, C, kh_b, kw_b], rates (rate_h, rate_w) per branch,
  // scale [sum O], shift [sum O] or [N, sum O] -> [N, sum O, H, W]; tf32: float32 products may be
  // rounded to TF32 where the device has it; polyphase: the CPU computes 3-tap axes by minimal
  // filtering, which multiplies less and rounds a little more: 0: never, 1: where it costs less,
  // 2: wherever it can
  m.def(
      "atrous_pyramid(Tensor x, Tensor[] weights, int[] rates, Tensor? scale=None, "
      "Tensor? shift=None, bool relu=False, bool tf32=False, int polyphase=1) -> Tensor");
  // CUDA. What a training batch norm wants: the result, and of each channel the mean and the sum of
  // squared differences from it [sum O], in float32, or float64 for float64
  m.def(
      "atrous_pyramid_statistics(Tensor x, Tensor[] weights, int[] rates, bool tf32=False) "
      "-> (Tensor, Tensor, Tensor)");
  // grad [N, sum O, H, W] -> [N, C, H, W]
  m.def(
      "atrous_pyramid_grad_input(Tensor grad, Tensor[] weights, int[] rates, bool tf32=False, "
      "int polyphase=1) -> Tensor");
  // kernels (kh, kw) per branch, out_channels O_b -> gradients [O_b, C, kh_b, kw_b]
  m.def(
      "atrous_pyramid_grad_weight(Tensor grad, Tensor x, int[] kernels, int[] out_channels, "
      "int[] rates, bool tf32=False, int polyphase=1) -> Tensor[]");
  // Per branch the weight as minimal filtering of maps of that size takes it, or an empty tensor
  // where the branch is computed directly
  m.def(
      "polyphase_weights(Tensor[] weights, int[] rates, int height, int width, int polyphase=1) "
      "-> Tensor[]");
  // For benchmarks: runs the branches that minimal filtering computes on the CPU, their weights
  // prepared -> float64 [branches, 3], the seconds of all threads that combining inputs, products
  // and combining outputs took; NaN of the others
  m.def("polyphase_times(Tensor x, Tensor[] weights, int[] rates, int polyphase=1) -> Tensor");
  // depthwise[b] [C, 1, kh_b, kw_b], or empty: branch b is a plain 1x1 convolution;
  // pointwise[b] [O_b, C, 1, 1]; between_*[b] [C], or empty: nothing between;
  // the two lists themselves may be empty; tf32 as above, of the products with pointwise
  m.def(
      "atrous_separable_pyramid(Tensor x, Tensor[] depthwise, Tensor[] pointwise, int[] rates, "
      "Tensor[] between_scale, Tensor[] between_shift, bool between_relu=False, "
      "Tensor? scale=None, Tensor? shift=None, bool relu=False, bool tf32=False) -> Tensor");
  // -> gradients of x, depthwise, pointwise, between_scale, between_shift; what is not needed is an
  // empty tensor or an empty list
  m.def(
      "atrous_separable_pyramid_backward(Tensor grad, Tensor x, Tensor[] depthwise, "
      "Tensor[] pointwise, int[] rates, Tensor[] between_scale, Tensor[] between_shift, "
      "bool between_relu, bool need_x, bool need_depthwise, bool need_pointwise, "
      "bool need_between, bool tf32=False) "
      "-> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])");
  // CUDA, the steps of a training batch norm between depthwise and pointwise. Vectors [branches *
  // C] are in float32, or float64 for float64; what a plain branch has in them is zero or not read.
  // Of the depthwise results e: the mean, the sum of squared differences from it and, with store,
  // e of each branch with a depthwise weight [N, C, H, W], channels_last
  m.def(
      "atrous_depthwise_statistics(Tensor x, Tensor[] depthwise, int[] rates, bool store=False) "
      "-> (Tensor, Tensor, Tensor[])");
  // scale and shift [branches * C]: what is between; stored: as above, or empty
  m.def(
      "atrous_separable_norm(Tensor x, Tensor[] depthwise, Tensor[] pointwise, int[] rates, "
      "Tensor scale, Tensor shift, bool relu, Tensor[] stored, bool tf32=False) -> Tensor");
  // With m the gradient of e * scale + shift: the sums of m * e and of m [branches * C]
  m.def(
      "atrous_separable_norm_sums(Tensor grad, Tensor x, Tensor[] depthwise, Tensor[] pointwise, "
      "int[] rates, Tensor scale, Tensor shift, bool relu, bool tf32=False) -> (Tensor, Tensor)");
  // The gradient of e being m * scale + a + b * e, those of x, depthwise and pointwise; what is not
  // needed is an empty tensor or an empty list
  m.def(
      "atrous_separable_norm_backward(Tensor grad, Tensor x, Tensor[] depthwise, "
      "Tensor[] pointwise, int[] rates, Tensor scale, Tensor shift, bool relu, Tensor a, Tensor b, "
      "bool need_x, bool need_depthwise, bool need_pointwise, bool tf32=False) "
      "-> (Tensor, Tensor[], Tensor[])");
  // The folded head: shift [sum O], pool_weight [Q, C], pool_shift [Q],
  // project_weight [P, sum O + Q], project_shift [P] or [N, P] -> [N, P, H, W], or without both
  // [N, sum O, H, W], the branches alone; prepared: polyphase_weights of weights for x's size and
  // the same polyphase, without which each call transforms them itself; channels_last: the result's
  // memory format, else x's; relu: of the branches and of the pooled one
  m.def(
      "aspp_inference(Tensor x, Tensor[] depthwise, Tensor[] weights, int[] rates, Tensor shift, "
      "Tensor? pool_weight, Tensor? pool_shift, Tensor? project_weight, Tensor? project_shift, "
      "int polyphase=1, Tensor[]? prepared=None, bool? channels_last=None, bool relu=True, "
      "bool project_relu=True) -> Tensor");
  // CPU. Of each tensor 64 bits that change with any of its bytes, its sizes, strides or dtype:
  // int64 [tensors]
  m.def("checksums(Tensor[] tensors) -> Tensor");
  // CPU, of channels_last maps y [N, C, H, W] in float32 or float64: the mean [C] over N, H and W
  // and the sum of squared differences from it
  m.def("channel_statistics(Tensor y) -> (Tensor, Tensor)");
  // ... and with the gradient of y the sums of grad and of grad * (y - mean)
  m.def("channel_sums(Tensor grad, Tensor y, Tensor mean) -> (Tensor, Tensor)");
  // ... and the gradient of y through the norm: scale is invstd * weight, total and product are
  // sums
  m.def(
      "channel_gradient(Tensor grad, Tensor y, Tensor mean, Tensor invstd, Tensor scale, "
      "Tensor total, Tensor product) -> Tensor");
  m.def("cpu_isa() -> str");
  // CPU, for tests and measurements, while nothing else is called: the kernels' instruction set, as
  // ASPP_EXT_ISA would have been when the library was loaded, "" for the best -> what it was
  m.def("use_cpu_isa(str isa) -> str");
  // CUDA, for tests and measurements: the separable forward's way in this process, as
  // ASPP_EXT_SEPARABLE was when the library was loaded, or "" -> what it was
  m.def("separable_way(str way) -> str");
}
