// SPDX-License-Identifier: BSD-3-Clause
// aspp_ext._plan: the planner, seen from Python. Types and documentation: aspp_ext/_plan.pyi.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <variant>

#include "cuda/fused_choice.h"
#include "plan/noise.h"
#include "plan/plan.h"

namespace py = pybind11;
using namespace aspp::plan;

namespace {

using Pair = std::array<Index, 2>;
using OneOrTwo = std::variant<Index, Pair>;  // of kernels and rates: one number for both axes

Extent extent(const OneOrTwo& value) {
  if (const Index* both = std::get_if<Index>(&value)) return {*both, *both};
  const auto& [h, w] = std::get<Pair>(value);
  return {h, w};
}

py::tuple tuple(const Extent& extent) { return py::make_tuple(extent.h, extent.w); }

py::list pairs(const std::vector<Term>& terms) {
  py::list result;
  for (const auto& [at, coefficient] : terms) result.append(py::make_tuple(at, coefficient));
  return result;
}

py::dict dict(const Blocks& blocks) {
  using namespace py::literals;
  return py::dict("pair"_a = blocks.pair, "triple"_a = blocks.triple,
                  "overlapped"_a = blocks.overlapped);
}
Blocks blocks_of(const py::dict& named) {
  const auto has = [&](const char* name) { return named[name].cast<bool>(); };
  return {has("pair"), has("triple"), has("overlapped")};
}

template <class T>
std::string repr(const T& value) {
  return sentence(value);
}

Group group(const Problem& problem, std::optional<Index> branch) {
  if (!branch) return groups(problem, Pass::grad_input).front();
  branch_at(problem, *branch);
  return {Pass::forward, {*branch}};
}

std::vector<Region> ordered_regions(const Problem& problem, std::optional<Index> branch,
                                    const std::string& order, const Tile& tile) {
  const Group branches = group(problem, branch);
  const Order chosen = order_named(order);
  if (chosen == Order::regions) return exact_regions(problem, branches);
  if (chosen == Order::merged) return merged_regions(problem, branches, tile);
  return tiling(problem, branches, chosen, tile).regions;
}

Axis checked_axis(Index size, Index kernel, Index rate) {
  const auto pass = rate < 0 ? Pass::grad_input : Pass::forward;
  require(rate != 0 && rate != INT64_MIN, "an axis' rate must not be 0 but is ", rate);
  return col_axis(Problem(1, 1, size, {{{1, kernel}, {1, std::abs(rate)}}}), 0, pass);
}

Index checked_tap(const Axis& axis, Index tap) {
  if (tap < 0 || tap >= axis.kernel)
    throw std::out_of_range(sentence("plan: tap must be in [0, ", axis.kernel, ") but is ", tap));
  return tap;
}

Interval inside(Interval positions, Index size, const char* what) {
  require(!positions.empty() && Interval{0, size}.contains(positions), what,
          " must be a part of [0, ", size, ") that is not empty but is ", positions);
  return positions;
}

void bind_geometry(py::module_& module) {
  py::class_<Interval>(module, "Interval")
      .def(py::init([](Index begin, Index end) { return Interval{begin, end}; }), py::arg("begin"),
           py::arg("end"))
      .def(py::init([](Pair both) { return Interval{both[0], both[1]}; }), py::arg("both"))
      .def_readonly("begin", &Interval::begin)
      .def_readonly("end", &Interval::end)
      .def_property_readonly("size", &Interval::size)
      .def("__iter__", [](const Interval& i) { return py::iter(py::make_tuple(i.begin, i.end)); })
      .def("__hash__", [](const Interval& i) { return py::hash(py::make_tuple(i.begin, i.end)); })
      .def(py::self == py::self)
      .def("__repr__", repr<Interval>);
  py::implicitly_convertible<py::tuple, Interval>();

  py::class_<Axis>(module, "Axis")
      .def(py::init(&checked_axis), py::arg("size"), py::arg("kernel"), py::arg("rate"))
      .def_readonly("size", &Axis::size)
      .def_readonly("kernel", &Axis::kernel)
      .def_readonly("rate", &Axis::rate)
      .def(
          "offset", [](const Axis& a, Index tap) { return offset(a, checked_tap(a, tap)); },
          py::arg("tap"))
      .def(
          "live_positions",
          [](const Axis& a, Index tap) { return live_positions(a, checked_tap(a, tap)); },
          py::arg("tap"))
      .def(
          "live_taps",
          [](const Axis& a, Interval p) { return live_taps(a, inside(p, a.size, "positions")); },
          py::arg("positions"))
      .def("cuts", [](const Axis& a) { return cuts({a}); })
      .def("__repr__", repr<Axis>);

  py::class_<Tap>(module, "Tap")
      .def_readonly("branch", &Tap::branch)
      .def_readonly("row", &Tap::row)
      .def_readonly("col", &Tap::col)
      .def_readonly("dy", &Tap::dy)
      .def_readonly("dx", &Tap::dx)
      .def(py::self == py::self)
      .def("__repr__", repr<Tap>);

  py::class_<TapBlock>(module, "TapBlock")
      .def_readonly("branch", &TapBlock::branch)
      .def_readonly("rows", &TapBlock::rows)
      .def_readonly("cols", &TapBlock::cols)
      .def_property_readonly("first", [](const TapBlock& block) { return tuple(block.first); })
      .def_property_readonly("step", [](const TapBlock& block) { return tuple(block.step); })
      .def_property_readonly("size", &TapBlock::size)
      .def(py::self == py::self)
      .def("__repr__", repr<TapBlock>);

  py::class_<Region>(module, "Region")
      .def_readonly("rows", &Region::rows)
      .def_readonly("cols", &Region::cols)
      .def_readonly("live", &Region::live)
      .def_readonly("padded", &Region::padded)
      .def_property_readonly("area", &Region::area)
      .def_property_readonly("tap_count", &Region::tap_count)
      .def_property_readonly("taps", &taps)
      .def(py::self == py::self)
      .def("__repr__", repr<Region>);
}

void bind_work(py::module_& module) {
  py::class_<Tile>(module, "Tile")
      .def(py::init([](Index m, Index n, Index k, std::optional<Index> tail) {
             const Tile tile{m, n, k, tail.value_or(m)};
             check_tile(tile);
             return tile;
           }),
           py::arg("m") = Tile{}.m, py::arg("n") = Tile{}.n, py::arg("k") = Tile{}.k,
           py::arg("tail") = py::none())
      .def_readonly("m", &Tile::m)
      .def_readonly("n", &Tile::n)
      .def_readonly("k", &Tile::k)
      .def_readonly("tail", &Tile::tail)
      .def("__repr__", repr<Tile>);

  py::class_<Unit>(module, "Unit")
      .def_readonly("region", &Unit::region)
      .def_readonly("tile", &Unit::tile)
      .def_readonly("slice", &Unit::slice)
      .def_readonly("slices", &Unit::slices)
      .def_readonly("worker", &Unit::worker)
      .def_readonly("m", &Unit::m)
      .def_readonly("n", &Unit::n)
      .def_readonly("k", &Unit::k)
      .def("__repr__", repr<Unit>);

  py::class_<Plan>(module, "Plan")
      .def_property_readonly("pass_", [](const Plan& plan) { return name(plan.pass); })
      .def_readonly("tile", &Plan::tile)
      .def_readonly("regions", &Plan::regions)
      .def_readonly("units", &Plan::units)
      .def_property_readonly("longest", &Plan::longest)
      .def_property_readonly("total", &Plan::total)
      .def(
          "schedule", [](const Plan& plan, Index workers) { return make_schedule(plan, workers); },
          py::arg("workers"))
      .def("__repr__", repr<Plan>);

  py::class_<Schedule>(module, "Schedule")
      .def_property_readonly("workers",
                             [](const Schedule& schedule) {
                               std::vector<std::vector<Index>> result;
                               for (Index w = 0; w < schedule.workers(); ++w)
                                 result.emplace_back(
                                     schedule.units.begin() + schedule.begin[w],
                                     schedule.units.begin() + schedule.begin[w + 1]);
                               return result;
                             })
      .def_readonly("busy", &Schedule::busy)
      .def_property_readonly("makespan", &Schedule::makespan)
      .def_property_readonly("total", &Schedule::total)
      .def("__repr__", repr<Schedule>);

  py::class_<Cost>(module, "Cost")
      .def_readonly("dense", &Cost::dense)
      .def_readonly("linear", &Cost::linear)
      .def_readonly("regions", &Cost::regions)
      .def_readonly("regions_tails", &Cost::regions_tails)
      .def_readonly("merged", &Cost::merged)
      .def_readonly("merged_tails", &Cost::merged_tails)
      .def_readonly("ideal", &Cost::ideal)
      .def("__repr__", repr<Cost>);

  py::class_<WeightCost>(module, "WeightCost")
      .def_readonly("dense", &WeightCost::dense)
      .def_readonly("live", &WeightCost::live)
      .def_readonly("ideal", &WeightCost::ideal)
      .def("__repr__", repr<WeightCost>);
}

// The records of a list one after the other, each its int32 fields in the struct's order.
template <class Record>
py::bytes bytes_of(const std::vector<Record>& records) {
  return {reinterpret_cast<const char*>(records.data()), records.size() * sizeof(Record)};
}

// What _plan.pyi promises of them.
static_assert(sizeof(WorkUnit) == 14 * sizeof(int32_t));
static_assert(sizeof(WorkRegion) == 10 * sizeof(int32_t));
static_assert(sizeof(WorkTap) == 6 * sizeof(int32_t));
static_assert(sizeof(WorkRun) == 11 * sizeof(int32_t));

void bind_work_list(py::module_& module) {
  py::class_<WorkList>(module, "WorkList")
      .def_property_readonly("units", [](const WorkList& list) { return bytes_of(list.units); })
      .def_property_readonly("worker_begin",
                             [](const WorkList& list) { return bytes_of(list.worker_begin); })
      .def_property_readonly("regions", [](const WorkList& list) { return bytes_of(list.regions); })
      .def_property_readonly("taps", [](const WorkList& list) { return bytes_of(list.taps); })
      .def_property_readonly("runs", [](const WorkList& list) { return bytes_of(list.runs); })
      .def_property_readonly("launch_order",
                             [](const WorkList& list) { return bytes_of(list.launch_order); })
      .def_property_readonly("workers", &WorkList::workers)
      .def_readonly("partials", &WorkList::partials)
      .def_readonly("counters", &WorkList::counters)
      .def_readonly("tiles", &WorkList::tiles)
      .def_property_readonly("branch_tiles",
                             [](const WorkList& list) {
                               py::list result;
                               for (const auto& [first, count] : list.branch_tiles)
                                 result.append(py::make_tuple(first, count));
                               return result;
                             })
      .def("__repr__", repr<WorkList>);

  module.def(
      "work_list",
      [](const Problem& problem, const std::string& pass, const std::string& order,
         const Tile& tile, Index workers) {
        return make_work_list(problem, pass_named(pass), {order_named(order), tile, workers},
                              workers);
      },
      py::arg("problem"), py::arg("pass_") = "forward", py::arg("order") = "cheapest",
      py::arg("tile") = Tile{}, py::arg("workers") = 1);
}

void bind_fused_choice(py::module_& module) {
  using aspp::cuda::FusedChoice;
  using aspp::cuda::Math;
  py::class_<FusedChoice>(module, "FusedChoice")
      .def_readonly("shape", &FusedChoice::shape)
      .def_readonly("halo_pixels", &FusedChoice::pixels)
      .def_readonly("most_taps", &FusedChoice::taps)
      .def_readonly("fused", &FusedChoice::fused)
      .def_readonly("stored", &FusedChoice::stored)
      .def_readonly("recomputed_batch_norm", &FusedChoice::recomputed_batch_norm)
      .def_readonly("stored_batch_norm", &FusedChoice::stored_batch_norm)
      .def_readonly("why_not", &FusedChoice::why_not)
      .def_property_readonly("is_fused", &FusedChoice::is_fused)
      .def_property_readonly("recomputes_in_batch_norm", &FusedChoice::recomputes_in_batch_norm);
  module.def(
      "choose_fused",
      [](const Problem& problem, const std::string& math, Index shared_bytes) {
        constexpr std::string_view kNames[] = {"bfloat16", "float16", "tf32", "float32", "float64"};
        for (int i = 0; i < aspp::cuda::kMaths; ++i)
          if (kNames[i] == math) return choose_fused(Math(i), problem, shared_bytes);
        throw std::invalid_argument(
            sentence("plan: math must be 'bfloat16', 'float16', 'tf32', 'float32' or 'float64' but "
                     "is '",
                     math, "'"));
      },
      py::arg("problem"), py::arg("math"), py::arg("shared_bytes"));
}

void bind_minimal(py::module_& module) {
  py::class_<MinimalProduct>(module, "MinimalProduct")
      .def_readonly("weight", &MinimalProduct::weight)
      .def_property_readonly("inputs", [](const MinimalProduct& p) { return pairs(p.inputs); })
      .def_property_readonly("outputs", [](const MinimalProduct& p) { return pairs(p.outputs); })
      .def("__repr__", repr<MinimalProduct>);

  py::class_<MinimalPiece>(module, "MinimalPiece")
      .def_readonly("products", &MinimalPiece::products)
      .def_readonly("outputs", &MinimalPiece::outputs)
      .def("__repr__", repr<MinimalPiece>);

  py::class_<MinimalAxis>(module, "MinimalAxis")
      .def_readonly("denominator", &MinimalAxis::denominator)
      .def_property_readonly("weights",
                             [](const MinimalAxis& axis) {
                               py::list result;
                               for (const auto& [first, centre, last] : axis.weights)
                                 result.append(py::make_tuple(first, centre, last));
                               return result;
                             })
      .def_readonly("products", &MinimalAxis::products)
      .def_readonly("pieces", &MinimalAxis::pieces)
      .def("__repr__", repr<MinimalAxis>);

  module.def(
      "minimal_axis",
      [](Index size, Index kernel, Index rate, bool pair, bool triple, bool overlapped) {
        return minimal_axis({size, kernel, rate}, {pair, triple, overlapped});
      },
      py::arg("size"), py::arg("kernel"), py::arg("rate"), py::kw_only(), py::arg("pair") = false,
      py::arg("triple") = false, py::arg("overlapped") = false);

  using Sizes = std::array<Index, 3>;
  module.def(
      "output_noise",
      [](Sizes rows, Sizes columns, const py::dict& row_blocks, const py::dict& column_blocks,
         const std::vector<double>& inputs, const TapEnergies& taps) {
        const Axis row_axis{rows[0], rows[1], rows[2]};
        const Axis column_axis{columns[0], columns[1], columns[2]};
        require(std::ssize(inputs) == row_axis.size * column_axis.size,
                "there must be an energy for each of ", row_axis.size, "x", column_axis.size,
                " inputs but there are ", inputs.size());
        const MinimalAxis row_form = minimal_axis(row_axis, blocks_of(row_blocks));
        const MinimalAxis column_form = minimal_axis(column_axis, blocks_of(column_blocks));
        Noise noise = output_noise({row_form, column_form, row_axis, column_axis}, inputs, taps);
        return py::make_tuple(std::move(noise.minimal), std::move(noise.direct));
      },
      py::arg("rows"), py::arg("columns"), py::arg("row_blocks"), py::arg("column_blocks"),
      py::arg("inputs"), py::arg("taps"));
}

void bind_polyphase(py::module_& module) {
  py::class_<PolyphaseForm>(module, "PolyphaseForm")
      .def_property_readonly("rows", [](const PolyphaseForm& form) { return dict(form.rows); })
      .def_property_readonly("columns",
                             [](const PolyphaseForm& form) { return dict(form.columns); })
      .def_readonly("row_products", &PolyphaseForm::row_products)
      .def_readonly("column_products", &PolyphaseForm::column_products)
      .def_readonly("matrices", &PolyphaseForm::matrices)
      .def("__repr__", repr<PolyphaseForm>);

  py::class_<PolyphaseChoice>(module, "PolyphaseChoice")
      .def_readonly("form", &PolyphaseChoice::form)
      .def_readonly("polyphase", &PolyphaseChoice::polyphase)
      .def_readonly("direct", &PolyphaseChoice::direct)
      .def_readonly("why_not", &PolyphaseChoice::why_not)
      .def_property_readonly("is_polyphase", &PolyphaseChoice::is_polyphase)
      .def("__repr__", repr<PolyphaseChoice>);

  constexpr PolyphaseCosts kCosts;
  module.def(
      "choose_polyphase",
      [](const Problem& problem, Index branch, double transform, double matrix, double prepare,
         double direct, double hold, bool prepared) {
        return choose_polyphase(problem, branch,
                                {transform, matrix, prepare, direct, hold, prepared});
      },
      py::arg("problem"), py::arg("branch"), py::kw_only(), py::arg("transform") = kCosts.transform,
      py::arg("matrix") = kCosts.matrix, py::arg("prepare") = kCosts.prepare,
      py::arg("direct") = kCosts.direct, py::arg("hold") = kCosts.hold,
      py::arg("prepared") = kCosts.prepared);
}

void bind_problem(py::module_& module) {
  py::class_<Branch>(module, "Branch")
      .def(py::init([](const OneOrTwo& kernel, const OneOrTwo& rate, Index out_channels) {
             return Branch{extent(kernel), extent(rate), out_channels};
           }),
           py::arg("kernel") = 1, py::arg("rate") = 1, py::arg("out_channels") = 1)
      .def_property_readonly("kernel", [](const Branch& branch) { return tuple(branch.kernel); })
      .def_property_readonly("rate", [](const Branch& branch) { return tuple(branch.rate); })
      .def_readonly("out_channels", &Branch::out_channels)
      .def("__repr__", repr<Branch>);

  py::class_<Problem>(module, "Problem")
      .def(py::init<Index, Index, Index, std::vector<Branch>, Index>(), py::arg("batch"),
           py::arg("height"), py::arg("width"), py::arg("branches"), py::arg("in_channels") = 1)
      .def_readonly("batch", &Problem::batch)
      .def_readonly("height", &Problem::height)
      .def_readonly("width", &Problem::width)
      .def_readonly("branches", &Problem::branches)
      .def_readonly("in_channels", &Problem::in_channels)
      .def("regions", &ordered_regions, py::arg("branch"), py::arg("order") = "regions",
           py::arg("tile") = Tile{})
      .def(
          "joint_regions",
          [](const Problem& problem, const std::string& order, const Tile& tile) {
            return ordered_regions(problem, std::nullopt, order, tile);
          },
          py::arg("order") = "regions", py::arg("tile") = Tile{})
      .def(
          "region_at",
          [](const Problem& problem, std::optional<Index> branch, Interval rows, Interval cols) {
            return region_at(problem, group(problem, branch), inside(rows, problem.height, "rows"),
                             inside(cols, problem.width, "cols"));
          },
          py::arg("branch"), py::arg("rows"), py::arg("cols"))
      .def("tap_rectangles", &tap_rectangles)
      .def(
          "plan",
          [](const Problem& problem, const std::string& pass, const std::string& order,
             const Tile& tile, Index processors, Index shortest_slice) {
            return make_plan(problem, pass_named(pass),
                             {order_named(order), tile, processors, shortest_slice});
          },
          py::arg("pass_") = "forward", py::arg("order") = "cheapest", py::arg("tile") = Tile{},
          py::arg("processors") = Options{}.processors,
          py::arg("shortest_slice") = Options{}.shortest_slice)
      .def(
          "cost",
          [](const Problem& problem, const std::string& pass, Index pixels, Index tail) {
            return cost(problem, pass_named(pass), pixels, tail);
          },
          py::arg("pass_") = "forward", py::arg("pixels") = 128, py::arg("tail") = 64)
      .def("weight_cost", &weight_cost, py::arg("pixels") = 64)
      .def(
          "live_share",
          [](const Problem& problem, std::optional<Index> branch) {
            return branch ? live_share(problem, *branch) : live_share(problem);
          },
          py::arg("branch") = py::none())
      .def("__repr__", repr<Problem>);
}

}  // namespace

PYBIND11_MODULE(_plan, module) {
  module.doc() = "The planner: live taps, regions, units of work and what they cost.";
  bind_geometry(module);
  bind_work(module);
  bind_problem(module);
  bind_work_list(module);
  bind_fused_choice(module);
  bind_minimal(module);
  bind_polyphase(module);
}
