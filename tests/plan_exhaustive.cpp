// SPDX-License-Identifier: BSD-3-Clause
// Compares the planner with the definition of a live tap, pixel by pixel and tap by tap, for every
// map up to 12x12, kernel 1/3/5 and rate 1..14 per axis. Built and run by test_plan.py.
//   plan_exhaustive            prints what it checked; exits 1 at the first difference
//   plan_exhaustive --planted  falsifies plans itself; exits 1 if a false plan passes
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <random>
#include <set>

#include "../csrc/plan/plan.h"

using namespace aspp::plan;

namespace {

using Key = std::array<Index, 5>;  // branch, tap row, tap column, dy, dx
using Live = std::set<Key>;

// The definition, written without the planner's own words: the output at (y, x) meets weight (i, j)
// at (y, x) + ((i, j) - centre) * rate; the gradient of the input goes the same way back.
Live live_at(const Problem& p, const Group& group, Index y, Index x) {
  const Index sign = group.pass == Pass::grad_input ? -1 : 1;
  Live result;
  for (const Index b : group.branches)
    for (Index i = 0; i < p.branches[b].kernel.h; ++i)
      for (Index j = 0; j < p.branches[b].kernel.w; ++j) {
        const Index dy = sign * (i - (p.branches[b].kernel.h - 1) / 2) * p.branches[b].rate.h;
        const Index dx = sign * (j - (p.branches[b].kernel.w - 1) / 2) * p.branches[b].rate.w;
        if (y + dy >= 0 && y + dy < p.height && x + dx >= 0 && x + dx < p.width)
          result.insert({b, i, j, dy, dx});
      }
  return result;
}

using Map = std::vector<Live>;  // [H * W]

Map live_map(const Problem& p, const Group& group) {
  Map result;
  for (Index y = 0; y < p.height; ++y)
    for (Index x = 0; x < p.width; ++x) result.push_back(live_at(p, group, y, x));
  return result;
}

// The taps of a region as a set; empty if one repeats or they are out of order.
Live listed(const Region& region) {
  Live result;
  const std::vector<Tap> all = taps(region);
  for (const Tap& tap : all) result.insert({tap.branch, tap.row, tap.col, tap.dy, tap.dx});
  const bool sorted = std::is_sorted(all.begin(), all.end());
  const bool counted = static_cast<Index>(all.size()) == region.tap_count();
  return sorted && counted && result.size() == all.size() ? result : Live{};
}

// Every pixel lies in one region; its taps are those of the pixel, or, where the region is padded,
// the union of its pixels'.
bool covers(const Problem& p, const Map& map, const std::vector<Region>& regions) {
  std::vector<int> seen(map.size(), 0);
  for (const Region& region : regions) {
    const Live own = listed(region);
    Live needed;
    bool uniform = true;
    for (Index y = region.rows.begin; y < region.rows.end; ++y)
      for (Index x = region.cols.begin; x < region.cols.end; ++x) {
        if (y < 0 || y >= p.height || x < 0 || x >= p.width) return false;
        ++seen[y * p.width + x];
        const Live& here = map[y * p.width + x];
        needed.insert(here.begin(), here.end());
        uniform &= here == own;
      }
    if (own != needed || uniform == region.padded) return false;
  }
  return std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; });
}

// Per (branch, tap) the pixels of its rectangle, against the pixels where the tap is live.
bool tap_rectangles_match(const Problem& p, const Map& map, const std::vector<Region>& rectangles) {
  std::size_t total = 0;
  for (const Live& live : map) total += live.size();
  for (const Region& each : rectangles) {
    for (Index y = each.rows.begin; y < each.rows.end; ++y)
      for (Index x = each.cols.begin; x < each.cols.end; ++x, --total)
        if (!map[y * p.width + x].contains(*listed(each).begin())) return false;
  }
  return total == 0;
}

// Tiles of consecutive pixels of the batch, each with the union of its pixels' taps.
bool linear_matches(const Problem& p, const Map& map, const Tiling& tiling, Index m) {
  Index next = 0;
  for (const auto& [region, pixels] : tiling.tiles) {
    Live needed;
    for (Index i = pixels.begin; i < pixels.end; ++i) {
      const Live& here = map[i % static_cast<Index>(map.size())];
      needed.insert(here.begin(), here.end());
    }
    if (pixels.begin != next || listed(tiling.regions[region]) != needed) return false;
    next = std::min(next + m, p.pixels());
    if (pixels.end != next) return false;
  }
  return next == p.pixels();
}

// Forward's geometry, whose cost is what the taps and one product of a block of channels take.
bool separable_matches(const Problem& p, const Group& group, const Map& map, const Tile& tile) {
  const auto cost = [&](const Region& region, Index pixels) {
    const Index paid = (pixels + tile.tail - 1) / tile.tail * tile.tail;
    return paid * (region.tap_count() + 4) * ((p.in_channels + tile.k - 1) / tile.k);
  };
  const auto sum = [&](const Tiling& tiling) {
    Index result = 0;
    for (const auto& [region, pixels] : tiling.tiles)
      result += cost(tiling.regions[region], pixels.size());
    return result;
  };
  const auto at = [&](Order order) { return tiling(p, group, order, tile); };
  const Tiling exact = at(Order::regions), merged = at(Order::merged), linear = at(Order::linear);
  if (exact.regions != exact_regions(p, {Pass::forward, group.branches})) return false;
  if (!covers(p, map, merged.regions) || !linear_matches(p, map, linear, tile.m)) return false;
  return work(p, group.pass, merged, tile) == sum(merged) && sum(merged) <= sum(exact) &&
         sum(at(Order::cheapest)) == std::min(sum(merged), sum(linear));
}

bool check(const Problem& p) {
  const Tile tile{8, 1, 1, 4};
  for (const Pass pass : {Pass::forward, Pass::grad_input})
    for (const Group& group : groups(p, pass)) {
      const Map map = live_map(p, group);
      const std::vector<Region> exact = exact_regions(p, group);
      const std::vector<Region> merged = merged_regions(p, group, tile);
      for (const Region& region : exact)
        if (region.padded) return false;
      if (!covers(p, map, exact) || !covers(p, map, merged)) return false;
      if (work(p, pass, merged, tile) > work(p, pass, exact, tile)) return false;
      if (!linear_matches(p, map, linear_tiling(p, group, tile), tile.m)) return false;
    }
  Group all = groups(p, Pass::grad_input).front();
  all.pass = Pass::forward;
  return tap_rectangles_match(p, live_map(p, all), tap_rectangles(p));
}

bool report(const Problem& p) {
  std::cout << "the plan differs from the definition: " << p << "\n";
  return false;
}

bool check_all() {
  Index count = 0;
  for (Index h = 1; h <= 12; ++h) {
    for (Index w = 1; w <= 12; ++w)
      for (const Index kh : {1, 3, 5})
        for (const Index kw : {1, 3, 5})
          for (Index rh = 1; rh <= 14; ++rh)
            for (Index rw = 1; rw <= 14; ++rw) {
              if ((kh == 1 && rh > 1) || (kw == 1 && rw > 1)) continue;  // the rate plays no part
              const Problem p(2, h, w, {{{kh, kw}, {rh, rw}}});
              if (!check(p)) return report(p);
              ++count;
            }
  }
  std::mt19937 random(7);
  const auto any = [&](Index low, Index high) {
    return low + static_cast<Index>(random() % static_cast<unsigned>(high - low + 1));
  };
  const Tile tile{8, 1, 3, 4};
  for (int i = 0; i < 3000; ++i, ++count) {
    std::vector<Branch> branches;
    for (Index b = any(2, 4); b > 0; --b)
      branches.push_back({{2 * any(0, 3) + 1, 2 * any(0, 3) + 1}, {any(1, 14), any(1, 14)}});
    const Problem p(any(0, 3), any(1, 12), any(1, 12), branches, any(1, 9));
    if (!check(p)) return report(p);
    for (const Group& group : groups(p, Pass::separable))
      if (!separable_matches(p, group, live_map(p, group), tile)) return report(p);
  }
  std::cout << count << " problems agree\n";
  return true;
}

// Each fault turns a right list of regions into a wrong one; the check must notice every one.
bool planted() {
  using Fault = std::function<void(std::vector<Region>&)>;
  const std::vector<std::pair<const char*, Fault>> faults = {
      {"a row too many", [](auto& r) { ++r[0].rows.end; }},
      {"a column too few", [](auto& r) { --r[0].cols.end; }},
      {"a region lost", [](auto& r) { r.pop_back(); }},
      {"a region twice", [](auto& r) { r.push_back(r[0]); }},
      {"a tap row lost", [](auto& r) { --r[4].live[0].rows.end; }},
      {"a dead tap", [](auto& r) { ++r[8].live[0].cols.end; }},
      {"a wrong offset", [](auto& r) { ++r[4].live[0].first.h; }},
      {"a wrong direction", [](auto& r) { r[4].live[0].step.w *= -1; }},
      {"taps of another region", [](auto& r) { std::swap(r[0].live, r[8].live); }},
      {"a false flag", [](auto& r) { r[3].padded = true; }}};
  const Problem p(1, 9, 11, {{{3, 3}, {2, 3}}});
  const Group group = groups(p, Pass::forward).front();
  const Map map = live_map(p, group);
  for (const auto& [label, fault] : faults) {
    std::vector<Region> regions = exact_regions(p, group);
    if (!covers(p, map, regions)) return report(p);
    fault(regions);
    if (covers(p, map, regions)) {
      std::cout << "not noticed: " << label << "\n";
      return false;
    }
  }
  std::cout << faults.size() << " faults noticed\n";
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const bool plant = count > 1 && std::strcmp(arguments[1], "--planted") == 0;
  return (plant ? planted() : check_all()) ? 0 : 1;
}
