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
  const bool sums_outputs = pass == Pass::grad_input;
  return ceil_div(sums_outputs ? problem.branches[branch].out_channels : problem.in_channels,
                  tile.k);
}

Index k_blocks(const Problem& problem, Pass pass, const Region& region, const Tile& tile) {
  if (pass == Pass::grad_weight) return ceil_div(problem.batch * region.area(), tile.k);
  if (pass == Pass::separable)
    return channel_blocks(problem, region.live.front().branch, pass, tile);
  Index blocks = 0;
  for (const TapBlock& block : region.live)
    blocks += block.size() * channel_blocks(problem, block.branch, pass, tile);
  return blocks;
}

Index product_cost(Pass pass) { return pass == Pass::separable ? kPointwiseTaps : 1; }

Index block_cost(Pass pass, const Region& region) {
  if (pass != Pass::separable) return product_cost(pass);
  return product_cost(pass) + (region.paid_taps > 0 ? region.paid_taps : region.tap_count());
}

Index paid_pixels(Index pixels, const Tile& tile) {
  return round_up(pixels, tile.tail, "the pixels of a region in whole tiles");
}

Index work(const Problem& problem, Pass pass, const Region& region, Index pixels,
           const Tile& tile) {
  const Index depth = multiply(k_blocks(problem, pass, region, tile), block_cost(pass, region),
                               "the work of a region");
  return multiply(paid_pixels(pixels, tile), depth, "the work of a region");
}

Index work(const Problem& problem, Pass pass, const std::vector<Region>& regions,
           const Tile& tile) {
  Index sum = 0;
  for (const Region& region : regions)
    sum = add(sum, work(problem, pass, region, problem.batch * region.area(), tile),
              "the work of all regions");
  return sum;
}

}  // namespace aspp::plan
