// SPDX-License-Identifier: BSD-3-Clause
// 64-bit arithmetic that refuses instead of wrapping, and the sentences of a refusal.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace aspp::plan {

using Index = std::int64_t;

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Throws unless `holds`. The parts state the rule, what was expected and what was got.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) throw std::invalid_argument(sentence("plan: ", parts...));
}

inline Index multiply(Index a, Index b, const char* what) {
  Index result = 0;
  if (__builtin_mul_overflow(a, b, &result))
    throw std::overflow_error(
        sentence("plan: ", what, " must fit in 64 bits but is ", a, " * ", b));
  return result;
}

inline Index add(Index a, Index b, const char* what) {
  Index result = 0;
  if (__builtin_add_overflow(a, b, &result))
    throw std::overflow_error(
        sentence("plan: ", what, " must fit in 64 bits but is ", a, " + ", b));
  return result;
}

// For value >= 0, step >= 1; written so that value + step never has to fit.
constexpr Index ceil_div(Index value, Index step) {
  return value / step + (value % step != 0 ? 1 : 0);
}

inline Index round_up(Index value, Index step, const char* what) {
  return multiply(ceil_div(value, step), step, what);
}

}  // namespace aspp::plan
