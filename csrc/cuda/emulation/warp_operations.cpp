// SPDX-License-Identifier: BSD-3-Clause
// Layouts: PTX ISA, "Matrix fragments for mma.m16n8k16" (and .m16n8k8 of .tf32), "ldmatrix".
#include "warp_operations.h"

#include "numbers.h"

namespace aspp::cuda::emulation {
namespace {

// Fixed arrays only, and another thread's stack: nothing for a sanitizer to watch, much to slow.
#if defined(__clang__)
#define ASPP_PLAIN __attribute__((no_sanitize("address", "thread", "undefined")))
#else
#define ASPP_PLAIN \
  __attribute__((no_sanitize("address"), no_sanitize("thread"), no_sanitize("undefined")))
#endif

typedef float Four __attribute__((vector_size(16)));

// c += a * b, where k runs from 0 on. Products of the operands' formats are exact in float.
template <int kDepth>
ASPP_PLAIN void multiply(void* const* lanes, const float (&a)[16][kDepth],
                         const Four (&b)[kDepth][2]) {
  for (int row = 0; row < 16; ++row) {
    // Row `row` of c: two neighbours in each of four lanes.
    float* parts[4];
    Four left{}, right{};
    for (int i = 0; i < 4; ++i) {
      parts[i] = static_cast<const Fragments*>(lanes[row % 8 * 4 + i])->c + row / 8 * 2;
      (i < 2 ? left : right)[i % 2 * 2] = parts[i][0];
      (i < 2 ? left : right)[i % 2 * 2 + 1] = parts[i][1];
    }
    for (int k = 0; k < kDepth; ++k) {
      left += a[row][k] * b[k][0];
      right += a[row][k] * b[k][1];
    }
    for (int i = 0; i < 4; ++i) {
      parts[i][0] = (i < 2 ? left : right)[i % 2 * 2];
      parts[i][1] = (i < 2 ? left : right)[i % 2 * 2 + 1];
    }
  }
}

template <float (*kDecode)(uint16_t)>
ASPP_PLAIN void multiply_halves(void* const* lanes) {
  float a[16][16];
  Four b[16][2];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    const unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) {
      float* to = &a[group + i % 2 * 8][pair + i / 2 * 8];
      to[0] = kDecode(uint16_t(own.a[i]));
      to[1] = kDecode(uint16_t(own.a[i] >> 16));
    }
    for (unsigned i = 0; i < 2; ++i) {
      b[pair + i * 8][group / 4][group % 4] = kDecode(uint16_t(own.b[i]));
      b[pair + i * 8 + 1][group / 4][group % 4] = kDecode(uint16_t(own.b[i] >> 16));
    }
  }
  multiply<16>(lanes, a, b);
}

// The multiplier reads only the bits that tf32 has.
ASPP_PLAIN void multiply_tf32(void* const* lanes) {
  constexpr uint32_t kBits = ~0x1fffu;
  float a[16][8];
  Four b[8][2];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    const unsigned group = lane / 4, k = lane % 4;
    for (unsigned i = 0; i < 4; ++i) {
      a[group + i % 2 * 8][k + i / 2 * 4] = float_of(own.a[i] & kBits);
    }
    for (unsigned i = 0; i < 2; ++i) {
      b[k + i * 4][group / 4][group % 4] = float_of(own.b[i] & kBits);
    }
  }
  multiply<8>(lanes, a, b);
}

// Lanes 8 i ... 8 i + 7 brought the rows of matrix i, [8, 8] of 16 bits.
ASPP_PLAIN void load_matrices(void* const* lanes) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const RowWords& row = static_cast<const MatrixRow*>(lanes[i * 8 + lane / 4])->row;
      static_cast<const MatrixRow*>(lanes[lane])->r[i] = row.words[lane % 4];
    }
  }
}

ASPP_PLAIN void load_transposed(void* const* lanes) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const unsigned column = lane / 4, row = lane % 4 * 2;
    const auto element = [&](unsigned at) ASPP_PLAIN {
      const uint32_t word = static_cast<const MatrixRow*>(lanes[at])->row.words[column / 2];
      return word >> column % 2 * 16 & 0xffff;
    };
    for (unsigned i = 0; i < 4; ++i) {
      static_cast<const MatrixRow*>(lanes[lane])->r[i] =
          element(i * 8 + row) | element(i * 8 + row + 1) << 16;
    }
  }
}

ASPP_PLAIN void shuffle(void* const* lanes) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    auto& own = *static_cast<Exchange*>(lanes[lane]);
    own.result = static_cast<const Exchange*>(lanes[own.lane % kWarp])->value;
  }
}

}  // namespace

constinit const Operation kMmaBf16{"mma_m16n8k16_bf16", multiply_halves<bfloat16_to_float>};
constinit const Operation kMmaF16{"mma_m16n8k16_f16", multiply_halves<half_to_float>};
constinit const Operation kMmaTf32{"mma_m16n8k8_tf32", multiply_tf32};
constinit const Operation kLdmatrix{"ldmatrix_x4", load_matrices};
constinit const Operation kLdmatrixTrans{"ldmatrix_x4_trans", load_transposed};
constinit const Operation kShuffle{"shuffle", shuffle};

}  // namespace aspp::cuda::emulation
