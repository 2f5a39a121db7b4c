// SPDX-License-Identifier: BSD-3-Clause
#include "fused.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>

#include "separable.h"

namespace aspp::cuda {
namespace {

plan::Problem plan_of(const SeparableProblem& problem) {
  std::vector<plan::Branch> branches;
  for (size_t b = 0; b < problem.branches.size(); ++b) {
    const DepthwiseBranch& branch = problem.branches[b];
    branches.push_back({{branch.kernel_h, branch.kernel_w},
                        {branch.rate_h, branch.rate_w},
                        problem.out_channels[b]});
  }
  const PyramidShape& shape = problem.shape;
  return {shape.batch, shape.height, shape.width, std::move(branches), shape.channels};
}

// What ASPP_EXT_SEPARABLE was when the library was loaded, or what was asked for since: no call
// reads the environment, which another thread may be writing.
enum class Way : int { cheapest, fused, stored, unknown };

constexpr std::string_view kWays[] = {"", "fused", "stored"};

Way way_of(std::string_view name) {
  return Way(std::find(std::begin(kWays), std::end(kWays), name) - std::begin(kWays));
}

std::string_view given_way() {
  const char* const text = std::getenv("ASPP_EXT_SEPARABLE");
  return text == nullptr ? "" : text;
}

const std::string loaded_way{given_way()};
std::atomic<Way> way{way_of(loaded_way)};

void check_way(const char* op, Way asked, std::string_view name) {
  require(asked != Way::unknown, op, ": ASPP_EXT_SEPARABLE must be fused or stored, got '", name,
          "'");
}

std::string_view wish(const char* op) {
  const Way asked = way;
  check_way(op, asked, loaded_way);
  return kWays[int(asked)];
}

// Returns what it was.
std::string separable_way(std::string name) {
  check_way("separable_way", way_of(name), name);
  const Way before = way.exchange(way_of(name));
  return before == Way::unknown ? loaded_way : std::string(kWays[int(before)]);
}

// Whether there is a plan.
bool prepare(Operands& operands, const SeparableProblem& problem, Prepared& prepared,
             FusedChoice& choice) {
  prepare_or_refuse(operands, [&] {
    return prepare_separable(plan_cache(), operands.math(), plan_of(problem), wish(operands.op()),
                             operands.stream(), prepared, choice);
  });
  return prepared.plan != nullptr;
}

}  // namespace

bool fused_forward(Operands& operands, const SeparableProblem& problem, const Rows& out) {
  Prepared prepared;
  FusedChoice choice;
  if (!prepare(operands, problem, prepared, choice)) return false;
  const PyramidShape& shape = problem.shape;
  SeparableParams params{};
  set_sizes(operands, shape, params);
  params.a = problem.x.data;
  params.a_pitch = operands.narrow_pitch(problem.x);
  params.out = out.data;
  params.out_pitch = out.pitch;
  params.scale = problem.scale;
  params.shift = problem.shift;
  params.shift_pitch = problem.shift_per_sample ? shape.out_channels : 0;
  params.relu = problem.relu;
  params.between_relu = problem.between_relu;
  params.halo_pixels = choice.pixels;
  params.most_taps = choice.taps;
  int64_t first = 0;
  for (size_t b = 0; b < problem.branches.size(); ++b) {
    SeparableBranch& branch = params.branches[b];
    branch.filter = problem.branches[b].filter;
    branch.affine = problem.branches[b].affine;
    branch.weight = problem.pointwise[b];
    branch.out_channels = operands.narrow("the output channels", problem.out_channels[b]);
    branch.out_channel = operands.narrow("the output channels", first);
    first += problem.out_channels[b];
  }
  set_plan(operands, prepared, params);
  check_cuda(operands.op(),
             launch_separable_sm80(operands.math(), prepared.shape, params, operands.stream()));
  return true;
}

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CompositeExplicitAutograd, m) {
  m.impl("separable_way", ASPP_BOX(&separable_way));
}

}  // namespace aspp::cuda
