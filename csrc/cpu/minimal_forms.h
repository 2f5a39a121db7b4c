// SPDX-License-Identifier: BSD-3-Clause
// Which dense branches are computed by minimal filtering, in which form, with which weights.
#pragma once

#include <memory>
#include <vector>

#include "../plan/noise.h"
#include "../plan/polyphase.h"
#include "branches.h"

namespace aspp {

// The two axes of a branch on maps of one size.
struct MinimalForm {
  plan::MinimalAxis rows, columns;
  plan::Axis row_axis, column_axis;
  // The share of an image's outputs that may be computed directly besides; more cost more than all.
  double most_loose = 1;

  int64_t products() const { return int64_t(rows.products.size() * columns.products.size()); }
  int64_t matrices() const { return int64_t(rows.weights.size() * columns.weights.size()); }
};
using MinimalForms = std::vector<std::shared_ptr<const MinimalForm>>;  // null: directly

// The operators' argument `polyphase`.
enum class Polyphase : int64_t { never, by_cost, always };

// Of each dense branch the form in which it costs less than directly, if there is one, or the
// cheapest one always; none where products are bfloat16, in which combinations of inputs lose too
// many digits. `prepared`: the weights' matrices need not be made; then the form is that of one
// image, so that matrices serve batches of any size. Forms are kept for the calls to come.
MinimalForms minimal_forms(const PyramidShape& shape, const std::vector<BranchParams>& branches,
                           const Operands& operands, Polyphase polyphase, bool prepared);
bool any_minimal(const MinimalForms& forms);
bool all_minimal(const MinimalForms& forms);

// Of each branch with a form its weight as the form takes it, in x's compute type: the matrices
// [matrices, C, padded O] and behind them the norms of the nine taps; empty of the others.
std::vector<Tensor> minimal_weights(const MinimalForms& forms, const std::vector<Tensor>& weights,
                                    Operands& operands);
// Refuses what minimal_weights would not have returned.
void check_prepared(const char* op, const MinimalForms& forms, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& prepared, const Operands& operands);

plan::TapEnergies energies_of_taps(const Tensor& matrices);

// The map from a weight [O, C, kh, kw] to the form's matrices, without the weight.
MinimalWeights taps_to_matrices(const MinimalForm& form, int64_t out_channels, int64_t channels,
                                int64_t kernel_h, int64_t kernel_w);
// The matrices of one weight; `transposed` are those of the gradient of the input: O and C swapped,
// taps mirrored.
Tensor combine_taps(const MinimalForm& form, const Tensor& weight, bool transposed,
                    Operands& operands);

}  // namespace aspp
