// SPDX-License-Identifier: BSD-3-Clause
#include "prepare.h"

namespace aspp::cuda {
namespace {

struct Device {
  int index = 0;
  int processors = 0;
  int shared_bytes = 0;          // at most, of a block
  int shared_per_processor = 0;  // of its blocks together
  int shared_reserved = 0;       // of a block, by the system
};

cudaError_t ask(Device& device) {
  const auto attribute = [&](int& value, cudaDeviceAttr which) {
    return cudaDeviceGetAttribute(&value, which, device.index);
  };
  cudaError_t error = cudaGetDevice(&device.index);
  if (error == cudaSuccess) error = attribute(device.processors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess)
    error = attribute(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error == cudaSuccess)
    error = attribute(device.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  if (error == cudaSuccess)
    error = attribute(device.shared_reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  return error;
}

// The columns of the widest output.
int64_t columns(const plan::Problem& problem, plan::Pass pass) {
  if (pass != plan::Pass::forward) return problem.in_channels;
  int64_t widest = 0;
  for (const plan::Branch& branch : problem.branches)
    widest = std::max(widest, branch.out_channels);
  return widest;
}

}  // namespace

int64_t Prepared::partial_bytes(Math math) const {
  const TileShape tile = tile_shape(math, shape);
  return int64_t(plan->partials) * tile.m * tile.n * (math == Math::float64 ? 8 : 4);
}

cudaError_t prepare_pyramid(PlanCache& cache, plan::Pass pass, Math math,
                            const plan::Problem& problem, cudaStream_t stream, Prepared& prepared) {
  Device device;
  if (const cudaError_t error = ask(device); error != cudaSuccess) return error;
  prepared.shape = pick_shape(math, columns(problem, pass), device.shared_bytes);
  plan::require(prepared.shape >= 0, "a block needs ", tile_shape(math, kShapes - 1).shared_bytes(),
                " bytes of shared memory but the device has ", device.shared_bytes);
  const TileShape tile = tile_shape(math, prepared.shape);
  const int fitting = device.shared_per_processor / (tile.shared_bytes() + device.shared_reserved);
  const int blocks = std::max(1, std::min<int>(tile.blocks, fitting));
  return cache.find(device.index, problem, pass, tile.tile(), int64_t(device.processors) * blocks,
                    stream, prepared.plan);
}

cudaError_t prepare_separable(PlanCache& cache, Math math, const plan::Problem& problem,
                              std::string_view wish, cudaStream_t stream, Prepared& prepared,
                              FusedChoice& choice) {
  Device device;
  if (const cudaError_t error = ask(device); error != cudaSuccess) return error;
  choice = choose_fused(math, problem, device.shared_bytes);
  const bool forced = wish == "fused";
  plan::require(!forced || choice.shape >= 0, "the fused kernel cannot run: ", choice.why_not);
  if (wish == "stored" || !(forced || choice.is_fused())) return cudaSuccess;
  prepared.shape = choice.shape;
  return cache.find(device.index, problem, plan::Pass::separable,
                    tile_shape(math, choice.shape).tile(), device.processors, stream,
                    prepared.plan);
}

}  // namespace aspp::cuda
