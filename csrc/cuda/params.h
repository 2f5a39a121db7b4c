// SPDX-License-Identifier: BSD-3-Clause
// What a launch is told. Plain data: no tensor, nothing of torch.
#pragma once

#include <cstdint>

#include "../plan/plan.h"

namespace aspp::cuda {

// A work list is the planner's, with no pointer and no dtype in it.
using plan::TileRange;
using plan::WorkList;
using plan::WorkRegion;
using plan::WorkRun;
using plan::WorkTap;
using plan::WorkUnit;

// How products are computed and what memory holds.
//   bfloat16, float16: 2 bytes, tensor cores, float32 sums
//   tf32:              4 bytes, tensor cores with operands rounded to 10 bits, float32 sums
//   float32, float64:  fused multiply-adds of that type
enum class Math : int32_t { bfloat16, float16, tf32, float32, float64 };

inline constexpr int kMaths = 5;
inline constexpr int kMaxBranches = 64;
// Pixels of the batch, channels and what else kernels count in 32 bits, to the end of the last
// tile.
inline constexpr int64_t kMostCounted = (int64_t(1) << 31) - (1 << 10);

constexpr int bytes_of(Math math) {
  return math == Math::float64 ? 8 : math == Math::tf32 || math == Math::float32 ? 4 : 2;
}

// Elements in 16 bytes: rows of every operand begin at a multiple of it and their channels are
// zero up to a multiple of it.
constexpr int chunk_of(Math math) { return 16 / bytes_of(math); }

// One launch over a work list. [P, ...] counts pixels of the batch: (n * height + y) * width + x.
//               a                     b               out
//   forward     of every branch       weights         [P, out_pitch]
//   separable   x [P, a_pitch]        weights         [P, out_pitch]
//   grad_input  grad [P, a_pitch]     weights         grad_x [P, out_pitch]
//   grad_weight grad [P, a_pitch]     x [P, b_pitch]  grad_weight of every branch
// a, b and the weights begin at a multiple of 16 bytes and their pitches, of less than 2^31 bytes,
// are multiples of a chunk; out may begin and lie anywhere.
struct WorkParams {
  const WorkUnit* units;
  const int32_t* worker_begin;
  const WorkRegion* regions;
  const WorkTap* taps;
  const WorkRun* runs;
  int32_t workers;

  int32_t batch, height, width;
  int32_t in_channels;           // C
  int32_t weight_channels;       // C rounded up to a chunk
  int32_t grad_weight_channels;  // forward, grad_input: unused
  const void* a;                 // forward: unused
  int32_t a_pitch;
  const void* b;
  int32_t b_pitch;
  void* out;
  int64_t out_pitch;

  // forward, separable: out = relu(sum * scale + shift); null for none. In the dtype of out.
  const void* scale;    // [sum O]
  const void* shift;    // [sum O], or [N, sum O] with shift_pitch = sum O
  int64_t shift_pitch;  // 0: the same for every sample
  int32_t relu;

  // Where units have slices: [partials, tile.m * tile.n] sums (float64 for float64, else float32)
  // and [counters] zeros.
  void* partials;
  uint32_t* counters;

  // forward only, null for none: of the rounded values, per output tile and row of warps
  // (rows = tile.m / warp_m): means and sums of squared differences from them [tiles, rows,
  // tile.n], of the type of the sums, and how many pixels they are of [tiles, rows].
  void* tile_means;
  void* tile_squares;
  int32_t* tile_counts;
};

struct BranchOperand {
  const void* a;         // forward: what the branch reads, [P, a_pitch]
  const void* weight;    // forward, grad_input: [O, taps, weight_channels]
  void* grad_weight;     // grad_weight: [O, taps, grad_weight_channels]
  int32_t taps;          // kernel height * kernel width
  int32_t out_channels;  // O
  int32_t a_pitch;       // forward
  int32_t a_channel;     // grad_input, grad_weight: the branch's first channel in `a`
  int32_t out_channel;   // forward: the branch's first channel in `out`, in scale and in shift
};

struct PyramidParams : WorkParams {
  BranchOperand branches[kMaxBranches];
};

static_assert(sizeof(PyramidParams) <= 4096, "kernel parameters have 4 KB");

// out[b, c, r] = in[b, r, c], with zeros for rows <= r < out_columns: NCHW to NHWC, weights to
// [O, taps, C] and both back. Steps and pitches count elements of `bytes` bytes.
struct TransposeParams {
  const void* in;
  int64_t in_batch, in_row, in_column;  // steps
  void* out;
  int64_t out_batch, out_pitch;  // from batch to batch, from output row (c) to output row
  int64_t batch, rows, columns;
  int64_t out_columns;  // >= rows
  int32_t bytes;        // 2, 4 or 8
};

// WorkParams::tile_* of all tiles become those of the channels. Of float64 for Math::float64,
// else of float32.
struct CombineParams {
  const void* tile_means;
  const void* tile_squares;
  const int32_t* tile_counts;
  void* mean;     // [sum O]
  void* squares;  // [sum O]: sum of squared differences from the mean
  int32_t rows;   // per tile
  int32_t tile_n;
  int32_t branches;
  struct {
    int32_t first_tile, tiles, out_channel, out_channels;
  } branch[kMaxBranches];
};

}  // namespace aspp::cuda
