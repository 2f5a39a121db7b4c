// SPDX-License-Identifier: BSD-3-Clause
// What the CPU bindings share: branch descriptions, and how results leave.
#pragma once

#include <vector>

#include "../operator_checks.h"
#include "../operator_results.h"
#include "kernels/kernels.h"
#include "operands.h"

namespace aspp {

// Kernels larger than this are refused by the CPU kernels (their tap lists live on the stack).
inline constexpr int64_t kMaxKernel = 63;

inline constexpr Limits kCpuLimits{"on the CPU", kMaxKernel};

// `pointwise` may be empty: then the branches have no weights yet.
std::vector<BranchParams> separable_branches(Operands& operands,
                                             const std::vector<Tensor>& depthwise,
                                             const std::vector<Tensor>& pointwise,
                                             const std::vector<int64_t>& rates);
// Without weights yet.
std::vector<BranchParams> dense_branches(const std::vector<Tensor>& weights,
                                         const std::vector<int64_t>& rates);
void set_weight(Operands& operands, BranchParams& branch, const Tensor& weight);

// The taps of a branch's weight [O, C, kh, kw] that some pixel of a map reads, around the centre.
Tensor live_taps(const Tensor& weight, const PyramidShape& map, const int64_t* rates);

// A map of many rows of a pixel or two, which make short products: it is computed with its axes
// exchanged, the same problem. From three on reading along columns costs more than that saves.
bool is_narrow(const PyramidShape& map);
inline Tensor turned(const Tensor& image) { return torch::stable::transpose(image, 2, 3); }
PyramidShape turned(PyramidShape map);
std::vector<int64_t> turned(const std::vector<int64_t>& rates);
// Of weights the live taps.
std::vector<Tensor> turned(const std::vector<Tensor>& weights, const PyramidShape& map,
                           const std::vector<int64_t>& rates);

// Assigns columns and describes the problem; out, epilogue and projection are left to the caller.
PyramidParams params_of(const Image& x, const PyramidShape& shape,
                        std::vector<BranchParams>& branches);
void set_epilogue(PyramidParams& params, Operands& operands,
                  const std::vector<BranchParams>& branches, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift, bool relu);

// Accumulated rows in the compute type -> a contiguous tensor with `like`'s shape and dtype.
Tensor depthwise_gradient(const Tensor& like, const void* rows, bool wide);  // [taps, padded C]
Tensor pointwise_gradient(const Tensor& like, const void* rows, bool wide);  // [C, padded O]
Tensor vector_gradient(const Tensor& like, const void* row, bool wide);      // [padded C]

}  // namespace aspp
