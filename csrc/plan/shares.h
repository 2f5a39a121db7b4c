// SPDX-License-Identifier: BSD-3-Clause
// Work of equal length for every processor where there are too few units, or too long ones.
#pragma once

#include "units.h"

namespace aspp::plan {

// Cuts the units of a plan, in their order, into at most `workers` shares that take as little time
// as they can: a worker's share ends inside a unit, whose sum the next worker goes on with (Osama
// et al., "Stream-K", arXiv 2301.03598). No slice is shorter than `shortest_slice` k blocks.
std::vector<Unit> cut_into_shares(const Plan& plan, Index workers, Index shortest_slice);

}  // namespace aspp::plan
