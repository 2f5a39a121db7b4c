// SPDX-License-Identifier: BSD-3-Clause
#include "merge.h"

#include <initializer_list>

namespace aspp::plan {
namespace {

constexpr double kMaxTable = 1 << 22;   // rectangles of cells
constexpr double kMaxSplits = 1 << 25;  // ways to split them, all together

// Rows [top, bottom) and columns [left, right) of a grid's cells.
struct Cells {
  Index top, bottom, left, right;
};

using Pieces = std::initializer_list<Cells>;

// Calls visit(pieces) for each way to take a rectangle of cells apart once. One pinwheel of the two
// is enough: a grid is the same from left to right as from right to left, and so are the costs.
template <class Visit>
void for_each_split(const Cells& all, bool pinwheels, Visit&& visit) {
  const auto [top, bottom, left, right] = all;
  for (Index y = top + 1; y < bottom; ++y)
    visit(Pieces{{top, y, left, right}, {y, bottom, left, right}});
  for (Index x = left + 1; x < right; ++x)
    visit(Pieces{{top, bottom, left, x}, {top, bottom, x, right}});
  if (!pinwheels) return;
  for (Index y = top + 1; y < bottom; ++y)
    for (Index v = y + 1; v < bottom; ++v)
      for (Index x = left + 1; x < right; ++x)
        for (Index u = x + 1; u < right; ++u) {
          visit(Pieces{{top, y, left, u},
                       {top, v, u, right},
                       {y, v, x, u},
                       {y, bottom, left, x},
                       {v, bottom, x, right}});
        }
}

double choose(double n, int k) {
  double result = 1;
  for (int i = 0; i < k; ++i) result *= (n - i) / (i + 1);
  return result;
}

class Search {
 public:
  Search(const Problem& problem, const Group& group, const Tile& tile)
      : problem_(problem),
        group_(group),
        tile_(tile),
        grid_(grid(problem, group)) {}

  std::vector<Region> run() {
    std::vector<Region> result;
    if (!fits()) return exact_regions(problem_, group_);
    best_.resize((rows() + 1) * (rows() + 1) * (cols() + 1) * (cols() + 1));
    for (Index h = 1; h <= rows(); ++h)
      for (Index w = 1; w <= cols(); ++w)
        for (Index y = 0; y + h <= rows(); ++y)
          for (Index x = 0; x + w <= cols(); ++x) fill({y, y + h, x, x + w});
    collect({0, rows(), 0, cols()}, result);
    return result;
  }

 private:
  Index rows() const { return static_cast<Index>(grid_.rows.size()) - 1; }
  Index cols() const { return static_cast<Index>(grid_.cols.size()) - 1; }

  // Decided in doubles: these counts may be far beyond 64 bits.
  bool fits() {
    const double h = static_cast<double>(rows()) + 1;
    const double w = static_cast<double>(cols()) + 1;
    pinwheels_ = choose(h, 4) * choose(w, 4) <= kMaxSplits;
    return h * h * w * w <= kMaxTable && choose(h, 2) * choose(w, 2) * (h + w) <= kMaxSplits;
  }

  Index& best(const Cells& cells) {
    const auto [top, bottom, left, right] = cells;
    const Index h = rows() + 1;
    const Index w = cols() + 1;
    return best_[((top * h + bottom) * w + left) * w + right];
  }

  Region whole(const Cells& cells) const {
    return region_at(problem_, group_, {grid_.rows[cells.top], grid_.rows[cells.bottom]},
                     {grid_.cols[cells.left], grid_.cols[cells.right]});
  }

  Index sum(const Pieces& pieces) {
    Index result = 0;
    for (const Cells& piece : pieces) result = add(result, best(piece), "the work of all regions");
    return result;
  }

  void fill(const Cells& cells) {
    Index least = work(problem_, group_.pass, {whole(cells)}, tile_);
    for_each_split(cells, pinwheels_,
                   [&](const Pieces& pieces) { least = std::min(least, sum(pieces)); });
    best(cells) = least;
  }

  // Finds the choice that `fill` made again; nothing but the costs was kept.
  void collect(const Cells& cells, std::vector<Region>& result) {
    std::vector<Cells> chosen;
    for_each_split(cells, pinwheels_, [&](const Pieces& pieces) {
      if (chosen.empty() && sum(pieces) == best(cells)) chosen = pieces;
    });
    if (chosen.empty()) result.push_back(whole(cells));
    for (const Cells& piece : chosen) collect(piece, result);
  }

  const Problem& problem_;
  const Group& group_;
  const Tile& tile_;
  const Grid grid_;
  bool pinwheels_ = false;
  std::vector<Index> best_;  // [top][bottom][left][right]: the least work of that rectangle
};

}  // namespace

std::vector<Region> merged_regions(const Problem& problem, const Group& group, const Tile& tile) {
  check_tile(tile);
  return Search(problem, group, tile).run();
}

}  // namespace aspp::plan
