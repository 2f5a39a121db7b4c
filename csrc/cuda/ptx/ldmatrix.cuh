// SPDX-License-Identifier: BSD-3-Clause
// Four 8 x 8 matrices of 16-bit elements from shared memory into a warp's registers.
//
// Lane l names row l % 8 of matrix l / 8: 16 bytes, at a multiple of 16. r[i] is of matrix i:
//   ldmatrix_x4        row l / 4, columns l % 4 * 2 (low half) and the next
//   ldmatrix_x4_trans  column l / 4, rows l % 4 * 2 (low half) and the next
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace aspp::cuda::ptx {

#if defined(ASPP_EMULATE)

inline void ldmatrix(const emulation::Operation& operation, uint32_t (&r)[4], const void* row) {
  emulation::check_shared(row, 16, operation.name);
  emulation::MatrixRow lane{*static_cast<const emulation::RowWords*>(row), r};
  emulation::together(operation, &lane);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  ldmatrix(emulation::kLdmatrix, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  ldmatrix(emulation::kLdmatrixTrans, r, row);
}

#else

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

#endif

}  // namespace aspp::cuda::ptx
