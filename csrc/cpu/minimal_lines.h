// SPDX-License-Identifier: BSD-3-Clause
// A part of a planned axis as the kernels read it.
#pragma once

#include <vector>

#include "../plan/minimal.h"
#include "kernels/polyphase_params.h"

namespace aspp {

// Some pieces of an axis: their products in the order of their weights, what they read and write.
class AxisPart {
 public:
  AxisPart(const plan::MinimalAxis& axis, plan::Interval pieces);

  MinimalLines lines() const;
  int64_t products() const { return int64_t(weight_of_.size()); }

 private:
  struct Table {
    std::vector<int64_t> start{0}, at;
    std::vector<double> coefficient;

    void end_row() { start.push_back(int64_t(at.size())); }
    Combinations combinations() const {
      return {start.data(), at.data(), coefficient.data(), int64_t(start.size()) - 1};
    }
  };

  std::vector<int64_t> weight_of_, read_, written_, weight_begin_;
  Table inputs_, outputs_, pulled_;
  double denominator_ = 1;
};

// The axis in parts of at most `products` each, but never less than a piece; nearly equal.
std::vector<AxisPart> parts_of(const plan::MinimalAxis& axis, int64_t products);

}  // namespace aspp
