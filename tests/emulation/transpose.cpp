// SPDX-License-Identifier: BSD-3-Clause
// launch_transpose_sm80 against its definition: every element it should write has the right value,
// none other is touched.
#include <sys/mman.h>

#include <memory>
#include <random>

#include "check.h"
#include "cuda/launch.h"

using namespace aspp::cuda;
namespace emulation = aspp::cuda::emulation;

namespace {

std::mt19937 engine(5);
int any(int low, int high) { return low + int(engine() % unsigned(high - low + 1)); }

// Exactly as many elements as are needed, `offset` elements behind a multiple of 16 bytes, so that
// a sanitizer sees both ends.
template <class T>
struct Buffer {
  Buffer(int64_t count, int offset)
      : count(count),
        memory(static_cast<T*>(
                   std::aligned_alloc(16, (size_t(count + offset) * sizeof(T) + 15) & ~size_t(15))),
               &std::free),
        data(memory.get() + offset) {}
  int64_t count;
  std::unique_ptr<T, void (*)(void*)> memory;
  T* data;
};

// The element of `out` written last, and one.
int64_t size_of(const TransposeParams& p) {
  return (p.batch - 1) * p.out_batch + (p.columns - 1) * p.out_pitch + p.out_columns;
}

// Sets steps, allocates, runs and compares.
template <class T>
void run(TransposeParams p, int offset_in, int offset_out) {
  if (p.out_pitch == 0) p.out_pitch = p.out_columns;
  if (p.out_batch == 0) p.out_batch = p.columns * p.out_pitch;
  p.bytes = sizeof(T);
  const int64_t size_in =
      (p.batch - 1) * p.in_batch + (p.rows - 1) * p.in_row + (p.columns - 1) * p.in_column + 1;
  Buffer<T> in(size_in, offset_in), out(size_of(p), offset_out);
  for (int64_t i = 0; i < size_in; ++i) in.data[i] = T(i * 2654435761u + 1);
  std::vector<T> expected(size_t(out.count), T(0xABABABABABABABABu));
  for (int64_t i = 0; i < out.count; ++i) out.data[i] = expected[size_t(i)];
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t c = 0; c < p.columns; ++c)
      for (int64_t r = 0; r < p.out_columns; ++r)
        expected[size_t(b * p.out_batch + c * p.out_pitch + r)] =
            r < p.rows ? in.data[b * p.in_batch + r * p.in_row + c * p.in_column] : T(0);
  p.in = in.data;
  p.out = out.data;
  EQUAL(launch_transpose_sm80(p, nullptr), cudaSuccess);
  int64_t wrong = 0;
  for (int64_t i = 0; i < out.count; ++i) wrong += out.data[i] != expected[size_t(i)];
  if (wrong > 0)
    std::printf("batch %ld rows %ld columns %ld out_columns %ld bytes %d\n", long(p.batch),
                long(p.rows), long(p.columns), long(p.out_columns), p.bytes);
  EQUAL(wrong, int64_t(0));
}

template <class T>
void run_layouts(int64_t batch, int64_t rows, int64_t columns) {
  constexpr int kChunk = 16 / sizeof(T);
  const int64_t padded = (rows + kChunk - 1) / kChunk * kChunk;
  for (const int64_t out_columns : {rows, padded}) {
    const int offset_in = any(0, 2) ? 0 : any(0, 7), offset_out = any(0, 2) ? 0 : any(0, 7);
    TransposeParams p{};
    p.batch = batch, p.rows = rows, p.columns = columns, p.out_columns = out_columns;
    p.in_batch = rows * columns, p.in_row = columns, p.in_column = 1;  // NCHW, weights
    run<T>(p, offset_in, offset_out);
    p.in_row = (columns + kChunk) / kChunk * kChunk, p.in_batch = rows * p.in_row;  // aligned rows
    p.out_pitch = padded + any(0, 2) * kChunk, p.out_batch = columns * p.out_pitch + kChunk;
    run<T>(p, 0, 0);
    p.in_row = 1, p.in_column = rows, p.in_batch = rows * columns;  // NHWC: only to be padded
    run<T>(p, offset_in, offset_out);
    p.in_row = any(0, 3), p.in_column = any(0, 9), p.in_batch = any(0, 5);  // steps at will
    run<T>(p, offset_in, offset_out);
  }
}

template <class T>
void run_sizes() {
  for (const int64_t rows : {1, 3, 17, 64, 130, 300})
    for (const int64_t columns : {1, 9, 17, 64, 70, 289}) run_layouts<T>(any(1, 3), rows, columns);
}

TEST(two_bytes) { run_sizes<uint16_t>(); }
TEST(four_bytes) { run_sizes<uint32_t>(); }
TEST(eight_bytes) { run_sizes<uint64_t>(); }

TEST(more_tiles_than_blocks) {
  TransposeParams p{};
  p.batch = 5000, p.rows = 2, p.columns = 70, p.out_columns = 2;  // five tiles each
  p.in_batch = 140, p.in_row = 70, p.in_column = 1;
  emulation::clear_log();
  run<uint16_t>(p, 0, 0);
  p.batch = 20000, p.columns = 20;
  run<uint16_t>(p, 0, 0);
  for (const emulation::Event& event : emulation::log())
    if (!std::strcmp(event.call, "launch")) HOLDS(event.grid.x <= 1u << 14);
}

TEST(nothing_to_do) {
  for (int which = 0; which < 3; ++which) {
    TransposeParams p{};
    p.batch = which != 0, p.columns = which != 1, p.out_columns = which != 2;
    p.bytes = 2;
    emulation::clear_log();
    EQUAL(launch_transpose_sm80(p, nullptr), cudaSuccess);
    EQUAL(emulation::count("launch"), size_t(0));
  }
}

TEST(odd_elements_are_refused) {
  TransposeParams p{};
  p.batch = p.rows = p.columns = p.out_columns = 1;
  p.bytes = 3;
  EQUAL(launch_transpose_sm80(p, nullptr), cudaErrorInvalidValue);
}

// Memory that is only there where it is touched: offsets beyond 32 bits, of bytes and of elements.
TEST(far_apart) {
  constexpr int64_t kFar = (int64_t(1) << 31) + 5;
  const size_t bytes = size_t(kFar) * 4 * sizeof(uint16_t) * 2;
  void* const map = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return;
  auto* const in = static_cast<uint16_t*>(map);
  uint16_t* const out = in + 4 * kFar;
  for (int which = 0; which < 3; ++which) {
    TransposeParams p{};
    p.in = in, p.out = out, p.bytes = 2;
    p.batch = p.rows = p.columns = p.out_columns = 3;
    p.in_batch = 9, p.in_row = 3, p.in_column = 1, p.out_batch = 9, p.out_pitch = 3;
    (which == 0 ? p.in_batch : which == 1 ? p.in_row : p.in_column) = kFar;
    (which == 0 ? p.out_batch : p.out_pitch) = kFar;
    const auto at = [](int64_t b, int64_t r, int64_t c) {
      return uint16_t(100 * b + 10 * r + c + 1);
    };
    for (int64_t i = 0; i < 27; ++i)
      in[i / 9 * p.in_batch + i / 3 % 3 * p.in_row + i % 3 * p.in_column] =
          at(i / 9, i / 3 % 3, i % 3);
    EQUAL(launch_transpose_sm80(p, nullptr), cudaSuccess);
    for (int64_t i = 0; i < 27; ++i)
      EQUAL(int(out[i / 9 * p.out_batch + i % 3 * p.out_pitch + i / 3 % 3]),
            int(at(i / 9, i / 3 % 3, i % 3)));
  }
  munmap(map, bytes);
}

}  // namespace

int main(int count, char** names) { return check::main(count, names); }
