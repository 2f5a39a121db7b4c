// SPDX-License-Identifier: BSD-3-Clause
#include "print.h"

#include <ostream>

#include "cost.h"
#include "polyphase.h"
#include "work_list.h"

namespace aspp::plan {
namespace {

// A list between brackets, with ", " between its elements.
template <class T>
std::ostream& list(std::ostream& out, const std::vector<T>& elements) {
  out << "[";
  for (std::size_t i = 0; i < elements.size(); ++i) out << (i ? ", " : "") << elements[i];
  return out << "]";
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Interval& interval) {
  return out << "[" << interval.begin << ", " << interval.end << ")";
}

std::ostream& operator<<(std::ostream& out, const Axis& axis) {
  return out << "Axis(size=" << axis.size << ", kernel=" << axis.kernel << ", rate=" << axis.rate
             << ")";
}

std::ostream& operator<<(std::ostream& out, const Extent& extent) {
  return out << "(" << extent.h << ", " << extent.w << ")";
}

std::ostream& operator<<(std::ostream& out, const Branch& branch) {
  return out << "Branch(kernel=" << branch.kernel << ", rate=" << branch.rate
             << ", out_channels=" << branch.out_channels << ")";
}

std::ostream& operator<<(std::ostream& out, const Problem& problem) {
  out << "Problem(batch=" << problem.batch << ", height=" << problem.height
      << ", width=" << problem.width << ", branches=";
  return list(out, problem.branches) << ", in_channels=" << problem.in_channels << ")";
}

std::ostream& operator<<(std::ostream& out, const Tap& tap) {
  return out << "Tap(branch=" << tap.branch << ", row=" << tap.row << ", col=" << tap.col
             << ", dy=" << tap.dy << ", dx=" << tap.dx << ")";
}

std::ostream& operator<<(std::ostream& out, const TapBlock& block) {
  return out << "TapBlock(branch=" << block.branch << ", rows=" << block.rows
             << ", cols=" << block.cols << ", first=" << block.first << ", step=" << block.step
             << ")";
}

std::ostream& operator<<(std::ostream& out, const Region& region) {
  out << "Region(rows=" << region.rows << ", cols=" << region.cols << ", live=";
  return list(out, region.live) << (region.padded ? ", padded)" : ")");
}

std::ostream& operator<<(std::ostream& out, const Tile& tile) {
  return out << "Tile(m=" << tile.m << ", n=" << tile.n << ", k=" << tile.k
             << ", tail=" << tile.tail << ")";
}

std::ostream& operator<<(std::ostream& out, const Unit& unit) {
  return out << "Unit(region=" << unit.region << ", tile=" << unit.tile << ", slice=" << unit.slice
             << "/" << unit.slices << ", m=" << unit.m << ", n=" << unit.n << ", k=" << unit.k
             << ", worker=" << unit.worker << ")";
}

std::ostream& operator<<(std::ostream& out, const Plan& plan) {
  return out << "Plan(pass=" << name(plan.pass) << ", tile=" << plan.tile << ", "
             << plan.regions.size() << " regions, " << plan.units.size()
             << " units, longest=" << plan.longest() << " of total=" << plan.total()
             << " k blocks)";
}

std::ostream& operator<<(std::ostream& out, const Schedule& schedule) {
  return out << "Schedule(" << schedule.units.size() << " units on " << schedule.workers()
             << " workers, makespan=" << schedule.makespan() << ", total=" << schedule.total()
             << ")";
}

std::ostream& operator<<(std::ostream& out, const Cost& cost) {
  return out << "Cost(dense=" << cost.dense << ", linear=" << cost.linear
             << ", regions=" << cost.regions << ", regions_tails=" << cost.regions_tails
             << ", merged=" << cost.merged << ", merged_tails=" << cost.merged_tails
             << ", ideal=" << cost.ideal << ")";
}

std::ostream& operator<<(std::ostream& out, const WeightCost& cost) {
  return out << "WeightCost(dense=" << cost.dense << ", live=" << cost.live
             << ", ideal=" << cost.ideal << ")";
}

std::ostream& operator<<(std::ostream& out, const WorkList& list) {
  return out << "WorkList(" << list.units.size() << " units on " << list.workers() << " workers, "
             << list.regions.size() << " regions, " << list.taps.size()
             << " taps, tiles=" << list.tiles << ", partials=" << list.partials
             << ", counters=" << list.counters << ")";
}

std::ostream& operator<<(std::ostream& out, const Term& term) {
  return out << "(" << term.at << ", " << term.coefficient << ")";
}

std::ostream& operator<<(std::ostream& out, const MinimalProduct& product) {
  list(out << "MinimalProduct(weight=" << product.weight << ", inputs=", product.inputs);
  return list(out << ", outputs=", product.outputs) << ")";
}

std::ostream& operator<<(std::ostream& out, const MinimalPiece& piece) {
  out << "MinimalPiece(products=" << piece.products << ", outputs=";
  return list(out, piece.outputs) << ")";
}

std::ostream& operator<<(std::ostream& out, const MinimalAxis& axis) {
  return out << "MinimalAxis(" << axis.products.size() << " products, " << axis.weights.size()
             << " weights, " << axis.pieces.size() << " pieces, denominator=" << axis.denominator
             << ")";
}

std::ostream& operator<<(std::ostream& out, const Blocks& blocks) {
  return out << "one" << (blocks.pair ? "+pair" : "") << (blocks.triple ? "+triple" : "")
             << (blocks.overlapped ? "+overlapped" : "");
}

std::ostream& operator<<(std::ostream& out, const PolyphaseForm& form) {
  return out << "PolyphaseForm(rows=" << form.rows << ", columns=" << form.columns
             << ", row_products=" << form.row_products
             << ", column_products=" << form.column_products << ", matrices=" << form.matrices
             << ")";
}

std::ostream& operator<<(std::ostream& out, const PolyphaseChoice& choice) {
  out << "PolyphaseChoice(";
  if (!choice.form) return out << choice.why_not << ", direct=" << choice.direct << ")";
  return out << *choice.form << ", polyphase=" << choice.polyphase
             << (choice.is_polyphase() ? " < " : " >= ") << "direct=" << choice.direct << ")";
}

}  // namespace aspp::plan
