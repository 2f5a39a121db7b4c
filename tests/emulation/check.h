// SPDX-License-Identifier: BSD-3-Clause
// Small tests that the emulation runs: TEST(name) { ... EQUAL(a, b); }. The program runs all, or
// those it is told, and ends with 1 where something failed.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx/launch.cuh"
#include "emulation.h"

namespace check {

struct Test {
  const char* name;
  void (*run)();
};
inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int failures = 0;

template <class A, class B>
void equal(const A& a, const B& b, const char* what, int line) {
  if (a == b) return;
  if (++failures > 10) return;
  std::printf("line %d: %s: %s is not %s\n", line, what, std::to_string(a).c_str(),
              std::to_string(b).c_str());
}

// Runs f() as a kernel.
struct Body {
  const void* f;
  void (*call)(const void*);
};
inline void call_body(const Body body) { body.call(body.f); }

template <class F>
cudaError_t run(const char* name, int blocks, int threads, size_t shared_bytes, const F& f) {
  const Body body{&f, [](const void* given) { (*static_cast<const F*>(given))(); }};
  return aspp::cuda::ptx::launch(call_body, name, blocks, threads, shared_bytes, nullptr, body);
}

inline int main(int count, char** names) {
  for (const Test& test : tests()) {
    bool wanted = count < 2;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(names[i], test.name) == 0;
    const int before = failures;
    if (wanted) test.run();
    if (failures > before) std::printf("%s failed\n", test.name);
  }
  return failures != 0;
}

}  // namespace check

#define TEST(name)                                    \
  static void name();                                 \
  [[maybe_unused]] static const int register_##name = \
      (check::tests().push_back({#name, name}), 0);   \
  static void name()
#define EQUAL(a, b) check::equal(a, b, #a " == " #b, __LINE__)
#define HOLDS(a) check::equal(bool(a), true, #a, __LINE__)
