// SPDX-License-Identifier: BSD-3-Clause
// Minimal filtering of one dense branch (csrc/plan/minimal.h), as the kernels are told of it.
#pragma once

#include "params.h"

namespace aspp {

// Linear combinations of lines: result i is the sum over e in [start[i], start[i + 1]) of
// coefficient[e] times line at[e].
struct Combinations {
  const int64_t* start = nullptr;  // [count + 1]
  const int64_t* at = nullptr;
  const double* coefficient = nullptr;
  int64_t count = 0;
};

// One axis of a chunk. Products stand in the order of their weights.
struct MinimalLines {
  const int64_t* read = nullptr;  // positions that products read, ascending
  int64_t read_count = 0;
  const int64_t* written = nullptr;       // positions of the outputs, ascending
  Combinations inputs;                    // product <- index into read
  Combinations outputs;                   // index into written <- product
  Combinations pulled;                    // the transpose: product <- index into written
  const int64_t* weight_begin = nullptr;  // [weights + 1] first product of each weight
  int64_t weights = 0;
  double denominator = 1;  // of the outputs

  int64_t products() const { return inputs.count; }
};

// A panel: so many output channels lie together, in the weights and in the sums.
inline constexpr int64_t kPanel = 64;
inline constexpr int64_t panels(int64_t channels) { return (channels + kPanel - 1) / kPanel; }
inline constexpr int64_t panel_width(int64_t channels, int64_t panel) {
  const int64_t rest = padded(channels) - panel * kPanel;
  return rest < kPanel ? rest : kPanel;
}

struct PolyphaseParams {
  Image x;
  int64_t channels = 0, out_channels = 0;
  // T [row weight][column weight][panel][channels][width of the panel]
  const void* weights = nullptr;
  const void* scale = nullptr;  // [padded out_channels] T or null
  const void* shift = nullptr;  // the same, of the first sample
  int64_t shift_n_stride = 0;
  bool relu = false;
  Image out;                     // from the branch's first channel on
  const char* direct = nullptr;  // [N, height, width] or null: outputs to leave alone
  int64_t height = 0, width = 0;
  bool accumulate = false;  // add to what out holds; out is T then, with stride 1 over channels
};

// Products of a chunk: rows x columns of them, rows * columns GEMM rows in all.
struct PolyphaseChunk {
  const MinimalLines* rows = nullptr;
  const MinimalLines* columns = nullptr;
  int64_t n = 0;
  int64_t first_panel = 0, panel_count = 0;
  // Null, or where time spent is added: combining inputs, products, combining outputs.
  int64_t* nanoseconds = nullptr;
};

// From a branch's taps to the matrices of all pairs of row and column weights.
struct MinimalWeights {
  // element (tap, c, o) at tap * tap_stride + c * row_stride + o * column_stride; where that is 1,
  // o runs to padded(out_channels)
  const void* taps = nullptr;
  int64_t tap_stride = 0, row_stride = 0, column_stride = 1;
  int64_t kernel_h = 1, kernel_w = 1;  // 1 or 3
  bool flipped = false;                // last tap first
  int64_t channels = 0, out_channels = 0;
  const double* row_weights = nullptr;     // [row_count, 3] of first, centre and last tap
  const double* column_weights = nullptr;  // [column_count, 3]
  int64_t row_count = 0, column_count = 0;
};

// The gradient of a branch's weight, over the whole batch.
struct PolyphaseGradWeight {
  Image x, grad;                           // grad from the branch's first channel on
  MinimalWeights map;                      // without taps
  const PolyphaseChunk* chunks = nullptr;  // panels unused
  int64_t chunk_count = 0;                 // at least 1
  void* grad_weight = nullptr;             // T[out_channels, channels, kernel_h, kernel_w]
};

}  // namespace aspp
