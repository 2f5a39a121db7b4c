// SPDX-License-Identifier: BSD-3-Clause
// Walks the work lists of random problems the way a kernel does and counts, product by product,
// what the sum of each output takes in. Built and run by test_work_list.py.
//   work_list_check            prints what it checked; exits 1 at the first difference
//   work_list_check --planted  falsifies lists itself; exits 1 if a false list passes
#include "../csrc/cuda/work_list.h"

#include <array>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <random>
#include <set>

using namespace aspp::cuda;
using namespace aspp::plan;

namespace {

struct Case {
  Problem problem;
  Pass pass;
  Options options;
  Index workers;
};

struct Rule : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void expect(bool holds, const char* rule) {
  if (!holds) throw Rule(rule);
}

// How often the product of grad[o] at (image, y, x), x[c] and weight [o, c, index] was taken, which
// is what all three passes sum, each over other indices.
class Products {
 public:
  explicit Products(const Problem& problem) : p_(problem) {
    for (const Branch& branch : p_.branches) {
      offset_.push_back(size_);
      size_ +=
          p_.pixels() * branch.kernel.h * branch.kernel.w * branch.out_channels * p_.in_channels;
    }
    counts_.resize(size_);
  }

  // The output's pixel is (y, x), the input's (y, x) + (dy, dx).
  void take(Index branch, Index image, Index y, Index x, Index dy, Index dx, Index index, Index o,
            Index c) {
    const auto& [kernel, rate, outputs] = p_.branches[branch];
    expect(dy == (index / kernel.w - kernel.h / 2) * rate.h &&
               dx == (index % kernel.w - kernel.w / 2) * rate.w,
           "a tap reads where its weight belongs");
    const Index pixel = (image * p_.height + y) * p_.width + x;
    const Index tap = pixel * kernel.h * kernel.w + index;
    ++counts_[offset_[branch] + (tap * outputs + o) * p_.in_channels + c];
  }

  void check() const {
    std::size_t next = 0;
    for (const auto& [kernel, rate, outputs] : p_.branches)
      for (Index pixel = 0; pixel < p_.pixels(); ++pixel)
        for (Index index = 0; index < kernel.h * kernel.w; ++index) {
          const Index y = pixel / p_.width % p_.height, x = pixel % p_.width;
          const Index from_y = y + (index / kernel.w - kernel.h / 2) * rate.h;
          const Index from_x = x + (index % kernel.w - kernel.w / 2) * rate.w;
          const bool live = from_y >= 0 && from_y < p_.height && from_x >= 0 && from_x < p_.width;
          for (Index each = 0; each < outputs * p_.in_channels; ++each)
            expect(counts_[next++] == (live ? 1 : 0), "each live product counts once");
        }
  }

 private:
  const Problem& p_;
  Index size_ = 0;
  std::vector<Index> offset_;
  std::vector<int> counts_;
};

// One row of one k block of a unit: `row` and `column` in the output, `k` from 0 in the block.
void take_row(const Case& c, const WorkRegion& region, const WorkTap& tap, const WorkUnit& unit,
              Index row, Index first_k, Products& products) {
  const auto& [problem, pass, options, workers] = c;
  const bool of_weight = pass == Pass::grad_weight;
  const Index area = Index(region.height) * region.width;
  const Index depth = of_weight               ? problem.batch * area
                      : pass == Pass::forward ? problem.in_channels
                                              : problem.branches[tap.branch].out_channels;
  for (Index k = first_k; k < std::min(first_k + options.tile.k, depth); ++k) {
    const Index place = of_weight ? k : row;
    const Index image = place / area;
    const Index y = region.y + place % area / region.width;
    const Index x = region.x + place % region.width;
    const Index read_y = y + tap.dy, read_x = x + tap.dx;
    expect(image < problem.batch && y < problem.height && x < problem.width, "m is in the map");
    const bool inside =
        read_y >= 0 && read_y < problem.height && read_x >= 0 && read_x < problem.width;
    expect(inside || region.padded != 0, "only padded regions read outside");
    if (!inside) continue;
    for (Index n = unit.n_begin; n < unit.n_begin + unit.n_count; ++n) {
      if (of_weight)
        products.take(tap.branch, image, y, x, tap.dy, tap.dx, tap.index, row, n);
      else if (pass == Pass::forward)
        products.take(tap.branch, image, y, x, tap.dy, tap.dx, tap.index, n, k);
      else
        products.take(tap.branch, image, read_y, read_x, -tap.dy, -tap.dx, tap.index, k, n);
    }
  }
}

void take_unit(const Case& c, const WorkList& list, const WorkUnit& unit, Products& products) {
  const WorkRegion& region = list.regions.at(unit.region);
  Index tap = unit.first_tap, block = unit.first_block;
  for (Index k = unit.k_begin; k < unit.k_end; ++k) {
    expect(tap >= region.tap_begin && tap < region.tap_end, "a unit keeps to its region's taps");
    const WorkTap& at = list.taps.at(tap);
    expect(at.first_block + block == k, "first_tap and first_block are where k is");
    expect(c.pass == Pass::grad_input || at.branch == region.branch, "a region has one branch");
    for (Index row = unit.m_begin; row < unit.m_begin + unit.m_count; ++row)
      take_row(c, region, at, unit, row, block * c.options.tile.k, products);
    if (++block == at.blocks) ++tap, block = 0;
  }
}

Index output_size(const Problem& problem, Pass pass) {
  Index outputs = 0, weights = 0;
  for (const auto& [kernel, rate, out_channels] : problem.branches) {
    outputs += out_channels;
    weights += kernel.h * kernel.w * out_channels;
  }
  if (pass == Pass::grad_weight) return weights * problem.in_channels;
  return problem.pixels() * (pass == Pass::forward ? outputs : problem.in_channels);
}

// Tiles are numbered branch by branch, the columns of one row of tiles after one another; every
// element of the output is in one of them, and slices differ in k alone.
void check_tiles(const Case& c, const WorkList& list) {
  const auto& [problem, pass, options, workers] = c;
  std::map<Index, std::vector<const WorkUnit*>> tiles;
  for (const WorkUnit& unit : list.units) tiles[unit.tile].push_back(&unit);
  expect(static_cast<Index>(tiles.size()) == list.tiles, "tiles counts the tiles");
  std::set<Index> counters;
  std::vector<int> partials(list.partials);
  expect(list.branch_tiles.size() == problem.branches.size(), "each branch has its tiles");
  std::vector<Index> counts(list.branch_tiles.size());
  Index branch = 0, column = 0, elements = 0;
  for (const auto& [number, units] : tiles) {
    const WorkUnit& one = *units.front();
    const WorkRegion& region = list.regions.at(one.region);
    expect(number < list.tiles && region.branch >= branch, "tiles are in order of the branches");
    expect(region.branch == branch || column == 0, "a branch begins with a new row of tiles");
    branch = region.branch;
    expect(list.branch_tiles[branch].first == number - counts[branch]++,
           "a branch's tiles begin at its first");
    expect(one.n_begin == column, "the columns of a row of tiles are neighbours");
    const Index width =
        pass == Pass::forward ? problem.branches[branch].out_channels : problem.in_channels;
    column = one.n_begin + one.n_count;
    expect(column == width || one.n_count == options.tile.n, "only the last column is narrow");
    if (column == width) column = 0;
    expect(one.m_count >= 1 && one.m_count <= options.tile.m, "a tile has at most tile.m rows");
    elements += Index(one.m_count) * one.n_count;

    expect(static_cast<Index>(units.size()) == one.slices, "a tile has all its slices");
    std::set<Index> slices;
    for (const WorkUnit* unit : units) {
      const auto place = [](const WorkUnit& u) {
        return std::array{u.region, u.m_begin, u.m_count, u.n_begin, u.n_count, u.slices};
      };
      expect(place(*unit) == place(one), "slices differ in k alone");
      expect(unit->slices == 1 || (unit->partial == one.partial && unit->counter == one.counter),
             "slices share partial and counter");
      expect(unit->slice >= 0 && unit->slice < unit->slices, "slice < slices");
      slices.insert(unit->slice);
    }
    expect(static_cast<Index>(slices.size()) == one.slices, "no slice is there twice");
    if (one.slices == 1) continue;
    counters.insert(one.counter);
    for (Index s = 0; s < one.slices; ++s) ++partials.at(one.partial + s);
  }
  for (size_t b = 0; b < counts.size(); ++b)
    expect(list.branch_tiles[b].count == counts[b], "a branch's tiles are counted");
  for (const int uses : partials) expect(uses == 1, "no two tiles share a partial, none is left");
  expect(static_cast<Index>(counters.size()) == list.counters, "each split tile has a counter");
  expect(counters.empty() || (*counters.begin() == 0 && *counters.rbegin() == list.counters - 1),
         "counters count from 0");
  expect(elements == output_size(problem, pass), "the tiles are as large as the output");
}

void check(const Case& c, const WorkList& list) {
  const auto units = static_cast<Index>(list.units.size());
  expect(list.worker_begin.front() == 0 && list.worker_begin.back() == units,
         "the workers have all units");
  const Index most = std::min<Index>(c.workers, units);
  expect(list.workers() <= most && (list.partials > 0 || list.workers() == most),
         "no worker is idle, but where all have equal shares already");
  for (Index w = 0; w < list.workers(); ++w)
    expect(list.worker_begin[w] < list.worker_begin[w + 1], "every worker has a unit");
  check_tiles(c, list);
  Products products(c.problem);
  for (const WorkUnit& unit : list.units) take_unit(c, list, unit, products);
  products.check();
}

class Random {
 public:
  Index any(Index low, Index high) {
    return low + static_cast<Index>(engine_() % static_cast<unsigned>(high - low + 1));
  }

  Case next() {
    std::vector<Branch> branches;
    for (Index b = any(1, 3); b > 0; --b)
      branches.push_back(
          {{2 * any(0, 1) + 1, 2 * any(0, 2) + 1}, {any(1, 8), any(1, 8)}, any(1, 7)});
    const Index tail = any(1, 4);
    const Tile tile{tail * any(1, 4), any(1, 6), any(1, 9), tail};
    const auto order = static_cast<Order>(any(0, 3));
    return {Problem(any(0, 3), any(1, 8), any(1, 8), branches, any(1, 9)),
            static_cast<Pass>(any(0, 2)),
            {order, tile, any(0, 40), any(1, 3), any(0, 1) ? 0 : -1000},
            any(1, 40)};
  }

 private:
  std::mt19937 engine_{11};
};

WorkList list_of(const Case& c) { return make_work_list(c.problem, c.pass, c.options, c.workers); }

bool check_all() {
  Random random;
  Index sliced = 0, padded = 0;
  constexpr int kCases = 3000;
  for (int i = 0; i < kCases; ++i) {
    const Case c = random.next();
    const WorkList list = list_of(c);
    try {
      check(c, list);
    } catch (const std::exception& error) {
      std::cout << error.what() << ": " << name(c.pass) << " " << c.problem << " " << c.options.tile
                << "\n";
      return false;
    }
    sliced += list.counters > 0;
    for (const WorkRegion& region : list.regions) padded += region.padded;
  }
  std::cout << kCases << " work lists agree, " << sliced << " of them with slices\n";
  return sliced > kCases / 10 && padded > kCases / 10;
}

// Each number at the edge of 32 bits is kept, and refused in a sentence beyond it.
bool check_limits() {
  constexpr Index kEdge = (Index(1) << 31) - 1;
  const Options wide{Order::cheapest, {Index(1) << 21, Index(1) << 21, Index(1) << 21, 1}, 4, 1};
  const auto fits = [&](Problem p) {
    for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) {
      Index elements = 0;
      for (const WorkUnit& unit : make_work_list(p, pass, wide, 8).units)
        if (unit.slice == 0) elements += Index(unit.m_count) * unit.n_count;
      if (elements != output_size(p, pass)) return false;
    }
    return true;
  };
  const auto refused = [&](Problem p, const std::string& words) {
    for (const Pass pass : {Pass::forward, Pass::grad_input, Pass::grad_weight}) try {
        make_work_list(p, pass, wide, 8);
        return false;
      } catch (const std::invalid_argument& error) {
        if (std::string(error.what()).find(words) == std::string::npos) return false;
      }
    return true;
  };
  const Branch far{{1, 3}, {1, kEdge}, 1};
  const Branch many{{1, 1}, {1, 1}, (Index(1) << 30)};
  const Branch large{{255, 255}, {1, 1}, 1};
  const Options exact{Order::regions, {64, 64, 8, 64}};
  try {
    make_work_list({1, 65, 65, {large}}, Pass::forward, exact, 8);
    return false;
  } catch (const std::invalid_argument& error) {
    if (!std::strstr(error.what(), "at most 16777216 taps of regions")) return false;
  }
  return fits({1, 1, kEdge, {far}}) && fits({4, 1, kEdge / 4, {far}}) &&
         fits({1, 1, 2, {{{1, 1}, {1, 1}, kEdge}}, 1}) && fits({1, 1, 1, {far}, kEdge}) &&
         refused({2, 1, Index(1) << 30, {far}}, "batch * height * width must fit in 32 bits") &&
         refused({1, 1, 1, {far}, kEdge + 1}, "in_channels must fit in 32 bits") &&
         refused({1, 1, 1, {many, many}}, "the output channels of all branches must fit in 32");
}

WorkUnit& last_slice(WorkList& list) {
  WorkUnit* result = nullptr;
  for (WorkUnit& unit : list.units)
    if (unit.slices > 1 && (!result || unit.partial > result->partial)) result = &unit;
  expect(result && result->partial > 0, "the planted list has two split tiles");
  return *result;
}

// Each fault turns a right list into a wrong one; the check must notice every one.
bool planted() {
  using Fault = std::function<void(WorkList&)>;
  const std::vector<std::pair<const char*, Fault>> faults = {
      {"a unit lost", [](WorkList& l) { l.units.pop_back(), --l.worker_begin.back(); }},
      {"a unit twice", [](WorkList& l) { l.units.back() = l.units.front(); }},
      {"a row too many", [](WorkList& l) { ++l.units[0].m_count; }},
      {"a column too few", [](WorkList& l) { --l.units[0].n_count; }},
      {"a k block too few", [](WorkList& l) { --l.units[0].k_end; }},
      {"a slice begins at a wrong tap", [](WorkList& l) { ++l.units[1].first_tap; }},
      {"a slice begins at a wrong block", [](WorkList& l) { ++l.units[1].first_block; }},
      {"a shared partial", [](WorkList& l) { last_slice(l).partial -= 1; }},
      {"a shared counter", [](WorkList& l) { last_slice(l).counter ^= 1; }},
      {"a wrong tile", [](WorkList& l) { l.units[0].tile ^= 1; }},
      {"a tile of no branch", [](WorkList& l) { --l.branch_tiles[0].count; }},
      {"a false offset", [](WorkList& l) { ++l.taps[0].dy; }},
      {"a false weight", [](WorkList& l) { l.taps[0].index ^= 1; }},
      {"taps of another region", [](WorkList& l) { ++l.regions[0].tap_begin; }},
      {"a moved region", [](WorkList& l) { ++l.regions[0].x; }},
      {"a worker without units", [](WorkList& l) { l.worker_begin[1] = 0; }}};
  const Case c{Problem(1, 6, 7, {{{3, 3}, {2, 2}, 6}}, 8),
               Pass::forward,
               {Order::regions, {4, 4, 4, 2}, 16, 1, -1000},
               16};
  check(c, list_of(c));
  for (const auto& [label, fault] : faults) {
    WorkList list = list_of(c);
    fault(list);
    try {
      check(c, list);
    } catch (const std::exception&) {
      continue;
    }
    std::cout << "not noticed: " << label << "\n";
    return false;
  }
  std::cout << faults.size() << " faults noticed\n";
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const bool plant = count > 1 && std::strcmp(arguments[1], "--planted") == 0;
  return (plant ? planted() : check_all() && check_limits()) ? 0 : 1;
}
