// SPDX-License-Identifier: BSD-3-Clause
// Runs branches by minimal filtering on all threads.
#pragma once

#include "minimal_forms.h"

namespace aspp {

// Seconds of all threads together.
struct MinimalTimes {
  double inputs = 0, products = 0, outputs = 0;
};

// One pass of one branch. False where an output is not finite: then the caller has to compute the
// branch directly (see PolyphaseForward::run).
struct MinimalRun {
  PolyphaseParams params;
  const MinimalForm* form = nullptr;
  bool finite = true;
  MinimalTimes* times = nullptr;  // or where they go
};
void run_polyphase(std::vector<MinimalRun>& runs, int64_t batch, bool double_precision);

// Computes the branches of params that have a form. Returns those that are left to be computed
// directly: without a form, or with an output that is not finite.
std::vector<size_t> run_minimal(const PyramidParams& params, const MinimalForms& forms,
                                const std::vector<Tensor>& matrices, const Operands& operands,
                                std::vector<MinimalTimes>* times = nullptr);

// The gradient of one branch's weight, [O, C, kh, kw] contiguous in the compute type, from images
// of its input and of its output's gradient. Whether it is finite.
bool run_grad_weight(const MinimalForm& form, const Image& x, const Image& grad, int64_t batch,
                     const Tensor& grad_weight, bool double_precision);

}  // namespace aspp
