// SPDX-License-Identifier: BSD-3-Clause
// Picks the kernels by what the processor says it can run.
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "kernels/kernels.h"

namespace aspp {

namespace isa_baseline {
extern const Kernels table;
}
#if defined(ASPP_X86)
namespace isa_avx2 {
extern const Kernels table;
}
namespace isa_avx512 {
extern const Kernels table;
}
namespace isa_avx512bf16 {
extern const Kernels table;
}
#endif

namespace {

const Kernels& pick(std::string_view limit) {
  // ASPP_EXT_ISA=avx512|avx2|baseline steps down, to test the narrower kernels on a wider machine;
  // a name this machine cannot run gives the baseline.
  const auto allowed = [limit](std::string_view isa) { return limit.empty() || limit == isa; };
#if defined(ASPP_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && allowed("avx512bf16")) return isa_avx512bf16::table;
  if (avx512 && allowed("avx512")) return isa_avx512::table;
  if (avx2 && allowed("avx2")) return isa_avx2::table;
#endif
  (void)allowed;
  return isa_baseline::table;
}

std::string_view given_limit() {
  const char* const text = std::getenv("ASPP_EXT_ISA");
  return text == nullptr ? "" : text;
}

// When the library is loaded: no call reads the environment, which another thread may be writing.
std::atomic<const Kernels*> picked{&pick(given_limit())};

}  // namespace

const Kernels& kernels() { return *picked.load(std::memory_order_relaxed); }

void use_kernels(std::string_view limit) { picked = &pick(limit); }

}  // namespace aspp
