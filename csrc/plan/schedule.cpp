// SPDX-License-Identifier: BSD-3-Clause
#include "schedule.h"

#include <functional>
#include <queue>
#include <utility>

namespace aspp::plan {

Index Schedule::makespan() const {
  return busy.empty() ? 0 : *std::max_element(busy.begin(), busy.end());
}

Index Schedule::total() const {
  Index result = 0;
  for (const Index each : busy) result = add(result, each, "the cost of a plan");
  return result;
}

void check_workers(Index workers) {
  require(workers >= 1 && workers <= kMaxEntries, "workers must be in [1, ", kMaxEntries,
          "] but is ", workers);
}

Schedule make_schedule(const Plan& plan, Index workers) {
  check_workers(workers);
  using Free = std::pair<Index, Index>;  // (from when, worker)
  std::priority_queue<Free, std::vector<Free>, std::greater<>> free;
  for (Index w = 0; w < workers; ++w) free.emplace(0, w);

  const bool shared = plan.shares > 0 && plan.shares <= workers;
  const auto count = static_cast<Index>(plan.units.size());
  std::vector<Index> worker_of(count);
  Schedule schedule{std::vector<Index>(count), std::vector<Index>(workers + 1),
                    std::vector<Index>(workers)};
  for (Index u = 0; u < count; ++u) {
    const Unit& unit = plan.units[u];
    const Index w = shared ? unit.worker : free.top().second;
    worker_of[u] = w;
    schedule.busy[w] = add(schedule.busy[w], unit_cost(plan, unit), "the cost of a plan");
    ++schedule.begin[w + 1];
    if (shared) continue;
    free.pop();
    free.emplace(schedule.busy[w], w);
  }
  for (Index w = 0; w < workers; ++w) schedule.begin[w + 1] += schedule.begin[w];
  std::vector<Index> next(schedule.begin.begin(), schedule.begin.end() - 1);
  for (Index u = 0; u < count; ++u) schedule.units[next[worker_of[u]]++] = u;
  return schedule;
}

}  // namespace aspp::plan
