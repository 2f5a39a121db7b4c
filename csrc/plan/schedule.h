// SPDX-License-Identifier: BSD-3-Clause
// Which block of a persistent launch does which units.
#pragma once

#include "units.h"

namespace aspp::plan {

// Worker w does `units`[begin[w]], ..., [begin[w + 1] - 1] of the plan, in this order, which is the
// plan's.
struct Schedule {
  std::vector<Index> units;
  std::vector<Index> begin;
  std::vector<Index> busy;  // per worker, the cost of its units

  Index workers() const { return static_cast<Index>(busy.size()); }
  Index makespan() const;  // of the worker that is busy longest
  Index total() const;
};

// Throws unless `workers` is in [1, kMaxEntries].
void check_workers(Index workers);

// The plan's own shares if it has some for so many workers. Otherwise list scheduling: each unit in
// turn goes to the worker that is free first, the lowest on a tie. Hence makespan <= total /
// workers + the longest unit, and workers beyond the number of units have none.
Schedule make_schedule(const Plan& plan, Index workers);

}  // namespace aspp::plan
