// SPDX-License-Identifier: BSD-3-Clause
// 64 bits that change when any byte changes, at the speed of memory.
//
// Lane by lane state = mix(state + word), mix(s) = (s ^ s >> 29) * K with an odd K, as hashes end:
// a bijection, so that a change of one word never gets lost, since each is stirred in by all that
// follow. A change leaves it as a multiple of K, which no edit of numbers (a sign, a power of two,
// zero) undoes a step later. (29 is not the distance of two floats in a word.)
#pragma once

#include "vector.h"

namespace aspp::ASPP_ISA {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;  // 2^64 / the golden ratio

template <typename V>
inline V stir(V state, V words) {
  state += words;
  state ^= state >> 29;
  return state * kGolden;
}

// The end of splitmix64 (Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, 2014).
inline uint64_t scatter(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xbf58476d1ce4e5b9;
  word = (word ^ (word >> 27)) * 0x94d049bb133111eb;
  return word ^ (word >> 31);
}

inline uint64_t checksum(const char* data, int64_t bytes, uint64_t seed) {
  constexpr int kChains = 4;  // hide the latency of a chain
  constexpr ptrdiff_t kStep = kChains * kVectorBytes;
  using Words64 = Vec<uint64_t>;
  Words64 chain[kChains];
  for (int i = 0; i < kChains; ++i) chain[i] = broadcast(seed + uint64_t(i));
  const auto add = [&](const char* from) {
    for (int i = 0; i < kChains; ++i) {
      Words64 words;
      std::memcpy(&words, from + i * kVectorBytes, kVectorBytes);
      chain[i] = stir(chain[i], words);
    }
  };
  ptrdiff_t at = 0;
  for (; at + kStep <= bytes; at += kStep) add(data + at);
  if (at < bytes) {
    char rest[kStep] = {};
    std::memcpy(rest, data + at, size_t(bytes - at));
    add(rest);
  }
  uint64_t all = scatter(seed + uint64_t(bytes));
  for (const Words64& words : chain) {
    for (int lane = 0; lane < kLanes<uint64_t>; ++lane) all = scatter(all + uint64_t(words[lane]));
  }
  return all;
}

}  // namespace aspp::ASPP_ISA
