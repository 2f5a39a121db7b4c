// SPDX-License-Identifier: BSD-3-Clause
// Minimal filtering along one axis: an atrous convolution with fewer products than live taps.
//
// A filter of 3 taps at rate r joins the positions p, p + r, p + 2r, ... alone: r sequences, one
// for each phase p, and each is filtered without holes and with zeros around it. A sequence is cut
// into blocks, each with an algorithm whose products are (weights . taps) * (inputs . positions):
//
//                products   instead of
//   one              1          1
//   pair             3          4
//   triple           4          7      rank 4, in thirds
//   overlapped       4          6      F(2, 3), which reads the neighbours of its two positions
//
// A block that is not overlapped needs a product more for each neighbour. An overlapped block that
// begins or ends its sequence has computed the product that its neighbour needs. See Winograd,
// Arithmetic Complexity of Computations (1980), for the overlapped one.
#pragma once

#include <array>
#include <vector>

#include "axis.h"

namespace aspp::plan {

struct Term {
  Index at = 0;
  double coefficient = 0;  // a small dyadic number
};

struct MinimalProduct {
  Index weight = 0;           // into MinimalAxis::weights
  std::vector<Term> inputs;   // positions on the axis, ascending
  std::vector<Term> outputs;  // positions on the axis, ascending
};

// Positions whose outputs need no other products, products that no other positions need.
struct MinimalPiece {
  Interval products;           // into MinimalAxis::products
  std::vector<Index> outputs;  // ascending
};

// What a sequence may be cut into; one always.
struct Blocks {
  bool pair = false;
  bool triple = false;
  bool overlapped = false;
};

// An output is the sum of coefficient * product over the products that name it, / denominator.
struct MinimalAxis {
  Index denominator = 1;                       // 3 where a triple occurs, for all products
  std::vector<std::array<double, 3>> weights;  // combinations of the taps; (0, 1, 0) of one tap
  std::vector<MinimalProduct> products;        // piece by piece
  std::vector<MinimalPiece> pieces;            // by where they begin in their sequence, by phase
};

inline constexpr Index kLongestAxis = 2048;  // the lists of longer ones would take too long

// Each sequence has a cut with the fewest products; among those, one with few weights that the
// longer sequences do not have. Throws unless axis.kernel is 1 or 3, axis.rate >= 1 and axis.size
// at most kLongestAxis.
MinimalAxis minimal_axis(const Axis& axis, Blocks allowed);

// What it would have, without building it.
struct MinimalCounts {
  Index products = 0;
  Index weights = 0;
};
MinimalCounts count_minimal(const Axis& axis, Blocks allowed);

}  // namespace aspp::plan
