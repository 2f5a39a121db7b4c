// SPDX-License-Identifier: BSD-3-Clause
// Every struct of the planner can print itself.
#pragma once

#include <iosfwd>

namespace aspp::plan {

struct Interval;
struct Axis;
struct Extent;
struct Branch;
struct Problem;
struct Tap;
struct TapBlock;
struct Region;
struct Tile;
struct Unit;
struct Plan;
struct Schedule;
struct Cost;
struct WeightCost;
struct WorkList;
struct Term;
struct MinimalProduct;
struct MinimalPiece;
struct MinimalAxis;
struct Blocks;
struct PolyphaseForm;
struct PolyphaseChoice;

std::ostream& operator<<(std::ostream& out, const Interval& interval);
std::ostream& operator<<(std::ostream& out, const Axis& axis);
std::ostream& operator<<(std::ostream& out, const Extent& extent);
std::ostream& operator<<(std::ostream& out, const Branch& branch);
std::ostream& operator<<(std::ostream& out, const Problem& problem);
std::ostream& operator<<(std::ostream& out, const Tap& tap);
std::ostream& operator<<(std::ostream& out, const TapBlock& block);
std::ostream& operator<<(std::ostream& out, const Region& region);
std::ostream& operator<<(std::ostream& out, const Tile& tile);
std::ostream& operator<<(std::ostream& out, const Unit& unit);
std::ostream& operator<<(std::ostream& out, const Plan& plan);
std::ostream& operator<<(std::ostream& out, const Schedule& schedule);
std::ostream& operator<<(std::ostream& out, const Cost& cost);
std::ostream& operator<<(std::ostream& out, const WeightCost& cost);
std::ostream& operator<<(std::ostream& out, const WorkList& list);
std::ostream& operator<<(std::ostream& out, const Term& term);
std::ostream& operator<<(std::ostream& out, const MinimalProduct& product);
std::ostream& operator<<(std::ostream& out, const MinimalPiece& piece);
std::ostream& operator<<(std::ostream& out, const MinimalAxis& axis);
std::ostream& operator<<(std::ostream& out, const Blocks& blocks);
std::ostream& operator<<(std::ostream& out, const PolyphaseForm& form);
std::ostream& operator<<(std::ostream& out, const PolyphaseChoice& choice);

}  // namespace aspp::plan
