// SPDX-License-Identifier: BSD-3-Clause
// c += a * b on a warp's tensor core: c [16, 8] float32, a [16, k], b [k, 8].
//
// Lane l, with g = l / 4 and t = l % 4, has
//   c[0], c[1]   row g, columns 2 t and 2 t + 1;     c[2], c[3]   row g + 8
//   16 bits, k = 16, low half first:
//     a[0] row g, columns 2 t and 2 t + 1;   a[1] row g + 8;   a[2], a[3] the same 8 columns on
//     b[0] rows 2 t and 2 t + 1, column g;   b[1] 8 rows on
//   tf32, k = 8:
//     a[0] row g, column t;   a[1] row g + 8;   a[2], a[3] the same 4 columns on
//     b[0] row t, column g;   b[1] 4 rows on
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace aspp::cuda::ptx {

#if defined(ASPP_EMULATE)

inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Fragments lane{c, a, b};
  emulation::together(emulation::kMmaBf16, &lane);
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Fragments lane{c, a, b};
  emulation::together(emulation::kMmaF16, &lane);
}
inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Fragments lane{c, a, b};
  emulation::together(emulation::kMmaTf32, &lane);
}

#else

#define ASPP_MMA(name, instruction)                                                   \
  __device__ __forceinline__ void name(float (&c)[4], const uint32_t (&a)[4],         \
                                       const uint32_t (&b)[2]) {                      \
    asm volatile("mma.sync.aligned." instruction                                      \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"   \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
ASPP_MMA(mma_m16n8k16_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
ASPP_MMA(mma_m16n8k16_f16, "m16n8k16.row.col.f32.f16.f16.f32")
ASPP_MMA(mma_m16n8k8_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef ASPP_MMA

#endif

}  // namespace aspp::cuda::ptx
