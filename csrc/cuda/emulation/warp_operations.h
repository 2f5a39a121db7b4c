// SPDX-License-Identifier: BSD-3-Clause
// What the lanes of a warp compute together, and what each brings for it.
#pragma once

#include "scheduler.h"

namespace aspp::cuda::emulation {

struct Fragments {
  float* c;           // 4, [16, 8]
  const uint32_t* a;  // 4, [16, k]
  const uint32_t* b;  // 2, [k, 8]
};
extern const Operation kMmaBf16, kMmaF16, kMmaTf32;

struct alignas(16) RowWords {
  uint32_t words[4];
};
struct MatrixRow {
  RowWords row;
  uint32_t* r;
};
extern const Operation kLdmatrix, kLdmatrixTrans;

struct Exchange {
  uint64_t value;
  unsigned lane;
  uint64_t result;
};
extern const Operation kShuffle;

}  // namespace aspp::cuda::emulation
