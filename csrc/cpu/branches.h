// SPDX-License-Identifier: BSD-3-Clause
// What the CPU bindings share: checks of branch lists, branch descriptions, and how results leave.
#pragma once

#include <vector>

#include "../checks.h"
#include "kernels/kernels.h"
#include "operands.h"

namespace aspp {

// Kernels larger than this are refused by the CPU kernels (their tap lists live on the stack).
inline constexpr int64_t kMaxKernel = 63;

PyramidShape check_dense(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
                         const std::vector<int64_t>& rates);
PyramidShape check_separable(const char* op, const Tensor& x, const std::vector<Tensor>& depthwise,
                             const std::vector<Tensor>& pointwise,
                             const std::vector<int64_t>& rates);
void check_between(const char* op, const Tensor& x, const std::vector<Tensor>& scale,
                   const std::vector<Tensor>& shift, const std::vector<Tensor>& depthwise);
void check_grad(const char* op, const Tensor& grad, const Tensor& x, const PyramidShape& shape);

// `pointwise` may be empty: then the branches have no weights yet.
std::vector<BranchParams> separable_branches(Operands& operands,
                                             const std::vector<Tensor>& depthwise,
                                             const std::vector<Tensor>& pointwise,
                                             const std::vector<int64_t>& rates);
BranchParams dense_branch(Operands& operands, const Tensor& weight, int64_t rate_h, int64_t rate_w);

// Assigns columns and describes the problem; out, epilogue and projection are left to the caller.
PyramidParams params_of(const Tensor& x, const PyramidShape& shape,
                        std::vector<BranchParams>& branches);
void set_epilogue(PyramidParams& params, Operands& operands,
                  const std::vector<BranchParams>& branches, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift, bool relu);

bool any_channels_last(const std::vector<Tensor>& weights);
Tensor empty_image(const Tensor& like, int64_t batch, int64_t channels, const PyramidShape& shape,
                   bool channels_last);

Tensor empty_as(const Tensor& like);  // contiguous

// Accumulated rows in the compute type -> a contiguous tensor with `like`'s shape and dtype.
Tensor depthwise_gradient(const Tensor& like, const void* rows, bool wide);  // [taps, padded C]
Tensor pointwise_gradient(const Tensor& like, const void* rows, bool wide);  // [C, padded O]
Tensor vector_gradient(const Tensor& like, const void* row, bool wide);      // [padded C]

}  // namespace aspp
