// SPDX-License-Identifier: BSD-3-Clause
#include "tile.h"

#include "print.h"

namespace aspp::plan {

void check_tile(const Tile& tile) {
  require(tile.m >= 1 && tile.n >= 1 && tile.k >= 1 && tile.tail >= 1,
          "a tile must be >= 1 on each side but is ", tile);
  require(tile.m % tile.tail == 0, "a tile's tail must divide its m = ", tile.m, " but is ",
          tile.tail);
}

Index channel_blocks(const Problem& problem, Index branch, Pass pass, const Tile& tile) {
  const bool sums_inputs = pass == Pass::forward;
  return ceil_div(sums_inputs ? problem.in_channels : problem.branches[branch].out_channels,
                  tile.k);
}

Index k_blocks(const Problem& problem, Pass pass, const Region& region, const Tile& tile) {
  if (pass == Pass::grad_weight) return ceil_div(problem.batch * region.area(), tile.k);
  Index blocks = 0;
  for (const TapBlock& block : region.live)
    blocks += block.size() * channel_blocks(problem, block.branch, pass, tile);
  return blocks;
}

Index paid_pixels(Index pixels, const Tile& tile) {
  return round_up(pixels, tile.tail, "the pixels of a region in whole tiles");
}

Index work(const Problem& problem, Pass pass, const std::vector<Region>& regions,
           const Tile& tile) {
  Index sum = 0;
  for (const Region& region : regions) {
    const Index own = multiply(paid_pixels(problem.batch * region.area(), tile),
                               k_blocks(problem, pass, region, tile), "the work of a region");
    sum = add(sum, own, "the work of all regions");
  }
  return sum;
}

}  // namespace aspp::plan
