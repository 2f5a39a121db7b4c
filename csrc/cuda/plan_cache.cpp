// SPDX-License-Identifier: BSD-3-Clause
#include "plan_cache.h"

#include <algorithm>
#include <cstring>

namespace aspp::cuda {
namespace {

// Allows this thread what would invalidate a capture, its own or another's, if it took part in it.
class OutsideCaptures {
 public:
  OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCaptures(const OutsideCaptures&) = delete;
  OutsideCaptures& operator=(const OutsideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Appends the bytes of `list`, to be read as its own type; returns where they begin.
template <class T>
size_t append(std::vector<char>& bytes, const std::vector<T>& list) {
  const size_t begin = (bytes.size() + 15) / 16 * 16;
  bytes.resize(begin + list.size() * sizeof(T));
  if (!list.empty()) std::memcpy(&bytes[begin], list.data(), list.size() * sizeof(T));
  return begin;
}

std::vector<plan::Index> key_of(int device, const plan::Problem& problem, plan::Pass pass,
                                const plan::Tile& tile, plan::Index workers) {
  std::vector<plan::Index> key{device,
                               static_cast<plan::Index>(pass),
                               tile.m,
                               tile.n,
                               tile.k,
                               tile.tail,
                               workers,
                               problem.batch,
                               problem.height,
                               problem.width,
                               problem.in_channels};
  for (const auto& [kernel, rate, out_channels] : problem.branches)
    key.insert(key.end(), {kernel.h, kernel.w, rate.h, rate.w, out_channels});
  return key;
}

}  // namespace

DevicePlan::~DevicePlan() {
  if (memory_ == nullptr) return;
  const OutsideCaptures outside;
  cudaFree(memory_);  // waits for kernels that still read it
}

cudaError_t DevicePlan::upload(const WorkList& list, cudaStream_t copies) {
  std::vector<char> bytes;
  append(bytes, list.units);
  worker_begin_ = append(bytes, list.worker_begin);
  regions_ = append(bytes, list.regions);
  taps_ = append(bytes, list.taps);
  runs_ = append(bytes, list.runs);
  workers = list.workers();
  partials = list.partials;
  counters = list.counters;
  tiles = list.tiles;
  branch_tiles = list.branch_tiles;
  void* memory = nullptr;
  if (const cudaError_t error = cudaMalloc(&memory, bytes.size()); error != cudaSuccess)
    return error;
  memory_ = static_cast<char*>(memory);
  const cudaError_t error =
      cudaMemcpyAsync(memory_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, copies);
  return error == cudaSuccess ? cudaStreamSynchronize(copies) : error;
}

void DevicePlan::describe(WorkParams& params) const {
  params.units = reinterpret_cast<const WorkUnit*>(memory_);
  params.worker_begin = reinterpret_cast<const int32_t*>(memory_ + worker_begin_);
  params.regions = reinterpret_cast<const WorkRegion*>(memory_ + regions_);
  params.taps = reinterpret_cast<const WorkTap*>(memory_ + taps_);
  params.runs = reinterpret_cast<const WorkRun*>(memory_ + runs_);
  params.workers = workers;
}

size_t PlanCache::Hash::operator()(const Key* key) const {
  size_t hash = 14695981039346656037u;  // FNV-1a
  for (const plan::Index value : *key) hash = (hash ^ static_cast<size_t>(value)) * 1099511628211u;
  return hash;
}

size_t PlanCache::size() const {
  const std::lock_guard lock(plan_mutex);
  return entries_.size();
}

cudaError_t PlanCache::copy_stream(int device, cudaStream_t& stream) {
  {
    const std::lock_guard lock(plan_mutex);
    if (const auto found = copy_streams_.find(device); found != copy_streams_.end()) {
      stream = found->second;
      return cudaSuccess;
    }
  }
  cudaStream_t made = nullptr;
  if (const auto error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
      error != cudaSuccess)
    return error;
  {
    const std::lock_guard lock(plan_mutex);
    stream = copy_streams_.try_emplace(device, made).first->second;
  }
  return stream == made ? cudaSuccess : cudaStreamDestroy(made);
}

cudaError_t PlanCache::make(int device, const WorkList& list, std::shared_ptr<DevicePlan>& plan) {
  cudaStream_t copies = nullptr;
  const cudaError_t error = copy_stream(device, copies);
  plan = std::make_shared<DevicePlan>();
  return error == cudaSuccess ? plan->upload(list, copies) : error;
}

void PlanCache::shrink(std::vector<SharedPlan>& evicted) {
  const auto captured = std::count_if(entries_.begin(), entries_.end(),
                                      [](const Entry& entry) { return entry.captured; });
  if (entries_.size() - size_t(captured) <= capacity_) return;
  const size_t most = std::max<size_t>(1, capacity_ / 2);
  for (auto oldest = entries_.end(); evicted.size() < most;) {
    --oldest;
    if (oldest->captured) continue;
    evicted.push_back(std::move(oldest->plan));
    index_.erase(&oldest->key);
    oldest = entries_.erase(oldest);
  }
}

bool PlanCache::look_up(const Key& key, bool captured, SharedPlan& plan) {
  const auto found = index_.find(&key);
  if (found == index_.end()) return false;
  entries_.splice(entries_.begin(), entries_, found->second);
  entries_.front().captured |= captured;
  plan = entries_.front().plan;
  return true;
}

cudaError_t PlanCache::find(int device, const plan::Problem& problem, plan::Pass pass,
                            const plan::Tile& tile, plan::Index workers, cudaStream_t stream,
                            SharedPlan& plan) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, &status); error != cudaSuccess)
    return error;
  const bool captured = status != cudaStreamCaptureStatusNone;
  Key key = key_of(device, problem, pass, tile, workers);
  std::vector<SharedPlan> evicted;  // freed after the lock, as freeing waits for the device
  {
    const std::lock_guard lock(plan_mutex);
    if (look_up(key, captured, plan)) return cudaSuccess;
  }
  const auto order = pass == plan::Pass::separable ? plan::Order::phases : plan::Order::cheapest;
  const plan::Options options{order, tile, workers};
  const WorkList list = make_work_list(problem, pass, options, workers);
  const OutsideCaptures outside;
  std::shared_ptr<DevicePlan> made;
  cudaError_t error = make(device, list, made);
  if (error == cudaErrorMemoryAllocation && make_room_ != nullptr) {
    cudaGetLastError();  // what is mended must not be found by the next check of another's launch
    make_room_(device);
    error = make(device, list, made);
  }
  if (error != cudaSuccess) return error;
  const std::lock_guard lock(plan_mutex);
  if (look_up(key, captured, plan)) return cudaSuccess;
  entries_.push_front({std::move(key), made, captured});
  index_.emplace(&entries_.front().key, entries_.begin());
  if (!captured) shrink(evicted);
  plan = made;
  return cudaSuccess;
}

}  // namespace aspp::cuda
