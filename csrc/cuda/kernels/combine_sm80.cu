// SPDX-License-Identifier: BSD-3-Clause
// Counts, means and sums of squares of parts become those of the whole (Chan, Golub and LeVeque,
// "Updating formulae and a pairwise algorithm for computing sample variances", 1979), always in the
// same order.
#include "../launch.h"
#include "../ptx/block.cuh"
#include "../ptx/launch.cuh"
#include "../ptx/memory.cuh"

namespace aspp::cuda {
namespace {

constexpr int kChannels = 8;  // of a block: 32 bytes, what memory delivers at a time
constexpr int kLanes = 64;    // parts that it combines side by side

template <class T>
struct Moments {
  T count = 0, mean = 0, squares = 0;
};

template <class T>
__device__ __forceinline__ Moments<T> combined(const Moments<T>& a, const Moments<T>& b) {
  if (b.count == 0) return a;
  const T count = a.count + b.count;
  const T share = b.count / count, difference = b.mean - a.mean;
  return {count, a.mean + difference * share,
          a.squares + b.squares + difference * difference * a.count * share};
}

template <class T>
__global__ void __launch_bounds__(kChannels* kLanes)
    combine_kernel(const __grid_constant__ CombineParams p) {
  auto* const shared = reinterpret_cast<Moments<T>*>(ptx::shared_memory());
  const int channel_of_block = threadIdx.x % kChannels, lane = threadIdx.x / kChannels;
  int block = blockIdx.x, b = 0;
  for (; block >= (p.branch[b].out_channels + kChannels - 1) / kChannels; ++b)
    block -= (p.branch[b].out_channels + kChannels - 1) / kChannels;
  const auto& branch = p.branch[b];
  const int channel = block * kChannels + channel_of_block;
  const bool inside = channel < branch.out_channels;

  Moments<T> own;
  const int columns = (branch.out_channels + p.tile_n - 1) / p.tile_n;  // of tiles
  const int64_t parts = int64_t(branch.tiles / columns) * p.rows;
  for (int64_t part = lane; inside && part < parts; part += kLanes) {
    const int64_t tile = branch.first_tile + part / p.rows * columns + channel / p.tile_n;
    const int64_t row = tile * p.rows + part % p.rows;
    const auto count = ptx::load<int32_t>(p.tile_counts, row);
    if (count == 0) continue;  // its means were not written
    const int64_t at = row * p.tile_n + channel % p.tile_n;
    const auto mean = ptx::load<T>(p.tile_means, at);
    const auto squares = ptx::load<T>(p.tile_squares, at);
    own = combined(own, Moments<T>{T(count), mean, squares});
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    shared[threadIdx.x] = own;
    ptx::sync_block();
    if (lane < half) own = combined(own, shared[threadIdx.x + half * kChannels]);
    ptx::sync_block();
  }
  if (lane != 0 || !inside) return;
  ptx::store<T>(p.mean, branch.out_channel + channel, own.mean);
  ptx::store<T>(p.squares, branch.out_channel + channel, own.squares);
}

template <class T>
cudaError_t launch(const CombineParams& params, cudaStream_t stream) {
  int blocks = 0;
  for (int b = 0; b < params.branches; ++b)
    blocks += (params.branch[b].out_channels + kChannels - 1) / kChannels;
  constexpr int kThreads = kChannels * kLanes;
  return ptx::launch(combine_kernel<T>, "combine_kernel", blocks, kThreads,
                     kThreads * sizeof(Moments<T>), stream, params);
}

}  // namespace

cudaError_t launch_combine_sm80(Math math, const CombineParams& params, cudaStream_t stream) {
  return math == Math::float64 ? launch<double>(params, stream) : launch<float>(params, stream);
}

}  // namespace aspp::cuda
