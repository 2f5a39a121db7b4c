// SPDX-License-Identifier: BSD-3-Clause
// What a warp computes: kM x kN sums, a stage of k at a time. Every math keeps them like the
// accumulators of mma.m16n8, so that all that follows is shared: sums[i][j][e] of lane (g, t) =
// (lane / 4, lane % 4) is row 16 i + 8 (e / 2) + g, column 8 j + 2 t + e % 2.
#pragma once

#include "../ptx/convert.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "shared_tile.cuh"

namespace aspp::cuda::sm80 {

template <Math kMath>
struct Element {
  using Memory = float;
  using Sum = float;
};
template <>
struct Element<Math::bfloat16> {
  using Memory = ptx::Bf16;
  using Sum = float;
};
template <>
struct Element<Math::float16> {
  using Memory = ptx::F16;
  using Sum = float;
};
template <>
struct Element<Math::float64> {
  using Memory = double;
  using Sum = double;
};

template <class Sum, int kM, int kN>
using Sums = Sum[kM / 16][kN / 8][4];

// Tensor cores: 32 bytes of k per step. Constructed for the warp whose first row is m, a multiple
// of kM, and whose first column is n, a multiple of kN.
template <Math kMath, class TileA, class TileB, Major kA, Major kB, int kM, int kN>
class TensorCores {
  using Fragment = uint32_t[4];
  using LaneA = typename TileA::Lane;
  using LaneB = typename TileB::Lane;
  static constexpr bool kTf32 = kMath == Math::tf32;

 public:
  __device__ __forceinline__ TensorCores(int m, int n, int lane)
      : word_(lane / 4 % 4 * 4),
        a_(kA == Major::k ? LaneA(m + lane % 16, lane / 16)
           : kTf32        ? LaneA(lane % 4, m / 4 + lane / 16)
                          : LaneA(lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2)),
        b_(kB == Major::k ? LaneB(n + lane % 8 + lane / 16 * 8, lane / 8 % 2)
           : kTf32        ? LaneB(lane % 4, n / 4 + lane / 16)
                          : LaneB(lane % 16, n / 8 + lane / 16)) {}

  // sums += A[m .. m + kM, stage] * B[stage, n .. n + kN]
  __device__ __forceinline__ void multiply(Sums<float, kM, kN>& sums, const char* tile_a,
                                           const char* tile_b) const {
    Fragment a[2][kM / 16], b[2][kN / 16];
    const auto load = [&](int step) {
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) load_a(a[step % 2][i], tile_a, i, step);
#pragma unroll
      for (int j = 0; j < kN / 16; ++j) load_b(b[step % 2][j], tile_b, j, step);
    };
    load(0);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (step < 3) load(step + 1);  // while the products of this step run
#pragma unroll
      for (int i = 0; i < kM / 16; ++i) round(a[step % 2][i]);
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        Fragment& both = b[step % 2][j / 2];
        if (j % 2 == 0) round(both);
        const uint32_t own[2] = {both[j % 2 * 2], both[j % 2 * 2 + 1]};
#pragma unroll
        for (int i = 0; i < kM / 16; ++i) product(sums[i][j], a[step % 2][i], own);
      }
    }
  }

 private:
  // Four-byte elements cannot be transposed by ldmatrix, which moves pairs of two bytes.
  __device__ __forceinline__ uint32_t read(const char* tile, int offset) const {
    return *reinterpret_cast<const uint32_t*>(tile + offset + word_);
  }

  // Rows 16 i .. 16 i + 15 of the warp's.
  __device__ __forceinline__ void load_a(Fragment& a, const char* tile, int i, int step) const {
    if constexpr (kA == Major::k) {
      ptx::ldmatrix_x4(a, tile + a_(16 * i, 2 * step));
    } else if constexpr (!kTf32) {
      ptx::ldmatrix_x4_trans(a, tile + a_(16 * step, 2 * i));
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = read(tile, a_(8 * step + e / 2 * 4, 4 * i + e % 2 * 2));
    }
  }

  // Columns 16 j .. 16 j + 15: [0], [1] are those of the first eight.
  __device__ __forceinline__ void load_b(Fragment& b, const char* tile, int j, int step) const {
    if constexpr (kB == Major::k) {
      ptx::ldmatrix_x4(b, tile + b_(16 * j, 2 * step));
    } else if constexpr (!kTf32) {
      ptx::ldmatrix_x4_trans(b, tile + b_(16 * step, 2 * j));
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) b[e] = read(tile, b_(8 * step + e % 2 * 4, 4 * j + e / 2 * 2));
    }
  }

  // Without it the tensor cores drop the low bits, which is rounding towards zero.
  __device__ __forceinline__ static void round(Fragment& fragment) {
    if constexpr (kTf32)
#pragma unroll
      for (uint32_t& bits : fragment) bits = ptx::round_to_tf32(bits);
  }

  __device__ __forceinline__ static void product(float (&c)[4], const Fragment& a,
                                                 const uint32_t (&b)[2]) {
    if constexpr (kMath == Math::bfloat16) ptx::mma_m16n8k16_bf16(c, a, b);
    if constexpr (kMath == Math::float16) ptx::mma_m16n8k16_f16(c, a, b);
    if constexpr (kTf32) ptx::mma_m16n8k8_tf32(c, a, b);
  }

  const int
      word_;  // of a lane's elements in their chunks; only where four bytes are read at a time
  const LaneA a_;
  const LaneB b_;
};

// Multiply-adds of the type itself, one chunk of k at a time.
template <class T, class TileA, class TileB, Major kA, Major kB, int kM, int kN>
class MultiplyAdds {
  static constexpr int kRun = 16 / sizeof(T);
  struct alignas(16) Run {
    T values[kRun];
  };

 public:
  __device__ __forceinline__ MultiplyAdds(int m, int n, int lane)
      : row_(m + lane / 4),
        column_(n + lane % 4 * 2) {}

  // As above.
  __device__ __forceinline__ void multiply(Sums<T, kM, kN>& sums, const char* tile_a,
                                           const char* tile_b) const {
#pragma unroll 1
    for (int chunk = 0; chunk < 8; ++chunk) {
      Run a[kM / 8];
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) a[i] = load<TileA, kA>(tile_a, row_ + 8 * i, chunk);
#pragma unroll
      for (int j = 0; j < kN / 4; ++j) {
        const Run b = load<TileB, kB>(tile_b, column_ + j / 2 * 8 + j % 2, chunk);
#pragma unroll
        for (int i = 0; i < kM / 8; ++i)
#pragma unroll
          for (int q = 0; q < kRun; ++q)
            sums[i / 2][j / 2][i % 2 * 2 + j % 2] += a[i].values[q] * b.values[q];
      }
    }
  }

 private:
  template <class Tile, Major kMajor>
  __device__ __forceinline__ static Run load(const char* tile, int mn, int chunk) {
    Run run;
    if constexpr (kMajor == Major::k) {
      run = *reinterpret_cast<const Run*>(tile + Tile::offset(mn, chunk));
    } else {
#pragma unroll
      for (int q = 0; q < kRun; ++q)
        run.values[q] = *reinterpret_cast<const T*>(tile + Tile::element(mn, chunk * kRun + q));
    }
    return run;
  }

  const int row_, column_;
};

template <Math kMath, class TileA, class TileB, Major kA, Major kB, int kM, int kN>
struct PickWarpMath {
  using Type = TensorCores<kMath, TileA, TileB, kA, kB, kM, kN>;
};
template <class TileA, class TileB, Major kA, Major kB, int kM, int kN>
struct PickWarpMath<Math::float32, TileA, TileB, kA, kB, kM, kN> {
  using Type = MultiplyAdds<float, TileA, TileB, kA, kB, kM, kN>;
};
template <class TileA, class TileB, Major kA, Major kB, int kM, int kN>
struct PickWarpMath<Math::float64, TileA, TileB, kA, kB, kM, kN> {
  using Type = MultiplyAdds<double, TileA, TileB, kA, kB, kM, kN>;
};

}  // namespace aspp::cuda::sm80
