// SPDX-License-Identifier: BSD-3-Clause
// What rounding does to each result of a branch, by minimal filtering and directly.
//
// A sum of products a_i * b_i is rounded to within some eps * sqrt(sum a_i^2 b_i^2), by whichever
// order: the noise of the result, whose square is counted here, without the factor. Directly the
// sum runs over the live taps of an output. By minimal filtering it runs over the products that the
// output is made of, and reaches inputs that no tap of the output reads: where these are much
// larger, so is the noise.
//
// Channels are summed up first: for what is random within a pixel and within a tap, noise is
// proportional to the energies (sums of squares) of the two. So noise tells of pixels or taps that
// are unlike each other, and not of single channels within them.
#pragma once

#include <span>
#include <vector>

#include "minimal.h"

namespace aspp::plan {

// Of the pairs of first, centre and last tap of rows and of columns; 0 where there is no such tap.
using TapEnergies = std::array<double, 9>;

// Squares, per output.
struct Noise {
  std::vector<double> minimal, direct;
};

// One branch: its axes, and the form of each.
struct NoiseForm {
  const MinimalAxis& rows;
  const MinimalAxis& columns;
  Axis row_axis, column_axis;
};

// Of a tap among the nine.
constexpr Index place_of(const Axis& rows, Index i, const Axis& columns, Index j) {
  return 3 * (rows.kernel == 3 ? i : 1) + (columns.kernel == 3 ? j : 1);
}

// body(tap, output, input) for every pair that a live tap joins, as indices into maps.
template <typename F>
void for_each_live_pair(const NoiseForm& form, F&& body) {
  const auto& [height, kernel_h, rate_h] = form.row_axis;
  const auto& [width, kernel_w, rate_w] = form.column_axis;
  for (Index i = 0; i < kernel_h; ++i)
    for (Index j = 0; j < kernel_w; ++j) {
      const Interval rows = live_positions(form.row_axis, i);
      const Interval columns = live_positions(form.column_axis, j);
      const Index tap = place_of(form.row_axis, i, form.column_axis, j);
      const Index shift = offset(form.row_axis, i) * width + offset(form.column_axis, j);
      for (Index y = rows.begin; y < rows.end; ++y)
        for (Index x = columns.begin; x < columns.end; ++x)
          body(tap, y * width + x, y * width + x + shift);
    }
}

// Of outputs [height, width], for energies of the inputs [height, width] and of the taps.
Noise output_noise(const NoiseForm& form, std::span<const double> inputs, const TapEnergies& taps);

// Of the gradients of the nine taps.
struct TapNoise {
  TapEnergies minimal{}, direct{};
  TapEnergies fourth{};  // the squares of direct's terms: few large ones are rounded seldom
};
// For energies of the inputs and of the outputs' gradient; to be added up over a batch.
TapNoise tap_noise(const NoiseForm& form, std::span<const double> inputs,
                   std::span<const double> grads);

}  // namespace aspp::plan
