// SPDX-License-Identifier: BSD-3-Clause
// Every wrapper of csrc/cuda/ptx on the same inputs, as a GPU and as the emulation compute it: this
// file is built twice, and scripts/compare_instructions.py compares what the two programs print.
//
// A line is a case, how its results have to agree, and the results as 32-bit words:
//   exact       bit for bit
//   near:BOUND  as float32 values, at most BOUND apart: a tensor core adds in an order of its own
//   note        need not agree; a difference is worth knowing
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/emulation/numbers.h"
#include "cuda/ptx/block.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/launch.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/warp.cuh"

namespace {

namespace ptx = aspp::cuda::ptx;
namespace numbers = aspp::cuda::emulation;
using Words = std::vector<uint32_t>;

struct Params {
  const uint32_t* in;
  uint32_t* out;
};

__device__ inline int place() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

// Per thread 10 words in (a, b, c) and 4 out.
template <void (*kMultiply)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void multiply(Params p) {
  const uint32_t* in = p.in + place() * 10;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
  float c[4];
  for (int i = 0; i < 4; ++i) c[i] = __uint_as_float(in[6 + i]);
  kMultiply(c, a, b);
  for (int i = 0; i < 4; ++i) p.out[place() * 4 + i] = __float_as_uint(c[i]);
}

// A warp's 32 rows of 4 words; lane l names row (l * 11 + 3) % 32.
template <bool kTranspose>
__global__ void load_matrices(Params p) {
  auto* rows = reinterpret_cast<uint32_t*>(ptx::shared_memory());
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 4; ++i) rows[lane * 4 + i] = p.in[place() * 4 + i];
  ptx::sync_warp();
  uint32_t r[4];
  const uint32_t* row = rows + (lane * 11 + 3) % 32 * 4;
  if constexpr (kTranspose) {
    ptx::ldmatrix_x4_trans(r, row);
  } else {
    ptx::ldmatrix_x4(r, row);
  }
  for (int i = 0; i < 4; ++i) p.out[place() * 4 + i] = r[i];
}

// Two groups of a copy a thread; in each, every third thread's is not valid and has no source. The
// first group is read while the second may still be on its way.
__global__ void copy(Params p) {
  auto* shared = reinterpret_cast<uint32_t*>(ptx::shared_memory());
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int group = 0; group < 2; ++group) {
    const bool valid = (thread + group) % 3 != 0;
    const int chunk = group * threads + thread;
    ptx::cp_async_16(shared + chunk * 4, valid ? p.in + chunk * 4 : nullptr, valid);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) p.out[thread * 4 + i] = shared[thread * 4 + i];
  ptx::cp_async_wait<0>();
  ptx::sync_block();
  const int other = threads + (thread + 1) % threads;
  for (int i = 0; i < 4; ++i) p.out[(threads + thread) * 4 + i] = shared[other * 4 + i];
}

__global__ void shuffles(Params p) {
  const int lane = int(threadIdx.x % 32);
  const uint32_t word = p.in[place()];
  const double wide = double(word) / 3.0;
  uint32_t* out = p.out + place() * 8;
  out[0] = ptx::shuffle(word, (lane * 5 + 1) % 32);
  out[1] = ptx::shuffle(word, lane + 32);
  out[2] = ptx::shuffle_xor(word, 16);
  out[3] = __float_as_uint(ptx::shuffle_xor(float(word % 1000), 3));
  const double given = ptx::shuffle(wide, 31 - lane), crossed = ptx::shuffle_xor(wide, 1);
  std::memcpy(out + 4, &given, 8);
  std::memcpy(out + 6, &crossed, 8);
}

// The last block to have written adds what all wrote. out: [sums of 32, counter, blocks' words].
__global__ void last_block(Params p) {
  const int lane = int(threadIdx.x), blocks = int(gridDim.x);
  uint32_t* partials = p.out + 64;
  partials[place()] = p.in[place()];
  ptx::fence_device();
  ptx::sync_warp();
  uint32_t before = 0;
  if (lane == 0) before = ptx::atomic_increment(p.out + 32);
  if (ptx::shuffle(before, 0) + 1 != gridDim.x) return;
  ptx::fence_device();
  uint32_t sum = 0;
  for (int block = 0; block < blocks; ++block) {
    sum = sum * 31 + ptx::load_volatile(partials + block * 32 + lane);
  }
  p.out[lane] = sum;
}

__global__ void chunks(Params p) {
  const ptx::Chunk chunk = ptx::load_chunk(p.in + place() * 4);
  ptx::store_chunk(p.out + place() * 12, {chunk.words[3], chunk.words[2], chunk.words[1], 7u});
  ptx::store_chunk(p.out + place() * 12 + 4,
                   ptx::load_volatile(reinterpret_cast<const ptx::Chunk*>(p.in) + place()));
  const auto pair = ptx::load_volatile(reinterpret_cast<const uint64_t*>(p.in) + place());
  p.out[place() * 12 + 8] = uint32_t(pair);
  p.out[place() * 12 + 9] = uint32_t(pair >> 32);
  p.out[place() * 12 + 10] = ptx::load_volatile(p.in + place());
  ptx::store<uint32_t>(p.out, place() * 12 + 11, ptx::load<uint32_t>(p.in, place()));
}

// Per thread one word in; out: to bfloat16 and float16, from both halves' bits, packed, tf32.
__global__ void convert(Params p) {
  const uint32_t word = p.in[place()];
  const float value = __uint_as_float(word);
  uint32_t* out = p.out + place() * 6;
  out[0] = ptx::from_float<ptx::Bf16>(value).bits | uint32_t(ptx::from_float<ptx::F16>(value).bits)
                                                        << 16;
  out[1] = __float_as_uint(ptx::to_float(ptx::Bf16{uint16_t(word)}));
  out[2] = __float_as_uint(ptx::to_float(ptx::F16{uint16_t(word)}));
  out[3] = ptx::pack<ptx::Bf16>(value, -1.5f);
  out[4] = ptx::pack<ptx::F16>(0.75f, value);
  out[5] = ptx::round_to_tf32(word);
}

uint64_t state = 88172645463325252u;

uint32_t draw() {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return uint32_t(state >> 16);
}

Words draw(size_t count) {
  Words words(count);
  for (uint32_t& word : words) word = draw();
  return words;
}

float draw_integer() { return float(int(draw() % 17) - 8); }

// Near a normal distribution, so that sums cancel as they do in use.
float draw_normal() {
  float sum = 0;
  for (int i = 0; i < 12; ++i) sum += float(draw() % 65536) / 65536.0f;
  return sum - 6.0f;
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

Words run(void (*kernel)(Params), const char* name, int blocks, int threads, size_t shared,
          const Words& in, size_t out_count) {
  Words out(out_count);
  uint32_t *device_in, *device_out;
  check(cudaMalloc(&device_in, in.size() * 4), name);
  check(cudaMalloc(&device_out, out_count * 4), name);
  check(cudaMemcpy(device_in, in.data(), in.size() * 4, cudaMemcpyHostToDevice), name);
  check(cudaMemcpy(device_out, out.data(), out_count * 4, cudaMemcpyHostToDevice), name);
  check(ptx::launch(kernel, name, blocks, threads, shared, nullptr, {device_in, device_out}), name);
  check(cudaDeviceSynchronize(), name);
  check(cudaMemcpy(out.data(), device_out, out_count * 4, cudaMemcpyDeviceToHost), name);
  check(cudaFree(device_in), name);
  check(cudaFree(device_out), name);
  return out;
}

// Long results as one hash (FNV-1a) for each 64 words, where the words themselves do not matter.
void print(const std::string& name, const std::string& agreement, const Words& words) {
  std::printf("%s %s", name.c_str(), agreement.c_str());
  const size_t step = agreement == "exact" && words.size() > 4096 ? 64 : 1;
  for (size_t begin = 0; begin < words.size(); begin += step) {
    uint32_t hash = step == 1 ? words[begin] : 2166136261u;
    for (size_t i = begin; step > 1 && i < begin + step && i < words.size(); ++i)
      for (int byte = 0; byte < 4; ++byte)
        hash = (hash ^ (words[i] >> byte * 8 & 0xff)) * 16777619u;
    std::printf(" %08x", hash);
  }
  std::printf("\n");
}

constexpr int kWarps = 16;

struct Product {
  const char* name;
  void (*kernel)(Params);
  uint32_t (*encode)(float);  // two of them in a word where they have 16 bits
  bool halves;
};

Words operands(const Product& product, float (*number)(), bool with_sum) {
  Words words;
  for (int thread = 0; thread < kWarps * 32; ++thread) {
    for (int i = 0; i < 6; ++i) {
      const uint32_t low = product.encode(number());
      words.push_back(product.halves ? low | product.encode(number()) << 16 : low);
    }
    for (int i = 0; i < 4; ++i) words.push_back(with_sum ? numbers::bits_of(number()) : 0u);
  }
  return words;
}

void products(const Product& product) {
  const auto multiplied = [&](const char* what, const char* agreement, const Words& in) {
    const std::string name = std::string(product.name) + "." + what;
    print(name, agreement, run(product.kernel, product.name, kWarps, 32, 0, in, kWarps * 128));
  };
  multiplied("integers", "exact", operands(product, draw_integer, true));
  multiplied("normal", "near:1e-4", operands(product, draw_normal, true));
  // One product a sum: only lanes 0, 4, 8 ... keep their first word of a, and of it the low half.
  Words single = operands(product, draw_normal, false);
  for (int thread = 0; thread < kWarps * 32; ++thread) {
    uint32_t* words = &single[size_t(thread) * 10];
    words[0] &= thread % 4 ? 0u : product.halves ? 0xffffu : ~0u;
    for (int i = 1; i < 4; ++i) words[i] = 0;
  }
  multiplied("single", "exact", single);
}

uint32_t encode_tf32(float value) { return numbers::round_to_tf32(numbers::bits_of(value)); }
uint32_t encode_bf16(float value) { return numbers::float_to_bfloat16(value); }
uint32_t encode_f16(float value) { return numbers::float_to_half(value); }

bool is_nan(uint32_t bits, uint32_t infinity, uint32_t mask) { return (bits & mask) > infinity; }

// Each column of `convert` by itself, first without the inputs that are NaN.
void conversions(const char* what, const Words& in) {
  const char* columns[] = {"from_float", "from_bf16", "from_f16", "pack_bf16", "pack_f16", "tf32"};
  const Words out = run(convert, "convert", int(in.size() / 256), 256, 0, in, in.size() * 6);
  for (int column = 0; column < 6; ++column) {
    Words kept, nans;
    for (size_t i = 0; i < in.size(); ++i) {
      const bool nan = column == 1   ? is_nan(in[i], 0x7f80, 0x7fff)
                       : column == 2 ? is_nan(in[i], 0x7c00, 0x7fff)
                                     : is_nan(in[i], 0x7f800000, 0x7fffffff);
      (nan ? nans : kept).push_back(out[i * 6 + column]);
    }
    const std::string name = std::string("convert.") + what + "." + columns[column];
    print(name, "exact", kept);
    if (!nans.empty()) print(name + ".nan", "note", nans);
  }
}

}  // namespace

int main() {
  products({"mma_bf16", multiply<ptx::mma_m16n8k16_bf16>, encode_bf16, true});
  products({"mma_f16", multiply<ptx::mma_m16n8k16_f16>, encode_f16, true});
  const Product tf32{"mma_tf32", multiply<ptx::mma_m16n8k8_tf32>, encode_tf32, false};
  products(tf32);
  Words low_bits = operands(tf32, draw_integer, true);
  for (size_t i = 0; i < low_bits.size(); ++i) low_bits[i] |= i % 10 < 6 ? draw() & 0x1fffu : 0u;
  print("mma_tf32.low_bits", "note",
        run(tf32.kernel, tf32.name, kWarps, 32, 0, low_bits, kWarps * 128));

  print("ldmatrix.x4", "exact",
        run(load_matrices<false>, "ldmatrix", 8, 32, 512, draw(1024), 1024));
  print("ldmatrix.x4_trans", "exact",
        run(load_matrices<true>, "ldmatrix_trans", 8, 32, 512, draw(1024), 1024));
  print("cp_async", "exact", run(copy, "copy", 1, 128, 4096, draw(1024), 1024));
  print("shuffle", "exact", run(shuffles, "shuffles", 4, 96, 0, draw(384), 384 * 8));
  print("last_block", "exact", run(last_block, "last_block", 200, 32, 0, draw(6400), 64 + 6400));
  print("chunks", "exact", run(chunks, "chunks", 4, 64, 0, draw(1024), 256 * 12));

  Words halves(65536);
  for (uint32_t i = 0; i < 65536; ++i) halves[i] = i << 16 | i;
  conversions("all_halves", halves);
  conversions("random", draw(65536));
  Words near_one(65536);  // ties and their neighbours, in every float16 and bfloat16 binade
  for (uint32_t i = 0; i < 65536; ++i) {
    near_one[i] = (i << 16 | (i & 0x1c0 ? 0x8000u : 0x1000u)) + i % 3 - 1;
  }
  conversions("ties", near_one);
  return 0;
}
