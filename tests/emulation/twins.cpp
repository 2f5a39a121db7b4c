// SPDX-License-Identifier: BSD-3-Clause
// What each wrapper's twin computes, against the definition in the PTX ISA.
#include <cmath>
#include <random>

#include "check.h"
#include "cuda/ptx/block.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/warp.cuh"

using namespace aspp::cuda::ptx;

namespace {

using Mma = void (*)(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// "Matrix fragments for mma.m16n8k16" and ".m16n8k8": element i of the lane's fragment.
struct Place {
  int row, column;
};
Place place_a(int lane, int i, bool tf32) {
  const int group = lane / 4, thread = lane % 4;
  if (tf32) return {i == 0 || i == 2 ? group : group + 8, i < 2 ? thread : thread + 4};
  const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {upper ? group : group + 8, thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Place place_b(int lane, int i, bool tf32) {
  const int group = lane / 4, thread = lane % 4;
  if (tf32) return {i == 0 ? thread : thread + 4, group};
  return {thread * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
}
Place place_c(int lane, int i) { return {i < 2 ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1)}; }

struct Problem {
  float a[16][16], b[16][8], c[16][8], result[16][8];
};

template <class T>
void multiply(Problem& p, Mma mma) {
  constexpr bool kTf32 = sizeof(T) == 4;
  constexpr int kPerWord = kTf32 ? 1 : 2;
  const auto encode = [](float value) -> uint32_t {
    if constexpr (kTf32)
      return as_bits(value);
    else
      return from_float<T>(value).bits;
  };
  EQUAL(check::run("mma", 1, 64, 0,
                   [&] {
                     const int lane = int(threadIdx.x) % 32;
                     uint32_t a[4] = {}, b[2] = {};
                     float c[4];
                     for (int i = 0; i < 4 * kPerWord; ++i) {
                       const Place at = place_a(lane, i, kTf32);
                       a[i / kPerWord] |= encode(p.a[at.row][at.column]) << (i % kPerWord * 16);
                     }
                     for (int i = 0; i < 2 * kPerWord; ++i) {
                       const Place at = place_b(lane, i, kTf32);
                       b[i / kPerWord] |= encode(p.b[at.row][at.column]) << (i % kPerWord * 16);
                     }
                     for (int i = 0; i < 4; ++i)
                       c[i] = p.c[place_c(lane, i).row][place_c(lane, i).column];
                     mma(c, a, b);
                     if (threadIdx.x >= 32) return;  // both warps multiply, one stores
                     for (int i = 0; i < 4; ++i)
                       p.result[place_c(lane, i).row][place_c(lane, i).column] = c[i];
                   }),
        cudaSuccess);
}

template <class T>
void test_mma(Mma mma, int depth) {
  std::mt19937 random(3);
  Problem p;
  const auto fill = [&](auto draw) {
    for (auto& row : p.a)
      for (float& v : row) v = draw();
    for (auto& row : p.b)
      for (float& v : row) v = draw();
    for (auto& row : p.c)
      for (float& v : row) v = draw();
  };
  const auto compare = [&](double tolerance) {
    for (int r = 0; r < 16; ++r) {
      for (int n = 0; n < 8; ++n) {
        double sum = p.c[r][n];
        for (int k = 0; k < depth; ++k) sum += double(p.a[r][k]) * p.b[k][n];
        HOLDS(std::fabs(sum - p.result[r][n]) <= tolerance);
      }
    }
  };
  for (int times = 0; times < 20; ++times) {
    fill([&] { return float(int(random() % 255) - 127); });
    multiply<T>(p, mma);
    compare(0);
  }
  std::normal_distribution<float> normal;
  fill([&] {  // what every format can hold
    return to_float(from_float<F16>(to_float(from_float<Bf16>(normal(random)))));
  });
  multiply<T>(p, mma);
  compare(1e-4);
  p.a[3][5] = INFINITY;
  p.b[5][2] = 0;
  multiply<T>(p, mma);
  HOLDS(std::isnan(p.result[3][2]));
  HOLDS(std::isinf(p.result[3][3]) && std::isfinite(p.result[4][2]));
}

TEST(mma_bf16) { test_mma<Bf16>(mma_m16n8k16_bf16, 16); }
TEST(mma_f16) { test_mma<F16>(mma_m16n8k16_f16, 16); }
TEST(mma_tf32) {
  test_mma<float>(mma_m16n8k8_tf32, 8);
  Problem p{};
  p.a[0][0] = 1 + std::ldexp(1.0f, -11);  // the bits below the tenth are not read
  p.b[0][0] = 1;
  multiply<float>(p, mma_m16n8k8_tf32);
  EQUAL(p.result[0][0], 1.0f);
}

TEST(ldmatrix) {
  check::run("ldmatrix", 1, 96, 3 * 1024, [] {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    auto* tile = reinterpret_cast<uint16_t*>(shared_memory() + warp * 1024);  // [4, 8, 8], strewn
    const auto offset = [&](int matrix, int row) { return (matrix * 8 + row) * 11 % 32 * 8; };
    for (int i = 0; i < 8; ++i) {
      tile[offset(lane / 8, lane % 8) + i] = uint16_t(warp * 1000 + lane * 8 + i);
    }
    sync_warp();
    uint32_t plain[4], transposed[4];
    const void* row = &tile[offset(lane / 8, lane % 8)];
    ldmatrix_x4(plain, row);
    ldmatrix_x4_trans(transposed, row);
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int half = 0; half < 2; ++half) {
        const int major = lane / 4, minor = lane % 4 * 2 + half;
        const auto element = [&](int r, int c) {
          return uint32_t(warp * 1000 + (matrix * 8 + r) * 8 + c);
        };
        EQUAL(plain[matrix] >> half * 16 & 0xffff, element(major, minor));
        EQUAL(transposed[matrix] >> half * 16 & 0xffff, element(minor, major));
      }
    }
  });
}

TEST(shuffles) {
  check::run("shuffles", 1, 128, 0, [] {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    for (int mask = 0; mask < 32; ++mask) {
      EQUAL(shuffle_xor(lane + 100 * warp, mask), (lane ^ mask) + 100 * warp);
      EQUAL(shuffle_xor(lane + 0.5, mask), (lane ^ mask) + 0.5);
      EQUAL(shuffle(float(lane), mask), float(mask));
      EQUAL(shuffle(uint64_t(lane) << 40, (lane + mask) % 32), uint64_t((lane + mask) % 32) << 40);
    }
  });
}

TEST(cp_async_reads_when_it_must) {
  alignas(16) static uint32_t from[4] = {};
  check::run("cp_async", 1, 1, 16, [] {
    cp_async_16(shared_memory(), from, true);
    cp_async_commit();
    from[0] = 7;
    cp_async_wait<0>();
    EQUAL(int(shared_memory()[0]), 7);
  });
}

TEST(cp_async) {
  alignas(16) static uint32_t from[64][4];
  for (int i = 0; i < 256; ++i) from[i / 4][i % 4] = uint32_t(i);
  check::run("cp_async", 2, 1, 512, [] {
    auto* to = reinterpret_cast<uint32_t*>(shared_memory());
    const auto unwritten = [&](int i) { return to[i * 4] == ~0u && to[i * 4 + 3] == ~0u; };
    for (int i = 0; i < 4; ++i) {
      cp_async_16(to + i * 4, from[i], true);
      cp_async_16(to + (i + 8) * 4, i % 2 == 0 ? nullptr : from[i], false);
      if (i != 1) cp_async_commit();  // groups: 0; 1 and 2; 3
    }
    cp_async_16(to + 16, from[4], true);
    HOLDS(unwritten(0) && unwritten(8));
    cp_async_wait<3>();
    HOLDS(unwritten(0));
    cp_async_wait<2>();
    EQUAL(to[0], 0u);
    EQUAL(to[3], 3u);
    EQUAL(to[35], 0u);
    HOLDS(unwritten(1));
    cp_async_wait<1>();
    EQUAL(to[2 * 4 + 1], 9u);
    EQUAL(to[10 * 4], 0u);
    HOLDS(unwritten(3));
    cp_async_wait<0>();
    EQUAL(to[3 * 4], 12u);
    EQUAL(to[11 * 4], 0u);
    HOLDS(unwritten(4));  // in no group yet
    cp_async_commit();
    cp_async_wait<0>();
    EQUAL(to[16], 16u);
    to[0] = 5;
    cp_async_16(to, nullptr, false);  // unknown from here on
    HOLDS(unwritten(0));
    cp_async_commit();
    for (int i = 0; i < 500; ++i) {  // a long pipeline
      cp_async_16(to + (i % 3) * 4, from[i % 64], true);
      cp_async_commit();
      cp_async_wait<2>();
    }
    cp_async_wait<0>();
    EQUAL(to[499 % 3 * 4], (499 % 64) * 4u);
  });
}

// The 16-bit value nearest to `value`; of two, the one with even bits.
template <class T>
uint16_t nearest(double value) {
  const uint16_t infinite = std::is_same_v<T, F16> ? 0x7c00 : 0x7f80;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double wanted = std::fabs(value);
  uint16_t low = 0, high = infinite;  // by bisection: bits grow with the value
  while (high - low > 1) {
    const auto middle = uint16_t((low + high) / 2);
    (double(to_float(T{middle})) <= wanted ? low : high) = middle;
  }
  // Rounding to infinity begins where the next value would be, were there one.
  const double below = to_float(T{low});
  const double above = high < infinite ? double(to_float(T{high}))
                                       : below + (below - double(to_float(T{uint16_t(low - 1)})));
  const double from_low = wanted - below, from_high = above - wanted;
  if (wanted >= above) return sign | high;
  const bool up = from_high < from_low || (from_high == from_low && low % 2 == 1);
  return sign | (up ? high : low);
}

double by_definition(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                    : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class T>
void test_format(int exponent_bits) {
  const uint32_t infinite = ((1u << exponent_bits) - 1) << (15 - exponent_bits);
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const T value{uint16_t(i)};
    const float wide = to_float(value);
    if ((i & 0x7fff) > infinite) {
      HOLDS(std::isnan(wide));
      EQUAL(from_float<T>(wide).bits, 0x7fff);
      continue;
    }
    EQUAL(from_float<T>(wide).bits, i);
    if ((i & 0x7fff) == infinite) {
      HOLDS(std::isinf(wide) && std::signbit(wide) == (i >= 0x8000));
      continue;
    }
    EQUAL(double(wide), by_definition(uint16_t(i), exponent_bits));
    EQUAL(std::signbit(wide), i >= 0x8000);
    // Halfway to the next value, and beside it.
    const auto half = float((double(wide) + by_definition(uint16_t(i + 1), exponent_bits)) / 2);
    for (const float near :
         {half, std::nextafter(half, -INFINITY), std::nextafter(half, INFINITY)}) {
      if (std::isfinite(near)) EQUAL(from_float<T>(near).bits, nearest<T>(near));
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    const float a = as_float(random()),
                b = std::ldexp(as_float(random() % 0x800000 + 0x3f800000), -int(random() % 28));
    if (std::isfinite(a)) EQUAL(from_float<T>(a).bits, nearest<T>(a));
    EQUAL(from_float<T>(-b).bits, nearest<T>(-b));
    EQUAL(pack<T>(a, b), from_float<T>(a).bits | uint32_t(from_float<T>(b).bits) << 16);
  }
  EQUAL(from_float<T>(INFINITY).bits, infinite);
  EQUAL(from_float<T>(-NAN).bits, 0x7fff);
}

TEST(convert_bf16) { test_format<Bf16>(8); }
TEST(convert_f16) { test_format<F16>(5); }

TEST(convert_wide) {
  EQUAL(to_float(1.5f), 1.5f);
  EQUAL(to_float(0.1), 0.1);
  EQUAL(from_float<float>(0.1f), 0.1f);
  EQUAL(from_float<double>(0.1), 0.1);
  EQUAL(from_float<double>(0.1f), double(0.1f));
}

TEST(round_tf32) {
  std::mt19937 random(2);
  for (int i = 0; i < 100000; ++i) {
    uint32_t bits = random();
    if (i % 4 == 0) bits = (bits & ~0x1fffu) | 0x1000;  // a tie
    if (i % 8 == 0) bits -= i % 16 == 0;
    const float value = as_float(bits), rounded = as_float(round_to_tf32(bits));
    if (!std::isfinite(value)) {
      HOLDS(std::isnan(value) ? std::isnan(rounded) : value == rounded);
      continue;
    }
    int exponent;
    std::frexp(value, &exponent);
    const int step = std::max(exponent - 11, -126 - 10);
    const double wanted = std::ldexp(std::round(std::ldexp(double(value), -step)), step);
    EQUAL(double(rounded), wanted > 3.5e38 ? INFINITY : wanted < -3.5e38 ? -INFINITY : wanted);
    EQUAL(std::signbit(rounded), std::signbit(value));
    EQUAL(round_to_tf32(bits) & 0x1fff, 0u);
  }
  EQUAL(round_to_tf32(0x7f7fffff), 0x7f800000u);
}

TEST(chunks) {
  alignas(16) static uint32_t words[8] = {1, 2, 3, 4, 0, 0, 0, 0};
  check::run("chunks", 1, 1, 16, [] {
    store_chunk(shared_memory(), load_chunk(words));
    store_chunk(words + 4, load_chunk(shared_memory()));
    EQUAL(load_volatile(&words[2]), 3u);
    store<uint16_t>(words, 10, load<uint8_t>(words, 12) + 1);
    EQUAL(load_volatile(reinterpret_cast<const uint64_t*>(words)), 0x200000001u);
    EQUAL(load_volatile(reinterpret_cast<const Chunk*>(words)).words[3], 4u);
  });
  EQUAL(words[4], 1u);
  EQUAL(words[5], 5u);
  EQUAL(words[7], 4u);
}

}  // namespace

int main(int count, char** names) { return check::main(count, names); }
