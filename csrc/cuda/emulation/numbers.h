// SPDX-License-Identifier: BSD-3-Clause
// Conversions as PTX defines them: to nearest, ties to even, one NaN.
#pragma once

#include <bit>
#include <cstdint>

namespace aspp::cuda::emulation {

constexpr uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
constexpr float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

constexpr float bfloat16_to_float(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

constexpr uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  if (rest >= 0x0f800000) return float_of(sign | 0x70000000 | rest);  // infinite or NaN
  if (rest >= 0x00800000) return float_of(sign | (rest + 0x38000000));
  // Below 2^-14 in steps of 2^-24; no denormal float on the way.
  return float_of(sign | bits_of(float_of(0x38800000 + rest) - float_of(0x38800000)));
}

constexpr uint16_t float_to_half(float value) {
  const uint32_t bits = bits_of(value), rest = bits & 0x7fffffff;
  const auto signed_half = [&](uint32_t half) { return uint16_t((bits >> 16 & 0x8000) | half); };
  if (rest > 0x7f800000) return 0x7fff;
  if (rest >= 0x477ff000) return signed_half(0x7c00);  // 65520, halfway beyond the largest
  // Below 2^-14: 0.5 has neighbours 2^-24 away, so the sum is rounded as it should be.
  if (rest < 0x38800000) return signed_half(bits_of(float_of(rest) + 0.5f) - bits_of(0.5f));
  return signed_half((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

// cvt.rna.tf32.f32: to 10 bits, ties away from zero.
constexpr uint32_t round_to_tf32(uint32_t bits) {
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
  if ((bits & 0x7fffffff) == 0x7f800000) return bits;
  return (bits + 0x1000) & ~0x1fffu;
}

}  // namespace aspp::cuda::emulation
