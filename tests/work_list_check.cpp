// SPDX-License-Identifier: BSD-3-Clause
// Walks the work lists of random problems the way a kernel does and counts, product by product,
// what the sum of each output takes in. Built and run by test_work_list.py.
//   work_list_check            prints what it checked; exits 1 at the first difference
//   work_list_check --planted  falsifies lists itself; exits 1 if a false list passes
//   work_list_check --list pass order m n k tail workers batch height width in_channels [kernel_h
//     kernel_w rate_h rate_w out_channels]...  prints that list, field by field
#include <array>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <random>
#include <set>
#include <string>

#include "../csrc/plan/plan.h"

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
// is what all passes sum, each over other indices. (Separable's weight is itself a product, of
// pointwise [o, c] and depthwise [c, index].)
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
  const Index depth = of_weight                  ? problem.batch * area
                      : pass == Pass::grad_input ? problem.branches[tap.branch].out_channels
                                                 : problem.in_channels;
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
      else if (pass == Pass::grad_input)
        products.take(tap.branch, image, read_y, read_x, -tap.dy, -tap.dx, tap.index, k, n);
      else
        products.take(tap.branch, image, y, x, tap.dy, tap.dx, tap.index, n, k);
    }
  }
}

// A block of channels after the other, each with all taps of the region.
void take_separable(const Case& c, const WorkList& list, const WorkUnit& unit, Products& products) {
  const WorkRegion& region = list.regions.at(unit.region);
  const Index step = c.options.tile.k;
  const Index blocks = (c.problem.in_channels + step - 1) / step;
  expect(unit.first_tap == region.tap_begin && unit.first_block == unit.k_begin,
         "a unit begins at its region's first tap");
  expect(unit.k_begin >= 0 && unit.k_begin < unit.k_end && unit.k_end <= blocks,
         "a unit has blocks of channels");
  for (Index k = unit.k_begin; k < unit.k_end; ++k)
    for (Index tap = region.tap_begin; tap < region.tap_end; ++tap) {
      const WorkTap& at = list.taps.at(tap);
      expect(at.first_block == 0 && at.blocks == blocks, "each tap has all channels");
      expect(at.branch == region.branch, "a region has one branch");
      for (Index row = unit.m_begin; row < unit.m_begin + unit.m_count; ++row)
        take_row(c, region, at, unit, row, k * step, products);
    }
}

void take_unit(const Case& c, const WorkList& list, const WorkUnit& unit, Products& products) {
  if (c.pass == Pass::separable) return take_separable(c, list, unit, products);
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
  return problem.pixels() * (pass == Pass::grad_input ? problem.in_channels : outputs);
}

// Tiles are numbered branch by branch, the columns of one row of tiles after one another; every
// element of the output is in one of them, and slices differ in k alone, where each goes on with
// what the one before it left.
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
    const bool of_branch = pass == Pass::forward || pass == Pass::separable;
    const Index width = of_branch ? problem.branches[branch].out_channels : problem.in_channels;
    column = one.n_begin + one.n_count;
    expect(column == width || one.n_count == options.tile.n, "only the last column is narrow");
    if (column == width) column = 0;
    expect(one.m_count >= 1 && one.m_count <= options.tile.m, "a tile has at most tile.m rows");
    elements += Index(one.m_count) * one.n_count;

    expect(static_cast<Index>(units.size()) == one.slices, "a tile has all its slices");
    std::map<Index, const WorkUnit*> slices;
    for (const WorkUnit* unit : units) {
      const auto place = [](const WorkUnit& u) {
        return std::array{u.region, u.m_begin, u.m_count, u.n_begin, u.n_count, u.slices};
      };
      expect(place(*unit) == place(one), "slices differ in k alone");
      expect(unit->slices == 1 || (unit->partial == one.partial && unit->counter == one.counter),
             "slices share partial and counter");
      expect(unit->slice >= 0 && unit->slice < unit->slices, "slice < slices");
      slices[unit->slice] = unit;
    }
    expect(static_cast<Index>(slices.size()) == one.slices, "no slice is there twice");
    Index k = 0;
    for (const auto& [slice, unit] : slices) {
      expect(unit->k_begin == k, "a slice begins where the one before it ends");
      k = unit->k_end;
    }
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

// The runs of a region are its taps, in order.
void check_runs(const WorkList& list, const WorkRegion& region) {
  Index tap = region.tap_begin;
  for (Index r = region.run_begin; r < region.run_end; ++r) {
    const WorkRun& run = list.runs.at(r);
    expect(run.columns > 0 && run.count % run.columns == 0, "a run has whole rows of taps");
    for (int32_t t = 0; t < run.count; ++t, ++tap) {
      const int32_t i = t / run.columns, j = t % run.columns;
      const WorkTap& at = list.taps.at(tap);
      expect(tap < region.tap_end && at.branch == run.branch && at.blocks == run.blocks &&
                 at.index == run.index + i * run.index_step + j &&
                 at.dy == run.dy + i * run.dy_step && at.dx == run.dx + j * run.dx_step,
             "a run counts the taps that are listed");
      const bool follows = at.first_block == run.first_block + t * run.blocks;
      expect(follows || at.first_block == run.first_block, "a run begins with its first tap");
    }
  }
  expect(tap == region.tap_end, "the runs of a region have all of its taps");
}

// Every unit is started once; where they are shares, longer ones come before shorter ones.
void check_launch_order(const Case& c, const WorkList& list) {
  std::vector<int32_t> order = list.launch_order;
  std::sort(order.begin(), order.end());
  for (size_t i = 0; i < list.units.size(); ++i)
    expect(order.at(i) == static_cast<int32_t>(i), "every unit is started once");
  if (list.partials == 0 || c.pass == Pass::separable) return;
  const auto cost = [&](int32_t u) {
    const WorkUnit& unit = list.units[u];
    return paid_pixels(unit.m_count, c.options.tile) * (unit.k_end - unit.k_begin);
  };
  for (size_t i = 1; i < list.units.size(); ++i)
    expect(cost(list.launch_order[i - 1]) >= cost(list.launch_order[i]), "longest first");
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
  for (const WorkRegion& region : list.regions) check_runs(list, region);
  check_launch_order(c, list);
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
            static_cast<Pass>(any(0, 3)),
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

constexpr Pass kPasses[] = {Pass::forward, Pass::grad_input, Pass::grad_weight, Pass::separable};

// Each number at the edge of 32 bits is kept, and refused in a sentence beyond it.
bool check_limits() {
  constexpr Index kEdge = (Index(1) << 31) - 1;
  const Options wide{Order::cheapest, {Index(1) << 21, Index(1) << 21, Index(1) << 21, 1}, 4, 1};
  const auto fits = [&](Problem p) {
    for (const Pass pass : kPasses) {
      Index elements = 0;
      for (const WorkUnit& unit : make_work_list(p, pass, wide, 8).units)
        if (unit.slice == 0) elements += Index(unit.m_count) * unit.n_count;
      if (elements != output_size(p, pass)) return false;
    }
    return true;
  };
  const auto refused = [&](Problem p, const std::string& words) {
    for (const Pass pass : kPasses) try {
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

// Turns round the order of two slices.
void swap_slices(WorkList& list) {
  const WorkUnit& last = last_slice(list);
  for (WorkUnit& unit : list.units)
    if (unit.tile == last.tile && unit.slice < 2) unit.slice ^= 1;
}

using Fault = std::function<void(WorkList&)>;
using Faults = std::vector<std::pair<const char*, Fault>>;

// Each fault turns a right list into a wrong one; the check must notice every one.
bool notices(const Case& c, const Faults& faults) {
  check(c, list_of(c));
  for (const auto& [label, fault] : faults) {
    WorkList list = list_of(c);
    fault(list);
    try {
      check(c, list);
    } catch (const std::exception&) {
      continue;
    }
    std::cout << name(c.pass) << ": not noticed: " << label << "\n";
    return false;
  }
  std::cout << name(c.pass) << ": " << faults.size() << " faults noticed\n";
  return true;
}

bool planted() {
  Faults faults = {
      {"a unit lost", [](WorkList& l) { l.units.pop_back(), --l.worker_begin.back(); }},
      {"a unit twice", [](WorkList& l) { l.units.back() = l.units.front(); }},
      {"a row too many", [](WorkList& l) { ++l.units[0].m_count; }},
      {"a column too few", [](WorkList& l) { --l.units[0].n_count; }},
      {"a k block too few", [](WorkList& l) { --l.units[0].k_end; }},
      {"a slice begins at a wrong tap", [](WorkList& l) { ++l.units[1].first_tap; }},
      {"a slice begins at a wrong block", [](WorkList& l) { ++l.units[1].first_block; }},
      {"slices out of order", swap_slices},
      {"a shared partial", [](WorkList& l) { last_slice(l).partial -= 1; }},
      {"a shared counter", [](WorkList& l) { last_slice(l).counter ^= 1; }},
      {"a wrong tile", [](WorkList& l) { l.units[0].tile ^= 1; }},
      {"a tile of no branch", [](WorkList& l) { --l.branch_tiles[0].count; }},
      {"a false offset", [](WorkList& l) { ++l.taps[0].dy; }},
      {"a false weight", [](WorkList& l) { l.taps[0].index ^= 1; }},
      {"taps of another region", [](WorkList& l) { ++l.regions[0].tap_begin; }},
      {"a false step", [](WorkList& l) { ++l.runs[4].dy_step; }},
      {"a run lost", [](WorkList& l) { --l.regions[0].run_end; }},
      {"a unit started twice", [](WorkList& l) { l.launch_order[1] = l.launch_order[0]; }},
      {"a moved region", [](WorkList& l) { ++l.regions[0].x; }},
      {"a worker without units", [](WorkList& l) { l.worker_begin[1] = 0; }}};
  Case c{Problem(1, 6, 7, {{{3, 3}, {2, 2}, 6}}, 8),
         Pass::forward,
         {Order::regions, {4, 4, 4, 2}, 16, 1, -1000},
         16};
  if (!notices(c, faults)) return false;
  c.pass = Pass::separable;
  faults.emplace_back("a tap that begins later", [](WorkList& l) { ++l.taps[1].first_block; });
  faults.emplace_back("a tap without a block", [](WorkList& l) { --l.taps[1].blocks; });
  faults.emplace_back("a tap lost", [](WorkList& l) { --l.regions[0].tap_end; });
  return notices(c, faults);
}

// What aspp_ext._plan.work_list is compared with.
bool print_list(const std::vector<std::string>& words) {
  const auto number = [&](size_t i) { return static_cast<Index>(std::stoll(words.at(i))); };
  std::vector<Branch> branches;
  for (size_t i = 11; i < words.size(); i += 5)
    branches.push_back({{number(i), number(i + 1)}, {number(i + 2), number(i + 3)}, number(i + 4)});
  const Tile tile{number(2), number(3), number(4), number(5)};
  const Problem problem(number(7), number(8), number(9), branches, number(10));
  const Options options{order_named(words.at(1)), tile, number(6)};
  const WorkList list = make_work_list(problem, pass_named(words.at(0)), options, number(6));
  const auto line = [](const char* kind, std::initializer_list<int32_t> fields) {
    std::cout << kind;
    for (const int32_t field : fields) std::cout << " " << field;
    std::cout << "\n";
  };
  for (const WorkUnit& u : list.units)
    line("units", {u.region, u.m_begin, u.m_count, u.n_begin, u.n_count, u.k_begin, u.k_end,
                   u.first_tap, u.first_block, u.slice, u.slices, u.partial, u.counter, u.tile});
  for (const WorkRegion& r : list.regions)
    line("regions", {r.y, r.x, r.height, r.width, r.tap_begin, r.tap_end, r.padded, r.branch,
                     r.run_begin, r.run_end});
  for (const WorkTap& t : list.taps)
    line("taps", {t.branch, t.index, t.dy, t.dx, t.first_block, t.blocks});
  for (const WorkRun& r : list.runs)
    line("runs", {r.branch, r.index, r.dy, r.dx, r.columns, r.index_step, r.dy_step, r.dx_step,
                  r.first_block, r.blocks, r.count});
  for (const int32_t unit : list.launch_order) line("launch_order", {unit});
  for (const int32_t begin : list.worker_begin) line("worker_begin", {begin});
  for (const auto& [first, count] : list.branch_tiles) line("branch_tiles", {first, count});
  line("counts", {list.workers(), list.partials, list.counters, list.tiles});
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  const std::string mode = words.empty() ? "" : words.front();
  if (mode == "--list") return print_list({words.begin() + 1, words.end()}) ? 0 : 1;
  return (mode == "--planted" ? planted() : check_all() && check_limits()) ? 0 : 1;
}
