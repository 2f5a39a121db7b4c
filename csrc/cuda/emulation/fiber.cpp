// SPDX-License-Identifier: BSD-3-Clause
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if ASPP_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace aspp::cuda::emulation {
namespace {

// Mapped, not used: a page counts once it is touched. Sanitizers print their reports on it.
constexpr size_t kStackBytes = 256 << 10;

#if ASPP_ASAN
constinit thread_local Fiber* came_from = nullptr;
#endif

}  // namespace

#if defined(__x86_64__)
// Only what a call must keep: everything else is dead here or on the stack.
extern "C" void aspp_emulation_switch(void** from, void* to);
extern "C" void aspp_emulation_enter();
asm(R"(
  .pushsection .text
  .globl aspp_emulation_switch
  .hidden aspp_emulation_switch
  .type aspp_emulation_switch, @function
aspp_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size aspp_emulation_switch, . - aspp_emulation_switch

  .globl aspp_emulation_enter
  .hidden aspp_emulation_enter
  .type aspp_emulation_enter, @function
aspp_emulation_enter:
  .cfi_startproc
  .cfi_undefined rip
  movq %r12, %rdi
  callq *%rbx
  ud2
  .cfi_endproc
  .size aspp_emulation_enter, . - aspp_emulation_enter
  .popsection
)");

static void* first_frame(char* top, void (*entry)(void*), void* argument) {
  void** frame = reinterpret_cast<void**>(top) - 9;  // keeps enter's stack a multiple of 16
  for (int i = 0; i < 9; ++i) frame[i] = nullptr;
  frame[3] = argument;                        // r12
  frame[4] = reinterpret_cast<void*>(entry);  // rbx
  frame[6] = reinterpret_cast<void*>(&aspp_emulation_enter);
  return frame;
}
#else
static void enter(unsigned e0, unsigned e1, unsigned a0, unsigned a1) {
  const auto join = [](unsigned low, unsigned high) { return low | uint64_t(high) << 32; };
  reinterpret_cast<void (*)(void*)>(join(e0, e1))(reinterpret_cast<void*>(join(a0, a1)));
}

static void* first_frame(char* stack, size_t bytes, void (*entry)(void*), void* argument) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  const auto e = reinterpret_cast<uint64_t>(entry), a = reinterpret_cast<uint64_t>(argument);
  makecontext(context, reinterpret_cast<void (*)()>(&enter), 4, unsigned(e), unsigned(e >> 32),
              unsigned(a), unsigned(a >> 32));
  return context;
}

static void aspp_emulation_switch(void** from, void* to) {
  if (*from == nullptr) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
#endif

void Fiber::adopt() {
#if ASPP_TSAN
  tsan_ = __tsan_get_current_fiber();
#endif
}

void Fiber::create(void (*entry)(void*), void* argument, unsigned number) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* mapped = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (mapped == MAP_FAILED || mprotect(mapped, page, PROT_NONE) != 0) {
    std::perror("aspp_ext emulation: no memory for a stack");
    std::abort();
  }
  char* bottom = static_cast<char*>(mapped) + page;
  bottom_ = bottom;
  bytes_ = kStackBytes;
  // Tops at one offset in their pages would all compete for the same few lines of the L1 cache.
  const size_t spread = size_t(number) * 832 % 4096 / 64 * 64;
#if defined(__x86_64__)
  stack_ = first_frame(bottom + kStackBytes - spread, entry, argument);
#else
  stack_ = first_frame(bottom, kStackBytes - spread, entry, argument);
#endif
#if ASPP_TSAN
  tsan_ = __tsan_create_fiber(0);
  char name[32];
  std::snprintf(name, sizeof name, "CUDA thread %u", number);
  __tsan_set_fiber_name(tsan_, name);
#endif
}

void Fiber::switch_to(Fiber& next) {
#if ASPP_TSAN
  __tsan_switch_to_fiber(next.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if ASPP_ASAN
  came_from = this;
  __sanitizer_start_switch_fiber(&asan_, next.bottom_, next.bytes_);
#endif
  aspp_emulation_switch(&stack_, next.stack_);
  entered();
}

void Fiber::entered() {
#if ASPP_ASAN
  __sanitizer_finish_switch_fiber(asan_, &came_from->bottom_, &came_from->bytes_);
#endif
}

void free_after([[maybe_unused]] void* place, void* memory, [[maybe_unused]] void*& janitor) {
#if ASPP_TSAN
  if (janitor == nullptr) janitor = __tsan_create_fiber(0);
  void* self = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(janitor, __tsan_switch_to_fiber_no_sync);
  __tsan_acquire(place);
  std::free(memory);
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
#else
  std::free(memory);
#endif
}

}  // namespace aspp::cuda::emulation
