// SPDX-License-Identifier: BSD-3-Clause
// The block a kernel computes at a time, and what a set of regions costs in such blocks.
#pragma once

#include <vector>

#include "region.h"

namespace aspp::plan {

// One output block of a GEMM, m x n, taken k deep at a time. In forward m counts pixels, n output
// channels and k input channels of one tap; in grad_input n counts input and k output channels; in
// grad_weight m counts output channels, n input channels and k pixels; in separable k counts input
// channels, each with all its taps. The last tile of a region may be shorter, in steps of `tail`.
struct Tile {
  Index m = 128;
  Index n = 256;
  Index k = 64;
  Index tail = 128;
};

// Throws unless all are >= 1 and tail divides m.
void check_tile(const Tile& tile);

// The channels that one tap of `branch` (in separable: its 1x1) sums over, in blocks of tile.k.
Index channel_blocks(const Problem& problem, Index branch, Pass pass, const Tile& tile);

// The length of K for a region, in blocks of tile.k: the taps in order, each over its channels; in
// separable the channels alone, as a block does all taps of its channels before the product.
Index k_blocks(const Problem& problem, Pass pass, const Region& region, const Tile& tile);

// The price of separable's matrix product in taps of depthwise work: tensor cores need as long for
// one of 128 x 256 x 64 as the others for 4 to 7 taps of its input, and part of that overlaps.
inline constexpr Index kPointwiseTaps = 4;

// What costs are counted in: the time per pixel of a k block's product is 1, in separable
// kPointwiseTaps.
Index product_cost(Pass pass);

// The time per pixel of a k block of `region`: its product and, in separable, its taps.
Index block_cost(Pass pass, const Region& region);

// The pixels paid for `pixels` of them, in pixels: whole tiles and one tail.
Index paid_pixels(Index pixels, const Tile& tile);

// The cost of `pixels` of a region in one tile or more: paid pixels * k blocks * block_cost.
Index work(const Problem& problem, Pass pass, const Region& region, Index pixels, const Tile& tile);

// The cost of regions over the batch.
Index work(const Problem& problem, Pass pass, const std::vector<Region>& regions, const Tile& tile);

}  // namespace aspp::plan
