// SPDX-License-Identifier: BSD-3-Clause
// What each way of computing a pyramid costs, before anything is launched.
#pragma once

#include "units.h"

namespace aspp::plan {

// In tile-taps: one tile of pixels times one tap, whatever their channels; separable's 1x1s count
// as kPointwiseTaps each. `tails`: with the last tile of a region cut to a multiple of the tail
// instead of a whole tile.
struct Cost {
  double dense = 0;    // every tap of every tile, linear order
  double linear = 0;   // without the (tile, tap) pairs that are wholly dead
  double regions = 0;  // exact rectangles
  double regions_tails = 0;
  double merged = 0;  // the best merge of them
  double merged_tails = 0;
  double ideal = 0;  // live multiply-adds alone
};

// Of forward and separable (each branch into its own output) or grad_input (all branches into one),
// in tiles of `pixels`, tails in steps of `tail`. Raises for grad_weight.
Cost cost(const Problem& problem, Pass pass, Index pixels = 128, Index tail = 64);

// Of grad_weight, in block-taps: one block of `pixels` of the sum times one tap.
struct WeightCost {
  double dense = 0;  // every pixel of the batch for every tap
  double live = 0;   // the tap's rectangle in whole blocks
  double ideal = 0;  // its pixels
};

WeightCost weight_cost(const Problem& problem, Index pixels = 64);

}  // namespace aspp::plan
