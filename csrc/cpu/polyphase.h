// SPDX-License-Identifier: BSD-3-Clause
// Runs branches by minimal filtering on all threads.
#pragma once

#include "loose.h"

namespace aspp {

// Seconds of all threads together.
struct MinimalTimes {
  double inputs = 0, products = 0, outputs = 0;
};

// One pass of one branch. Loose outputs are left alone.
struct MinimalRun {
  PolyphaseParams params;
  const MinimalForm* form = nullptr;
  const LooseOutputs* loose = nullptr;
  MinimalTimes* times = nullptr;  // or where they go
};
void run_polyphase(std::vector<MinimalRun> runs, int64_t batch, bool double_precision);

// Of each branch with a form, for its weight as the form takes it; what run_minimal is told.
std::vector<LooseOutputs> loose_outputs(const PyramidParams& params, const MinimalForms& forms,
                                        const std::vector<Tensor>& matrices, bool double_precision);

// Computes the branches of params that have a form, their loose outputs directly. Returns those
// without one.
std::vector<size_t> run_minimal(const PyramidParams& params, const MinimalForms& forms,
                                const std::vector<Tensor>& matrices,
                                const std::vector<Tensor>& weights,
                                const std::vector<LooseOutputs>& loose, Operands& operands,
                                std::vector<MinimalTimes>* times = nullptr);

// All branches of params, those with a form by it.
void run_branches(const PyramidParams& params, const MinimalForms& forms,
                  const std::vector<Tensor>& matrices, const std::vector<Tensor>& weights,
                  Operands& operands);

// The gradient of one branch's weight, [O, C, kh, kw] contiguous in the compute type, from images
// of its input and of its output's gradient.
void run_grad_weight(const MinimalForm& form, const Image& x, const Image& grad, int64_t batch,
                     const Tensor& grad_weight, bool double_precision);

}  // namespace aspp
