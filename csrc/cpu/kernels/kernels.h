// SPDX-License-Identifier: BSD-3-Clause
// The functions every instruction set provides, and the one that is picked for this machine.
#pragma once

#include <string_view>

#include "params.h"
#include "polyphase_params.h"

namespace aspp {

// `double_precision` chooses the compute type T. `scratch_bytes` returns what a call of the same
// name needs per thread; the caller owns scratch (64-byte aligned) and threads.
struct Kernels {
  const char* isa;
  bool bfloat16_products;  // with bfloat16 x, forward weights are bfloat16 instead of float
  int64_t (*forward_scratch)(const PyramidParams&, bool double_precision);
  // some pixels of image n, a chunk of them (see chunk_pixels); `chunk` counts over the batch
  void (*forward_chunk)(const PyramidParams&, int64_t n, int64_t chunk, const Run* runs,
                        int64_t run_count, void* scratch, bool double_precision);
  int64_t (*backward_scratch)(const SeparableBackwardParams&, bool double_precision);
  int64_t backward_channels;  // channels of one backward block
  void (*backward_block)(const SeparableBackwardParams&, int64_t channel, void* scratch,
                         bool double_precision);
  // rows [first, last) of image n into dst [rows * W, stride], channel last, padding columns zero;
  // dst is the compute type of x, or bfloat16 where x is
  void (*to_pixels)(const Image& x, int64_t n, int64_t channels, int64_t width, int64_t first,
                    int64_t last, void* dst, Dtype dst_dtype, int64_t stride);
  // rows [count, stride] T -> out element (channel, x = row) of image 0, row 0
  void (*from_pixels)(const void* rows, int64_t stride, int64_t count, int64_t channels,
                      const Image& out, bool double_precision);
  // scratch: [W, raw_stride] T
  void (*finish_rows)(const FinishParams&, int64_t n, int64_t first, int64_t last, void* scratch,
                      bool double_precision);
  int64_t (*polyphase_scratch)(const PolyphaseChunk&, bool double_precision);
  void (*polyphase_forward)(const PolyphaseParams&, const PolyphaseChunk&, void* scratch,
                            bool double_precision);
  int64_t polyphase_block;  // input channels of one task of the gradient of a weight
  int64_t (*polyphase_grad_weight_scratch)(const PolyphaseGradWeight&, int64_t panel_count,
                                           bool double_precision);
  // of one block of input channels and some panels of output channels
  void (*polyphase_grad_weight)(const PolyphaseGradWeight&, int64_t channel, int64_t panel,
                                int64_t panel_count, void* scratch, bool double_precision);
  // channels [first, last) of a panel of all matrices, into T[matrices][panel][channels][width]
  void (*combine_taps)(const MinimalWeights&, int64_t panel, int64_t first, int64_t last, void* to,
                       bool double_precision);
  uint64_t (*checksum)(const char* data, int64_t bytes, uint64_t seed);
  // sums of squares over channels, of rows [first, last) of image n -> to[rows, W]
  void (*pixel_energies)(const Image& x, int64_t n, int64_t channels, int64_t width, int64_t first,
                         int64_t last, double* to, bool double_precision);
  // of rows [pixels, channels], without b or centre where null (see channel_sums.h)
  void (*channel_sums)(const void* a, const void* b, const double* centre, int64_t pixels,
                       int64_t channels, double* sums, double* products, bool double_precision);
  // to = (a - offset - (b - centre) * slope) * scale, of rows and vectors of T
  void (*channel_affine)(const void* a, const void* b, const void* const (&vectors)[4],
                         int64_t pixels, int64_t channels, void* to, bool double_precision);
};

// Of the best instruction set this machine runs, or of what ASPP_EXT_ISA was when the library was
// loaded.
const Kernels& kernels();
// ... or of another from now on, "" for the best: while no call runs.
void use_kernels(std::string_view limit);

}  // namespace aspp
