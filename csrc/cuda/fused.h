// SPDX-License-Identifier: BSD-3-Clause
// The separable pyramid in one launch, which stores nothing between the convolutions.
#pragma once

#include "stored.h"

namespace aspp::cuda {

// Computes out [P, out.pitch] if that is chosen (fused_choice.h); returns whether it was.
// ASPP_EXT_SEPARABLE=fused or stored, for tests and measurements, chooses instead; separable_way
// changes it.
bool fused_forward(Operands& operands, const SeparableProblem& problem, const Rows& out);

}  // namespace aspp::cuda
