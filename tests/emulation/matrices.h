// SPDX-License-Identifier: BSD-3-Clause
// Matrices of random integers in any math's memory, for the checks of kernels under emulation.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cuda/emulation/unwritten.h"
#include "cuda/params.h"
#include "cuda/ptx/convert.cuh"

namespace aspp::checks {

using cuda::Math;

inline std::mt19937 generator;

inline int draw(int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(generator);
}

inline int round_up(int value, int step) { return (value + step - 1) / step * step; }

// Exactly as many bytes as asked for, 16-byte aligned, so that a sanitizer sees the ends. Kernels
// may read what they or put() have written.
struct Memory {
  explicit Memory(size_t bytes) : bytes(bytes), data(std::aligned_alloc(16, (bytes + 15) & ~15)) {
    cuda::emulation::track(data, bytes);
  }
  ~Memory() {
    cuda::emulation::untrack(data);
    std::free(data);
  }
  Memory(const Memory&) = delete;
  size_t bytes;
  void* data;
};

inline void put(Math math, void* at, int64_t index, double value) {
  const int64_t bytes = cuda::bytes_of(math);
  cuda::emulation::note_written(static_cast<char*>(at) + index * bytes, size_t(bytes));
  switch (math) {
    case Math::bfloat16:
      static_cast<cuda::ptx::Bf16*>(at)[index] =
          cuda::ptx::from_float<cuda::ptx::Bf16>(float(value));
      break;
    case Math::float16:
      static_cast<cuda::ptx::F16*>(at)[index] = cuda::ptx::from_float<cuda::ptx::F16>(float(value));
      break;
    case Math::float64: static_cast<double*>(at)[index] = value; break;
    default: static_cast<float*>(at)[index] = float(value);
  }
}

inline double get(Math math, const void* at, int64_t index) {
  switch (math) {
    case Math::bfloat16: return cuda::ptx::to_float(static_cast<const cuda::ptx::Bf16*>(at)[index]);
    case Math::float16: return cuda::ptx::to_float(static_cast<const cuda::ptx::F16*>(at)[index]);
    case Math::float64: return static_cast<const double*>(at)[index];
    default: return static_cast<const float*>(at)[index];
  }
}

// Rounded as the kernel rounds it.
inline double rounded(Math math, double value) {
  alignas(16) char memory[16] = {};
  put(math, memory, 0, value);
  return get(math, memory, 0);
}

// [rows, pitch] in the math's memory: integers in the first `columns`, zeros up to a chunk, NaN
// behind, which nothing may read.
struct Matrix {
  Matrix(Math math, int64_t rows, int columns, int slack)
      : math(math),
        rows(rows),
        columns(columns),
        padded(round_up(columns, cuda::chunk_of(math))),
        pitch(padded + slack * cuda::chunk_of(math)),
        memory(size_t(rows * pitch * cuda::bytes_of(math))) {
    for (int64_t row = 0; row < rows; ++row)
      for (int column = 0; column < pitch; ++column)
        put(math, memory.data, row * pitch + column,
            column < columns  ? draw(-2, 2)
            : column < padded ? 0
                              : NAN);
  }
  double at(int64_t row, int64_t column) const {
    return get(math, memory.data, row * pitch + column);
  }
  Math math;
  int64_t rows;
  int columns, padded, pitch;
  Memory memory;
};

}  // namespace aspp::checks
