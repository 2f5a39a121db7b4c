// SPDX-License-Identifier: BSD-3-Clause
// Fewer, larger regions where that costs less: a few zeros against a few half-empty tiles.
#pragma once

#include <vector>

#include "tile.h"

namespace aspp::plan {

// The cheapest cover of the map by rectangles of the group's grid, each with the union of its
// cells' taps (exact: what a tap reads outside is zero). Ties stay split, so that nothing is padded
// in vain. The search knows straight cuts and five-piece pinwheels, at any depth: all that the grid
// of a 3x3 kernel allows. Grids too large to search keep their exact regions.
std::vector<Region> merged_regions(const Problem& problem, const Group& group, const Tile& tile);

}  // namespace aspp::plan
