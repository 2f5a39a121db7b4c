// SPDX-License-Identifier: BSD-3-Clause
#include "shares.h"

namespace aspp::plan {
namespace {

// Fills worker after worker up to `most`, the time of a share.
class Filling {
 public:
  Filling(const Plan& plan, Index most, Index shortest_slice)
      : plan_(plan),
        most_(most),
        shortest_(shortest_slice),
        room_(most) {}

  // Calls visit(unit, worker) with `unit` or the slices of it; false where a share is too short for
  // what cannot be cut.
  template <class Visit>
  bool place(Unit unit, Visit&& visit) {
    const Index end = unit.k.end;
    while (true) {
      unit.k.end = end;
      if (unit_cost(plan_, unit) > room_) {
        const Index block = paid_pixels(unit.m.size(), plan_.tile) *
                            block_cost(plan_.pass, plan_.regions[unit.region]);
        const Index fitting = (room_ - unit_overhead(plan_)) / block;  // <= 0 where none does
        const Index blocks = std::min(fitting, unit.k.size() - shortest_);
        if (blocks < shortest_) {  // nothing of it: the next worker's
          if (room_ == most_) return false;
          next_worker();
          continue;
        }
        unit.k.end = unit.k.begin + blocks;
      }
      visit(unit, worker_);
      room_ -= unit_cost(plan_, unit);
      if (unit.k.end == end) return true;
      unit.k.begin = unit.k.end;
      next_worker();
    }
  }

  Index workers() const { return worker_ + 1; }

 private:
  void next_worker() {
    ++worker_;
    room_ = most_;
  }

  const Plan& plan_;
  const Index most_, shortest_;
  Index worker_ = 0, room_;
};

}  // namespace

std::vector<Unit> cut_into_shares(const Plan& plan, Index workers, Index shortest_slice) {
  Index total = 0;
  for (const Unit& unit : plan.units)
    total = add(total, unit_cost(plan, unit), "the cost of a plan");
  const auto suffices = [&](Index most) {
    Filling filling(plan, most, shortest_slice);
    for (const Unit& unit : plan.units)
      if (!filling.place(unit, [](const Unit&, Index) {})) return false;
    return filling.workers() <= workers;
  };
  Index too_little = 0;
  Index enough = total;
  while (enough - too_little > 1) {
    const Index middle = too_little + (enough - too_little) / 2;
    (suffices(middle) ? enough : too_little) = middle;
  }

  std::vector<Unit> result;
  Filling filling(plan, enough, shortest_slice);
  for (const Unit& unit : plan.units) {
    const auto first = result.size();
    filling.place(unit, [&](Unit slice, Index worker) {
      require(result.size() < static_cast<std::size_t>(kMaxEntries), "a plan must have at most ",
              kMaxEntries, " units but has more");
      slice.slice = static_cast<Index>(result.size() - first);
      slice.worker = worker;
      result.push_back(slice);
    });
    for (auto s = first; s < result.size(); ++s)
      result[s].slices = static_cast<Index>(result.size() - first);
  }
  return result;
}

}  // namespace aspp::plan
