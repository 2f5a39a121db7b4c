// SPDX-License-Identifier: BSD-3-Clause
// Batched transposes through shared memory: whole lines are read and whole lines are written,
// whichever of the two sides has the short rows.
#include "../launch.h"
#include "../ptx/block.cuh"
#include "../ptx/launch.cuh"
#include "../ptx/memory.cuh"

namespace aspp::cuda {
namespace sm80 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 14;  // a block then takes several tiles

struct TransposeJob {
  TransposeParams p;
  int64_t tiles, row_tiles, column_tiles;
  bool chunks_in, chunks_out;  // that side can be read or written 16 bytes at a time
};

template <class T>
union Pack {
  static constexpr int kSize = 16 / sizeof(T);
  ptx::Chunk chunk;
  T elements[kSize];
};

struct Place {
  int major, minor;
};

// Element i of rows of `length`; almost always kFull, which needs no division.
template <int kFull>
__device__ __forceinline__ Place place_of(int i, int length) {
  if (length == kFull) return {i / kFull, i % kFull};
  return {i / length, i % length};
}

template <class T, int kRows, int kColumns>
struct TransposeTile {
  static constexpr int kPitch = kColumns + 1;  // odd: a column lies in different banks
  static constexpr int kBytes = kRows * kPitch * int(sizeof(T));
  static constexpr int kPack = Pack<T>::kSize;

  const TransposeJob& job;
  T* tile;  // [kRows, kPitch]
  int64_t batch, first_row, first_column;
  int rows, live_rows, columns;  // of the tile: written, read

  __device__ __forceinline__ TransposeTile(const TransposeJob& job, char* shared, int64_t index)
      : job(job),
        tile(reinterpret_cast<T*>(shared)) {
    first_column = index % job.column_tiles * kColumns;
    index /= job.column_tiles;
    first_row = index % job.row_tiles * kRows;
    batch = index / job.row_tiles;
    rows = at_most<kRows>(job.p.out_columns - first_row);
    live_rows = at_most<kRows>(job.p.rows - first_row);
    columns = at_most<kColumns>(job.p.columns - first_column);
  }

  template <int kLimit>
  static __device__ __forceinline__ int at_most(int64_t value) {
    return value < 0 ? 0 : value < kLimit ? int(value) : kLimit;
  }

  __device__ __forceinline__ const T* source(int row, int column) const {
    return static_cast<const T*>(job.p.in) + batch * job.p.in_batch +
           (first_row + row) * job.p.in_row + (first_column + column) * job.p.in_column;
  }

  __device__ __forceinline__ T* target(int row, int column) const {
    return static_cast<T*>(job.p.out) + batch * job.p.out_batch +
           (first_column + column) * job.p.out_pitch + first_row + row;
  }

  __device__ __forceinline__ void load(int thread) const {
    if (job.chunks_in && columns == kColumns) {
      for (int i = thread; i < rows * (kColumns / kPack); i += kThreads) {
        const int row = i / (kColumns / kPack), column = i % (kColumns / kPack) * kPack;
        Pack<T> pack = {};
        if (row < live_rows) pack.chunk = ptx::load_chunk(source(row, column));
#pragma unroll
        for (int j = 0; j < kPack; ++j) tile[row * kPitch + column + j] = pack.elements[j];
      }
      return;
    }
    const bool along_rows = job.p.in_row == 1;
    for (int i = thread; i < rows * columns; i += kThreads) {
      const Place place = along_rows ? place_of<kRows>(i, rows) : place_of<kColumns>(i, columns);
      const int row = along_rows ? place.minor : place.major;
      const int column = along_rows ? place.major : place.minor;
      tile[row * kPitch + column] = row < live_rows ? ptx::load<T>(source(row, column), 0) : T(0);
    }
  }

  __device__ __forceinline__ void store(int thread) const {
    if (job.chunks_out) {
      for (int i = thread; i < rows / kPack * columns; i += kThreads) {
        const auto [column, part] = place_of<kRows / kPack>(i, rows / kPack);
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < kPack; ++j)
          pack.elements[j] = tile[(part * kPack + j) * kPitch + column];
        ptx::store_chunk(target(part * kPack, column), pack.chunk);
      }
      return;
    }
    for (int i = thread; i < rows * columns; i += kThreads) {
      const auto [column, row] = place_of<kRows>(i, rows);
      ptx::store<T>(target(row, column), 0, tile[row * kPitch + column]);
    }
  }
};

template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(const __grid_constant__ TransposeJob job) {
  for (int64_t index = blockIdx.x; index < job.tiles; index += gridDim.x) {
    const TransposeTile<T, kRows, kColumns> tile(job, ptx::shared_memory(), index);
    tile.load(threadIdx.x);
    ptx::sync_block();
    tile.store(threadIdx.x);
    ptx::sync_block();
  }
}

// Whether every row from `base` on begins at a multiple of 16 bytes.
bool is_aligned(const void* base, int64_t batch_step, int64_t row_step, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(base) | uint64_t(batch_step * bytes) |
          uint64_t(row_step * bytes)) %
             16 ==
         0;
}

constexpr int64_t ceil_div(int64_t value, int64_t step) {
  return value / step + (value % step != 0);
}

template <class T, int kRows, int kColumns>
cudaError_t launch_tiles(const TransposeParams& p, cudaStream_t stream) {
  constexpr int64_t kBytes = sizeof(T);
  TransposeJob job{p,     0,    ceil_div(p.out_columns, kRows), ceil_div(p.columns, kColumns),
                   false, false};
  job.tiles = p.batch * job.row_tiles * job.column_tiles;
  job.chunks_in = p.in_column == 1 && is_aligned(p.in, p.in_batch, p.in_row, kBytes);
  job.chunks_out =
      p.out_columns % Pack<T>::kSize == 0 && is_aligned(p.out, p.out_batch, p.out_pitch, kBytes);
  const auto blocks = int(job.tiles < kMaxBlocks ? job.tiles : kMaxBlocks);
  return ptx::launch(transpose_kernel<T, kRows, kColumns>, "transpose_kernel", blocks, kThreads,
                     TransposeTile<T, kRows, kColumns>::kBytes, stream, job);
}

template <class T>
cudaError_t launch_elements(const TransposeParams& p, cudaStream_t stream) {
  if (p.columns <= 16) return launch_tiles<T, 256, 16>(p, stream);      // weights, on their way in
  if (p.out_columns <= 16) return launch_tiles<T, 16, 256>(p, stream);  // and on their way out
  return launch_tiles<T, 64, 64>(p, stream);
}

}  // namespace
}  // namespace sm80

cudaError_t launch_transpose_sm80(const TransposeParams& params, cudaStream_t stream) {
  switch (params.bytes) {
    case 2: return sm80::launch_elements<uint16_t>(params, stream);
    case 4: return sm80::launch_elements<uint32_t>(params, stream);
    case 8: return sm80::launch_elements<uint64_t>(params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace aspp::cuda
