// SPDX-License-Identifier: BSD-3-Clause
// The folded head on the CPU, in the two ways it is run.
#pragma once

#include <functional>

#include "forward.h"
#include "polyphase.h"

namespace aspp {

struct HeadShape {
  PyramidShape pyramid;
  int64_t pooled = 0, projected = 0;  // projected is 0 where there is no projection

  int64_t out_channels() const { return projected > 0 ? projected : pyramid.out_channels; }
};

// A call of aspp_inference with a projection, checked.
struct HeadCall {
  const HeadShape& head;
  const PyramidParams& params;  // of the branches, with their epilogue, without out and projection
  const std::vector<Tensor>& weights;
  const Tensor& project_weight;  // [P, sum O + Q]
  bool project_relu;
  Operands& operands;
  const Tensor& out;
  // [N, padded P] in the compute type: the pooled branch's part of the projection, and its shift
  std::function<const void*(const PixelSums&)> bias;
};

// Columns [first, first + count) of [O, K], as the [O, count, 1, 1] that Operands::weight takes.
inline Tensor as_kernel(Tensor matrix, int64_t first, int64_t count) {
  const Tensor part = torch::stable::narrow(matrix, 1, first, count);
  return torch::stable::unsqueeze(torch::stable::unsqueeze(part, 2), 3);
}

// In one pass over x: the branches of a chunk of pixels are projected while they are in cache. The
// bias, which needs all of x, joins in a last, small pass. `branches` are those of params.
void run_fused(const HeadCall& call, std::vector<BranchParams>& branches);

// With branches by minimal filtering, whose chunks are of other pixels: branches into memory, then
// their share of the projection as a 1x1 convolution, the last with the bias as its shift.
void run_stored(const HeadCall& call, const MinimalForms& forms,
                const std::vector<Tensor>& matrices);

}  // namespace aspp
