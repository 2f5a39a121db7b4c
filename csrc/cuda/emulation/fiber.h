// SPDX-License-Identifier: BSD-3-Clause
// Stacks that take turns on one OS thread, and what the sanitizers have to be told about them.
#pragma once

#include <cstddef>

#if defined(__has_feature)
#define ASPP_HAS_FEATURE(name) __has_feature(name)
#else
#define ASPP_HAS_FEATURE(name) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || ASPP_HAS_FEATURE(address_sanitizer)
#define ASPP_ASAN 1
#else
#define ASPP_ASAN 0
#endif
#if defined(__SANITIZE_THREAD__) || ASPP_HAS_FEATURE(thread_sanitizer)
#define ASPP_TSAN 1
#include <sanitizer/tsan_interface.h>
#else
#define ASPP_TSAN 0
#endif

// For the emulation's own bookkeeping, which fibers of one OS thread share without any ordering
// that ThreadSanitizer could see, and must not provide to the kernels either.
#if ASPP_TSAN
#define ASPP_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define ASPP_UNSEEN
#endif

namespace aspp::cuda::emulation {

inline constexpr bool kAsan = ASPP_ASAN;
inline constexpr bool kTsan = ASPP_TSAN;

// What happened before publish(place) is before what follows observe(place), for ThreadSanitizer.
inline void publish([[maybe_unused]] void* place) {
#if ASPP_TSAN
  __tsan_release(place);
#endif
}
inline void observe([[maybe_unused]] void* place) {
#if ASPP_TSAN
  __tsan_acquire(place);
#endif
}

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The stack that is running: an OS thread's own.
  void adopt();
  // A new stack. entry(argument) begins at the first switch_to and must not return.
  // `number` spreads the stacks over the cache's sets.
  void create(void (*entry)(void*), void* argument, unsigned number);

  // Leaves this stack, which must be the running one, for `next`; returns when somebody comes back.
  ASPP_UNSEEN void switch_to(Fiber& next);
  // entry's first act.
  void entered();

 private:
  void* stack_ = nullptr;  // its pointer while it does not run
  void* tsan_ = nullptr;
  void* asan_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
};

// std::free(memory), which ThreadSanitizer takes for ordered after publish(place), without ordering
// anything else of this thread after it: `janitor`, null at first, does it.
ASPP_UNSEEN void free_after(void* place, void* memory, void*& janitor);

}  // namespace aspp::cuda::emulation
