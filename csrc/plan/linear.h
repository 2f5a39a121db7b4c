// SPDX-License-Identifier: BSD-3-Clause
// The other order: tiles of consecutive pixels of the batch, without the taps dead in all of a
// tile.
#pragma once

#include <vector>

#include "tile.h"

namespace aspp::plan {

// Pixels of a region (in its own linear order: column, row, image) that share an output tile.
struct PixelTile {
  Index region = 0;
  Interval pixels;
};

// Regions and the tiles that they are computed in.
struct Tiling {
  std::vector<Region> regions;
  std::vector<PixelTile> tiles;
};

// Tiles of tile.m pixels, each region by itself across the batch.
Tiling region_tiling(const Problem& problem, std::vector<Region> regions, const Tile& tile);

// One "region" per different set of live taps, each spanning the map and padded; the tiles point at
// the set that holds what is live in them. The sets are unions over whole tiles, not rectangles: a
// block per run of tap rows with the same tap columns.
Tiling linear_tiling(const Problem& problem, const Group& group, const Tile& tile);

// The cost of a tiling.
Index work(const Problem& problem, Pass pass, const Tiling& tiling, const Tile& tile);

}  // namespace aspp::plan
