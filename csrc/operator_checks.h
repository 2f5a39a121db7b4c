// SPDX-License-Identifier: BSD-3-Clause
// The checks of whole operators, which every device's binding makes before anything else.
#pragma once

#include "checks.h"

namespace aspp {

// What an implementation cannot do although the operator could.
struct Limits {
  const char* device;            // "on the CPU"
  int64_t kernel = INT64_MAX;    // size on an axis
  int64_t branches = INT64_MAX;  // in a pyramid
  int64_t pixels = INT64_MAX;    // N * H * W
};

PyramidShape check_dense(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                         const std::vector<int64_t>& rates, const Limits& limits);
PyramidShape check_dense_grad_input(const Tensor& grad, const std::vector<Tensor>& weights,
                                    const std::vector<int64_t>& rates, const Limits& limits);
PyramidShape check_dense_grad_weight(const Tensor& grad, const Tensor& x,
                                     const std::vector<int64_t>& kernels,
                                     const std::vector<int64_t>& out_channels,
                                     const std::vector<int64_t>& rates, const Limits& limits);

PyramidShape check_separable(const char* op, const Tensor& x, const std::vector<Tensor>& depthwise,
                             const std::vector<Tensor>& pointwise,
                             const std::vector<int64_t>& rates, const Limits& limits);
// The depthwise convolutions alone, of a batch that has statistics.
PyramidShape check_depthwise(const char* op, const Tensor& x, const std::vector<Tensor>& depthwise,
                             const std::vector<int64_t>& rates, const Limits& limits);
// [branches * C] in the type of sums: float64 for float64, else float32.
void check_channel_vector(const char* op, const char* name, const Tensor& v, const Tensor& x,
                          size_t branches);
// Empty, or [N, C, H, W] of each branch with a depthwise weight.
void check_stored(const char* op, const std::vector<Tensor>& stored, const Tensor& x,
                  const std::vector<Tensor>& depthwise);
void check_between(const char* op, const Tensor& x, const std::vector<Tensor>& scale,
                   const std::vector<Tensor>& shift, const std::vector<Tensor>& depthwise);
void check_grad(const char* op, const Tensor& grad, const Tensor& x, const PyramidShape& shape);

}  // namespace aspp
