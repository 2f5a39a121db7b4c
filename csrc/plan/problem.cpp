// SPDX-License-Identifier: BSD-3-Clause
#include "problem.h"

#include "print.h"

namespace aspp::plan {
namespace {

constexpr std::string_view kPassNames[] = {"forward", "grad_input", "grad_weight", "separable"};

void check_branch(const Branch& branch, Index index, Index height, Index width) {
  const auto& [kernel, rate, out_channels] = branch;
  const std::string label = sentence("branches[", index, "]");
  require(kernel.h >= 1 && kernel.w >= 1 && kernel.h % 2 == 1 && kernel.w % 2 == 1, label,
          ".kernel must be odd and >= 1 on each axis but is ", kernel);
  require(rate.h >= 1 && rate.w >= 1, label, ".rate must be >= 1 on each axis but is ", rate);
  require(out_channels >= 1, label, ".out_channels must be >= 1 but is ", out_channels);
  add(multiply(kernel.h / 2, rate.h, "the reach of a kernel"), height, "the padded height");
  add(multiply(kernel.w / 2, rate.w, "the reach of a kernel"), width, "the padded width");
}

Index tap_count(const Branch& branch) { return branch.kernel.h * branch.kernel.w; }

Axis make_axis(Index size, Index kernel, Index rate, Pass pass) {
  return {size, kernel, pass == Pass::grad_input ? -rate : rate};
}

// Over the taps of one axis, the positions where each is live.
Index live_sum(const Axis& axis) {
  const Interval taps = live_taps(axis, {0, axis.size});
  Index sum = 0;
  for (Index tap = taps.begin; tap < taps.end; ++tap) sum += live_positions(axis, tap).size();
  return sum;
}

}  // namespace

Problem::Problem(Index batch, Index height, Index width, std::vector<Branch> branches,
                 Index in_channels)
    : batch(batch),
      height(height),
      width(width),
      branches(std::move(branches)),
      in_channels(in_channels) {
  require(batch >= 0, "batch must be >= 0 but is ", batch);
  require(height >= 1, "height must be >= 1 but is ", height);
  require(width >= 1, "width must be >= 1 but is ", width);
  require(in_channels >= 1, "in_channels must be >= 1 but is ", in_channels);
  require(!this->branches.empty(), "branches must hold at least one branch but is empty");
  Index taps = 0;
  Index weights = 0;
  for (Index b = 0; b < branch_count(); ++b) {
    const Branch& branch = this->branches[b];
    check_branch(branch, b, height, width);
    const Index own = multiply(branch.kernel.h, branch.kernel.w, "the taps of a branch");
    taps = add(taps, own, "the taps of all branches");
    weights = add(weights, multiply(own, branch.out_channels, "kernel * out_channels"),
                  "the weights of all branches");
  }
  require(taps <= kMaxTaps, "the branches must have at most ", kMaxTaps, " taps together but have ",
          taps);
  const Index image = multiply(height, width, "height * width");
  // The sizes of one image are kept in range even where the batch is empty.
  const Index work = multiply(multiply(weights, in_channels, "the weights of all branches"), image,
                              "the multiply-adds of one image");
  multiply(work, batch, "the multiply-adds of the batch");
}

std::vector<Group> groups(const Problem& problem, Pass pass) {
  std::vector<Group> result;
  for (Index b = 0; b < problem.branch_count(); ++b) {
    if (pass != Pass::grad_input || result.empty()) result.push_back({pass, {}});
    result.back().branches.push_back(b);
  }
  return result;
}

Axis row_axis(const Problem& problem, Index branch, Pass pass) {
  const auto& [kernel, rate, channels] = problem.branches[branch];
  return make_axis(problem.height, kernel.h, rate.h, pass);
}

Axis col_axis(const Problem& problem, Index branch, Pass pass) {
  const auto& [kernel, rate, channels] = problem.branches[branch];
  return make_axis(problem.width, kernel.w, rate.w, pass);
}

const Branch& branch_at(const Problem& problem, Index branch) {
  if (branch < 0 || branch >= problem.branch_count())
    throw std::out_of_range(
        sentence("plan: branch must be in [0, ", problem.branch_count(), ") but is ", branch));
  return problem.branches[branch];
}

Index live_pixel_taps(const Problem& problem, Index branch) {
  return live_sum(row_axis(problem, branch, Pass::forward)) *
         live_sum(col_axis(problem, branch, Pass::forward));
}

double live_share(const Problem& problem, Index branch) {
  const Index all = problem.height * problem.width * tap_count(branch_at(problem, branch));
  return static_cast<double>(live_pixel_taps(problem, branch)) / static_cast<double>(all);
}

double live_share(const Problem& problem) {
  Index live = 0;
  Index all = 0;
  for (Index b = 0; b < problem.branch_count(); ++b) {
    live += live_pixel_taps(problem, b);
    all += problem.height * problem.width * tap_count(problem.branches[b]);
  }
  return static_cast<double>(live) / static_cast<double>(all);
}

std::string_view name(Pass pass) { return kPassNames[static_cast<int>(pass)]; }

Pass pass_named(std::string_view name) {
  for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight, Pass::separable})
    if (plan::name(pass) == name) return pass;
  throw std::invalid_argument(
      sentence("plan: pass must be 'forward', 'grad_input', 'grad_weight' or 'separable' but is '",
               name, "'"));
}

}  // namespace aspp::plan
