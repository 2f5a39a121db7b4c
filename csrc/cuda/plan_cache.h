// SPDX-License-Identifier: BSD-3-Clause
// Work lists on the devices, one for each shape that was asked for.
#pragma once

#include <cuda_runtime.h>

#include <list>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "../plan_mutex.h"
#include "params.h"

namespace aspp::cuda {

// A work list in a device's memory, which is freed with it.
class DevicePlan {
 public:
  DevicePlan() = default;
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;
  ~DevicePlan();

  int32_t workers = 0, partials = 0, counters = 0, tiles = 0;
  std::vector<TileRange> branch_tiles;

  // One allocation for all five, complete when this returns. `copies` is a stream of our own.
  cudaError_t upload(const WorkList& list, cudaStream_t copies);
  // Sets units, worker_begin, regions, taps, runs and workers.
  void describe(WorkParams& params) const;

 private:
  char* memory_ = nullptr;
  size_t worker_begin_ = 0, regions_ = 0, taps_ = 0, runs_ = 0;  // bytes from the beginning
};

using SharedPlan = std::shared_ptr<const DevicePlan>;

// Keeps the plans used last, `capacity` of them or half as many: freeing waits for the device, so
// that many go at once. One that a captured graph may launch again is kept besides, for good. Plans
// are made without any of the caller's streams, so they may be made while one of them is captured
// and are valid on all of them. May be called from any thread; plan_mutex is held for a look or an
// entry, and two threads may make the same plan.
//
// Their memory is CUDA's own, not PyTorch's: that of a graph that is captured or warmed up belongs
// to the graph. Where the device has none left, make_room(device) is asked for some, once.
class PlanCache {
 public:
  using MakeRoom = void (*)(int device);
  explicit PlanCache(size_t capacity, MakeRoom make_room = nullptr)
      : capacity_(capacity),
        make_room_(make_room) {}

  // The plan of `problem` for `workers` blocks of `tile` on `device`, the current one. To be held
  // until the launch is made. Throws where make_work_list does.
  cudaError_t find(int device, const plan::Problem& problem, plan::Pass pass,
                   const plan::Tile& tile, plan::Index workers, cudaStream_t stream,
                   SharedPlan& plan);
  size_t size() const;

 private:
  using Key = std::vector<plan::Index>;
  struct Entry {
    Key key;
    SharedPlan plan;
    bool captured;
  };
  using Entries = std::list<Entry>;  // the one used last first, guarded by plan_mutex, as all else
  struct Hash {
    size_t operator()(const Key* key) const;
  };
  struct Equal {
    bool operator()(const Key* a, const Key* b) const { return *a == *b; }
  };

  bool look_up(const Key& key, bool captured, SharedPlan& plan);
  cudaError_t make(int device, const WorkList& list, std::shared_ptr<DevicePlan>& plan);
  cudaError_t copy_stream(int device, cudaStream_t& stream);
  void shrink(std::vector<SharedPlan>& evicted);

  const size_t capacity_;
  const MakeRoom make_room_;
  Entries entries_;
  std::unordered_map<const Key*, Entries::iterator, Hash, Equal> index_;
  std::map<int, cudaStream_t> copy_streams_;  // per device
};

}  // namespace aspp::cuda
