// SPDX-License-Identifier: BSD-3-Clause
// One axis of one branch: which taps are live at which positions. 2-D is a product of two of these.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "checked.h"

namespace aspp::plan {

// Half open: [begin, end).
struct Interval {
  Index begin = 0;
  Index end = 0;

  constexpr Index size() const { return end - begin; }
  constexpr bool empty() const { return end <= begin; }
  constexpr bool contains(Interval other) const { return begin <= other.begin && other.end <= end; }
  friend constexpr auto operator<=>(const Interval&, const Interval&) = default;
};

// The smallest interval around both; an empty one adds nothing.
constexpr Interval hull(Interval a, Interval b) {
  if (a.empty()) return b;
  if (b.empty()) return a;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}

// `kernel` taps (odd), tap t reads position p + (t - kernel / 2) * rate. The gradient of the input
// reads the output's gradient on the opposite side: the same axis with a negative rate.
struct Axis {
  Index size = 1;
  Index kernel = 1;
  Index rate = 1;
};

constexpr Index offset(const Axis& axis, Index tap) { return (tap - axis.kernel / 2) * axis.rate; }

// The positions at which `tap` reads inside the axis.
constexpr Interval live_positions(const Axis& axis, Index tap) {
  const Index shift = offset(axis, tap);
  return {std::clamp<Index>(-shift, 0, axis.size),
          std::clamp<Index>(axis.size - shift, 0, axis.size)};
}

// The taps that are live at one position at least of `positions` (not empty). The centre is always
// among them, and liveness only falls with the distance from it, so they are an interval.
constexpr Interval live_taps(const Axis& axis, Interval positions) {
  const Index step = axis.rate < 0 ? -axis.rate : axis.rate;
  Index before = std::min(axis.kernel / 2, (positions.end - 1) / step);
  Index after = std::min(axis.kernel / 2, (axis.size - 1 - positions.begin) / step);
  if (axis.rate < 0) std::swap(before, after);
  return {axis.kernel / 2 - before, axis.kernel / 2 + after + 1};
}

// Whether every one of `taps` is live at every one of `positions`.
constexpr bool always_live(const Axis& axis, Interval taps, Interval positions) {
  return live_positions(axis, taps.begin).contains(positions) &&
         live_positions(axis, taps.end - 1).contains(positions);
}

// The positions where the set of live taps of any of `axes` (of one size) changes, with both ends:
// between two neighbours of the result every tap is either live throughout or dead throughout.
inline std::vector<Index> cuts(const std::vector<Axis>& axes) {
  std::vector<Index> result;
  for (const Axis& axis : axes) {
    const Interval taps = live_taps(axis, {0, axis.size});
    for (Index tap = taps.begin; tap < taps.end; ++tap) {
      const Interval live = live_positions(axis, tap);
      result.insert(result.end(), {live.begin, live.end});
    }
  }
  std::sort(result.begin(), result.end());
  result.erase(std::unique(result.begin(), result.end()), result.end());
  return result;
}

}  // namespace aspp::plan
