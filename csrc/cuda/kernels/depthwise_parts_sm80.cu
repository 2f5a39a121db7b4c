// SPDX-License-Identifier: BSD-3-Clause
// Around the depthwise kernels: weights and what is between become what they read, and sums of
// parts become gradients, always in the same order.
#include "../depthwise.h"
#include "../ptx/block.cuh"
#include "../ptx/convert.cuh"
#include "../ptx/launch.cuh"
#include "../ptx/memory.cuh"
#include "warp_math.cuh"

namespace aspp::cuda {
namespace sm80 {
namespace {

constexpr int kThreads = 256;
constexpr int kChannels = 8;  // of a block: 32 bytes, what memory delivers at a time
constexpr int kLanes = kThreads / kChannels;  // parts that it adds side by side

constexpr int kTaps = 32;  // of a block that packs weights

// Blocks: [branches, of 32 taps, of 256 channels].
template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_filters_kernel(const __grid_constant__ PackFiltersParams p) {
  const int columns = (p.pitch + kThreads - 1) / kThreads;
  const int groups = (p.most_taps + kTaps - 1) / kTaps;
  const int column = blockIdx.x % columns, rest = blockIdx.x / columns;
  const auto& branch = p.branch[rest / groups];
  const int64_t channel = int64_t(column) * kThreads + threadIdx.x;
  if (channel >= p.pitch) return;
  const T* const from = static_cast<const T*>(branch.weight) + channel * branch.taps;
  T* const to = static_cast<T*>(branch.out) + channel;
  const int first = rest % groups * kTaps, end = min(first + kTaps, branch.taps);
  for (int tap = first; tap < end; ++tap)
    ptx::store<T>(to, int64_t(tap) * p.pitch, channel < p.channels ? ptx::load<T>(from, tap) : T{});
}

template <class T>
cudaError_t launch_filters(const PackFiltersParams& p, cudaStream_t stream) {
  const int64_t columns = (int64_t(p.pitch) + kThreads - 1) / kThreads;
  const int64_t blocks = columns * ((p.most_taps + kTaps - 1) / kTaps) * p.branches;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return ptx::launch(pack_filters_kernel<T>, "pack_filters_kernel", int(blocks), kThreads, 0,
                     stream, p);
}

// Blocks: [branches, of 256 values].
template <class From, class Sum>
__global__ void __launch_bounds__(kThreads)
    pack_affine_kernel(const __grid_constant__ PackAffineParams p) {
  const int blocks = (p.pitch + kThreads - 1) / kThreads;
  const auto& branch = p.branch[blockIdx.x / blocks];
  const int64_t channel = int64_t(blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (channel >= p.pitch) return;
  const bool inside = channel < p.channels;
  const auto value = [&](const void* values) {
    return inside ? Sum(ptx::to_float(ptx::load<From>(values, channel))) : Sum(0);
  };
  ptx::store<Sum>(branch.out, channel, value(branch.scale));
  ptx::store<Sum>(branch.out, p.pitch + channel, value(branch.shift));
}

template <class From, class Sum>
cudaError_t launch_pack(const PackAffineParams& params, cudaStream_t stream) {
  const int blocks = (params.pitch + kThreads - 1) / kThreads * params.branches;
  return ptx::launch(pack_affine_kernel<From, Sum>, "pack_affine_kernel", blocks, kThreads, 0,
                     stream, params);
}

// Blocks: [rows, of 8 channels].
template <class Sum, class To>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const __grid_constant__ SumPartsParams p) {
  auto* const shared = reinterpret_cast<Sum*>(ptx::shared_memory());
  const int blocks = (p.channels + kChannels - 1) / kChannels;
  const int row = blockIdx.x / blocks, lane = threadIdx.x / kChannels;
  const int64_t channel = int64_t(blockIdx.x % blocks) * kChannels + threadIdx.x % kChannels;
  // The window is in the middle of the kernel.
  const int window_row = row / p.kernel_w - (p.kernel_h - p.window_h) / 2;
  const int window_column = row % p.kernel_w - (p.kernel_w - p.window_w) / 2;
  const bool live = window_row >= 0 && window_row < p.window_h && window_column >= 0 &&
                    window_column < p.window_w;
  Sum sum = 0;
  if (live && channel < p.channels) {
    const int64_t place = int64_t(window_row) * p.window_w + window_column;
    const Sum* from = static_cast<const Sum*>(p.sums) + place * p.pitch + channel;
    for (int64_t part = lane; part < p.parts; part += kLanes)
      sum += ptx::load<Sum>(from, part * p.part_step);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    shared[threadIdx.x] = sum;
    ptx::sync_block();
    if (lane < half) sum += shared[threadIdx.x + half * kChannels];
    ptx::sync_block();
  }
  if (lane == 0 && channel < p.channels)
    ptx::store<To>(p.out, channel * p.channel_step + row, ptx::from_float<To>(sum));
}

template <class Sum, class To>
cudaError_t launch_sum(const SumPartsParams& p, cudaStream_t stream) {
  const int64_t rows = int64_t(p.kernel_h) * p.kernel_w;
  const int64_t blocks = rows * ((p.channels + kChannels - 1) / kChannels);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return ptx::launch(sum_parts_kernel<Sum, To>, "sum_parts_kernel", int(blocks), kThreads,
                     kThreads * sizeof(Sum), stream, p);
}

}  // namespace
}  // namespace sm80

cudaError_t launch_pack_filters_sm80(Math math, const PackFiltersParams& params,
                                     cudaStream_t stream) {
  switch (bytes_of(math)) {
    case 2: return sm80::launch_filters<uint16_t>(params, stream);
    case 4: return sm80::launch_filters<uint32_t>(params, stream);
    default: return sm80::launch_filters<uint64_t>(params, stream);
  }
}

cudaError_t launch_pack_affine_sm80(Math math, const PackAffineParams& params,
                                    cudaStream_t stream) {
  if (math == Math::float64) return sm80::launch_pack<double, double>(params, stream);
  if (params.of_sums != 0) return sm80::launch_pack<float, float>(params, stream);
  switch (math) {
    case Math::bfloat16: return sm80::launch_pack<ptx::Bf16, float>(params, stream);
    case Math::float16: return sm80::launch_pack<ptx::F16, float>(params, stream);
    default: return sm80::launch_pack<float, float>(params, stream);
  }
}

cudaError_t launch_sum_parts_sm80(Math math, const SumPartsParams& params, cudaStream_t stream) {
  if (math == Math::float64) return sm80::launch_sum<double, double>(params, stream);
  if (params.out_is_sum != 0) return sm80::launch_sum<float, float>(params, stream);
  switch (math) {
    case Math::bfloat16: return sm80::launch_sum<float, ptx::Bf16>(params, stream);
    case Math::float16: return sm80::launch_sum<float, ptx::F16>(params, stream);
    default: return sm80::launch_sum<float, float>(params, stream);
  }
}

}  // namespace aspp::cuda
