// SPDX-License-Identifier: BSD-3-Clause
#include "polyphase.h"

#include "print.h"

namespace aspp::plan {
namespace {

std::string obstacle(const Problem& problem, const Branch& branch) {
  const auto& [kernel, rate, out_channels] = branch;
  if (kernel == Extent{1, 1}) return "minimal filtering saves nothing of a 1x1 kernel";
  for (const Index taps : {kernel.h, kernel.w})
    if (taps != 1 && taps != 3)
      return sentence("minimal filtering needs 1 or 3 taps on each axis but the kernel is ",
                      kernel);
  if (std::max(problem.height, problem.width) > kLongestAxis)
    return sentence("minimal filtering needs axes of at most ", kLongestAxis,
                    " positions but the map is ", Extent{problem.height, problem.width});
  return {};
}

// One axis of a form.
struct Side {
  Blocks blocks;
  Index products = 0;
  Index weights = 0;
};

// One for each set of blocks; of sets that come to the same the smallest.
std::vector<Side> sides(const Axis& axis) {
  std::vector<Side> result;
  for (int bits = 0; bits < 8; ++bits) {
    const Blocks blocks{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
    const auto [products, weights] = count_minimal(axis, blocks);
    const Side side{blocks, products, weights};
    const auto same = [&](const Side& other) {
      return other.products == side.products && other.weights == side.weights;
    };
    if (std::none_of(result.begin(), result.end(), same)) result.push_back(side);
  }
  return result;
}

double cost(const Problem& problem, const Branch& branch, const PolyphaseForm& form,
            const PolyphaseCosts& costs) {
  const double per_channel =
      1. / static_cast<double>(problem.in_channels) + 1. / static_cast<double>(branch.out_channels);
  const double row = 1 + costs.transform * per_channel;
  const Index chunks = (form.products() + kChunkRows - 1) / kChunkRows;
  const double image = static_cast<double>(form.products()) * row +
                       static_cast<double>(form.matrices * chunks) * costs.matrix;
  const double once = costs.prepared ? costs.hold : costs.prepare;
  return static_cast<double>(problem.batch) * image + static_cast<double>(form.matrices) * once;
}

Index live_tap_count(const Axis& axis) { return live_taps(axis, {0, axis.size}).size(); }

}  // namespace

PolyphaseChoice choose_polyphase(const Problem& problem, Index index, const PolyphaseCosts& costs) {
  const Branch& branch = branch_at(problem, index);
  const Axis rows = row_axis(problem, index, Pass::forward);
  const Axis columns = col_axis(problem, index, Pass::forward);
  PolyphaseChoice choice;
  const Index taps = live_tap_count(rows) * live_tap_count(columns);
  choice.direct = static_cast<double>(problem.batch) *
                  (static_cast<double>(live_pixel_taps(problem, index)) * (1 + costs.direct) +
                   static_cast<double>(taps) * costs.matrix);
  choice.why_not = obstacle(problem, branch);
  if (!choice.why_not.empty()) return choice;
  const std::vector<Side> column_sides = sides(columns);
  for (const Side& row : sides(rows))
    for (const Side& column : column_sides) {
      const PolyphaseForm form{row.blocks, column.blocks, row.products, column.products,
                               row.weights * column.weights};
      const double polyphase = cost(problem, branch, form, costs);
      if (choice.form && choice.polyphase <= polyphase) continue;
      choice.form = form;
      choice.polyphase = polyphase;
    }
  return choice;
}

}  // namespace aspp::plan
