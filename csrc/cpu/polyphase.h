// SPDX-License-Identifier: BSD-3-Clause
// Dense branches by minimal filtering: their forms, their weights, and their run on all threads.
#pragma once

#include <optional>
#include <vector>

#include "../plan/polyphase.h"
#include "branches.h"

namespace aspp {

// The two axes of a branch on maps of one size.
struct MinimalForm {
  plan::MinimalAxis rows, columns;

  int64_t matrices() const { return int64_t(rows.weights.size() * columns.weights.size()); }
};
using MinimalForms = std::vector<std::optional<MinimalForm>>;

// Of each dense branch the form in which it costs less than directly, if there is one; none where
// products are bfloat16, in which combinations of inputs lose too many digits.
// ASPP_EXT_POLYPHASE=0 gives none, =always the cheapest form wherever there is one. `prepared`: the
// weights' matrices need not be made.
MinimalForms minimal_forms(const PyramidShape& shape, const std::vector<BranchParams>& branches,
                           const Operands& operands, bool prepared);
bool any_minimal(const MinimalForms& forms);
bool all_minimal(const MinimalForms& forms);

// Of each branch with a form its weight as the form's matrices, in x's compute type: [matrices, C,
// padded O]; empty of the others. Those that are `prepared` (an empty list: none) are checked and
// taken. `flipped` mirrors the taps.
std::vector<Tensor> minimal_weights(const char* op, const MinimalForms& forms,
                                    const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& prepared, Operands& operands,
                                    bool flipped = false);

// Seconds of all threads together.
struct MinimalTimes {
  double inputs = 0, products = 0, outputs = 0;
};

// Computes the branches that have a form, one after the other into out if it is to `accumulate`.
// Returns the branches that are left to be computed directly: those without a form, and those in
// which an output is not finite (see PolyphaseForward::run).
std::vector<size_t> run_minimal(const PyramidParams& params, const MinimalForms& forms,
                                const std::vector<Tensor>& matrices, const Operands& operands,
                                MinimalTimes* times = nullptr);

}  // namespace aspp
