// SPDX-License-Identifier: BSD-3-Clause
// Minimal filtering of both axes of a branch: what it costs beside computing every live tap.
//
// Each product of the rows with each of the columns is one pixel of one GEMM: of the inputs'
// combination with the matrix [in_channels, out_channels] that combines the taps, one for each pair
// of weights. The gradient of the input mirrors the taps and has the same counts.
#pragma once

#include <optional>
#include <string>

#include "minimal.h"
#include "problem.h"

namespace aspp::plan {

// GEMM rows of an image that are computed together, at most: long chunks read the matrices seldom,
// short ones keep their sums in the caches.
inline constexpr Index kChunkRows = 3072;

// In GEMM rows: one row is in_channels * out_channels multiply-adds. The defaults are
// estimates from timings of the CPU's kernels on an AVX-512 machine; `python -m
// benchmarks.polyphase` holds what they predict against what it measures.
struct PolyphaseCosts {
  double transform = 30;  // combining a channel of a row, in multiply-adds; inputs and outputs
  double matrix = 5;      // reading a matrix, for each chunk
  double prepare = 50;    // combining the taps to a matrix
  double direct = 0.05;   // what a row of a live tap costs beyond its multiply-adds
  double hold = 10;       // what its memory is worth: a prepared matrix has to save so much
  bool prepared = true;   // the matrices outlive the call: hold them instead of prepare
};

struct PolyphaseForm {
  Blocks rows;
  Blocks columns;
  Index row_products = 0;
  Index column_products = 0;
  Index matrices = 0;

  Index products() const { return row_products * column_products; }  // GEMM rows of an image
};

// The cheapest form and what it costs for the whole batch, 0 where there is none.
struct PolyphaseChoice {
  std::optional<PolyphaseForm> form;
  double polyphase = 0;
  double direct = 0;
  std::string why_not;  // a sentence where there is no form

  bool is_polyphase() const { return form && polyphase < direct; }
};

PolyphaseChoice choose_polyphase(const Problem& problem, Index branch,
                                 const PolyphaseCosts& costs = {});

}  // namespace aspp::plan
