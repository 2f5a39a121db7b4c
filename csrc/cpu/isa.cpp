// SPDX-License-Identifier: BSD-3-Clause
// Picks the kernels once, by what the processor says it can run.
#include <cstdlib>
#include <cstring>

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

const Kernels& pick() {
  // ASPP_EXT_ISA=avx512|avx2|baseline steps down, to test the narrower kernels on a wider machine;
  // a name this machine cannot run gives the baseline.
  const char* limit = std::getenv("ASPP_EXT_ISA");
  const auto allowed = [limit](const char* isa) {
    return limit == nullptr || *limit == 0 || std::strcmp(limit, isa) == 0;
  };
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

}  // namespace

namespace {

// When the library is loaded: no call reads the environment, which another thread may be writing.
const Kernels& picked = pick();

}  // namespace

const Kernels& kernels() { return picked; }

}  // namespace aspp
