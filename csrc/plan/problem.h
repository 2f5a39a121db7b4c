// SPDX-License-Identifier: BSD-3-Clause
// What is to be computed: the shape of a pyramid, checked once.
#pragma once

#include <string_view>
#include <vector>

#include "axis.h"

namespace aspp::plan {

inline constexpr Index kMaxTaps = Index{1} << 20;     // of all branches together
inline constexpr Index kMaxEntries = Index{1} << 24;  // of any list the planner builds

struct Extent {
  Index h = 1;
  Index w = 1;
  friend constexpr auto operator<=>(const Extent&, const Extent&) = default;
};

// One atrous convolution of the pyramid: stride 1, padding rate * (kernel - 1) / 2.
struct Branch {
  Extent kernel;
  Extent rate;
  Index out_channels = 1;
};

// x [batch, in_channels, height, width]. 1-D is height 1 with kernels (1, k). The constructor
// throws std::invalid_argument (even kernel, rate < 1, size < 1, ...) or std::overflow_error
// (multiply-adds beyond 64 bits); all else here trusts a Problem that exists.
struct Problem {
  Problem(Index batch, Index height, Index width, std::vector<Branch> branches,
          Index in_channels = 1);

  Index batch;
  Index height;
  Index width;
  std::vector<Branch> branches;
  Index in_channels;

  Index pixels() const { return batch * height * width; }
  Index branch_count() const { return static_cast<Index>(branches.size()); }
};

// The three faces of the trilinear form, and the forward of the depthwise-separable pyramid: there
// a branch's kernel is depthwise, a 1x1 convolution to its out_channels follows, and a branch
// without a depthwise kernel has one of 1x1.
enum class Pass { forward, grad_input, grad_weight, separable };

// Branches that add into one output: all together in grad_input, else each alone.
struct Group {
  Pass pass = Pass::forward;
  std::vector<Index> branches;
};

std::vector<Group> groups(const Problem& problem, Pass pass);

Axis row_axis(const Problem& problem, Index branch, Pass pass);
Axis col_axis(const Problem& problem, Index branch, Pass pass);

// The branch with this index, or a sentence.
const Branch& branch_at(const Problem& problem, Index branch);

// Live multiply-adds / all multiply-adds, over the taps of one branch or of the whole pyramid.
double live_share(const Problem& problem, Index branch);
double live_share(const Problem& problem);

// The pixel-taps of one image that are live: sum over the taps of the pixels where they are.
Index live_pixel_taps(const Problem& problem, Index branch);

std::string_view name(Pass pass);
Pass pass_named(std::string_view name);

}  // namespace aspp::plan
