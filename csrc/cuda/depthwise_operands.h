// SPDX-License-Identifier: BSD-3-Clause
// From the separable operators' arguments to what their kernels read in front of the 1x1s.
#pragma once

#include "depthwise.h"
#include "operands.h"

namespace aspp::cuda {

// One per branch, in the operator's order; what they point at lives as long as `operands`. Rates
// are (rate_h, rate_w) per branch. between_scale and between_shift are empty lists, or have one
// vector [C] per branch, which is empty where nothing is between: in the dtype of x, or float32.
std::vector<DepthwiseBranch> depthwise_branches(Operands& operands, int64_t channels,
                                                const std::vector<Tensor>& depthwise,
                                                const std::vector<int64_t>& rates,
                                                const std::vector<Tensor>& between_scale,
                                                const std::vector<Tensor>& between_shift);

// Its parts, one launch each. Sets `filter` of the branches that have taps, of [C, 1, kh, kw].
void set_filters(Operands& operands, int64_t channels, const std::vector<Tensor>& depthwise,
                 std::vector<DepthwiseBranch>& branches);
// Two vectors [C] per branch as [2, padded C] of type Sum; null where they are empty.
std::vector<const void*> pack_pairs(Operands& operands, int64_t channels,
                                    const std::vector<Tensor>& first,
                                    const std::vector<Tensor>& second);

DepthwiseShape depthwise_shape(const Operands& operands, const PyramidShape& x);

}  // namespace aspp::cuda
