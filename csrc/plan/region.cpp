// SPDX-License-Identifier: BSD-3-Clause
#include "region.h"

namespace aspp::plan {

Index Region::tap_count() const {
  Index count = 0;
  for (const TapBlock& block : live) count += block.size();
  return count;
}

std::vector<Tap> taps(const Region& region) {
  std::vector<Tap> result;
  for (const auto& [branch, rows, cols, first, step] : region.live)
    for (Index row = 0; row < rows.size(); ++row)
      for (Index col = 0; col < cols.size(); ++col)
        result.push_back({branch, rows.begin + row, cols.begin + col, first.h + row * step.h,
                          first.w + col * step.w});
  return result;
}

TapBlock tap_block(const Problem& problem, Index branch, Pass pass, Interval rows, Interval cols) {
  const Axis y = row_axis(problem, branch, pass);
  const Axis x = col_axis(problem, branch, pass);
  return {branch, rows, cols, {offset(y, rows.begin), offset(x, cols.begin)}, {y.rate, x.rate}};
}

Region region_at(const Problem& problem, const Group& group, Interval rows, Interval cols) {
  Region region{rows, cols, {}, false};
  for (const Index branch : group.branches) {
    const Axis y = row_axis(problem, branch, group.pass);
    const Axis x = col_axis(problem, branch, group.pass);
    const Interval tap_rows = live_taps(y, rows);
    const Interval tap_cols = live_taps(x, cols);
    region.live.push_back(tap_block(problem, branch, group.pass, tap_rows, tap_cols));
    region.padded |= !always_live(y, tap_rows, rows) || !always_live(x, tap_cols, cols);
  }
  return region;
}

Grid grid(const Problem& problem, const Group& group) {
  std::vector<Axis> rows;
  std::vector<Axis> cols;
  for (const Index branch : group.branches) {
    rows.push_back(row_axis(problem, branch, group.pass));
    cols.push_back(col_axis(problem, branch, group.pass));
  }
  return {cuts(rows), cuts(cols)};
}

std::vector<Region> exact_regions(const Problem& problem, const Group& group) {
  const auto [rows, cols] = grid(problem, group);
  const Index count = static_cast<Index>((rows.size() - 1) * (cols.size() - 1));
  const auto branches = static_cast<Index>(group.branches.size());
  require(count <= kMaxEntries / branches, "the regions must have at most ", kMaxEntries / branches,
          " rectangles of ", branches, " branches but have ", count);
  std::vector<Region> result;
  for (std::size_t y = 0; y + 1 < rows.size(); ++y)
    for (std::size_t x = 0; x + 1 < cols.size(); ++x)
      result.push_back(region_at(problem, group, {rows[y], rows[y + 1]}, {cols[x], cols[x + 1]}));
  return result;
}

std::vector<Region> tap_rectangles(const Problem& problem) {
  std::vector<Region> result;
  for (Index branch = 0; branch < problem.branch_count(); ++branch) {
    const Axis y = row_axis(problem, branch, Pass::grad_weight);
    const Axis x = col_axis(problem, branch, Pass::grad_weight);
    for (Index row = 0; row < y.kernel; ++row)
      for (Index col = 0; col < x.kernel; ++col)
        result.push_back(
            {live_positions(y, row),
             live_positions(x, col),
             {tap_block(problem, branch, Pass::grad_weight, {row, row + 1}, {col, col + 1})},
             false});
  }
  return result;
}

}  // namespace aspp::plan
