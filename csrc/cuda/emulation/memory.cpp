// SPDX-License-Identifier: BSD-3-Clause
// Asynchronous copies and atomics.
#include "scheduler.h"
#include "unwritten.h"

namespace aspp::cuda::emulation {
namespace {

struct alignas(16) Piece {
  uint32_t words[4];
};

// NaN in every format. Assigned, not memset, which ThreadSanitizer does not see where it is
// inlined.
constexpr Piece kUnknown{{~0u, ~0u, ~0u, ~0u}};

// Done copies are forgotten by the dozen, not one by one.
constexpr size_t kForget = 64;

}  // namespace

void copy_async(void* shared, const void* global, bool valid) {
  check_shared(shared, sizeof(Piece), "cp_async_16");
  check_aligned(global, sizeof(Piece), "cp_async_16");
  if (valid) check_written(global, sizeof(Piece), "cp_async_16");
  Thread& self = *running;
  // The bytes may arrive from now on and need not have: nobody may read them, nor write.
  *static_cast<Piece*>(shared) = kUnknown;
  if (valid && (kAsan || kTsan)) {  // so that their reports name the line of the copy
    for (const uint32_t& word : static_cast<const Piece*>(global)->words) {
      static_cast<void>(*static_cast<const volatile uint32_t*>(&word));
    }
  }
  self.copies.push_back({shared, valid ? global : nullptr, self.groups});
}

void commit_copies() { ++current("cp_async_commit").groups; }

void wait_copies(unsigned pending) {
  Thread& self = current("cp_async_wait");
  while (self.copied < self.copies.size()) {
    const Copy& copy = self.copies[self.copied];
    if (copy.group + pending >= self.groups) break;
    Piece& to = *static_cast<Piece*>(copy.shared);
    to = copy.global != nullptr ? *static_cast<const Piece*>(copy.global) : Piece{};
    ++self.copied;
  }
  if (self.copied < self.copies.size() && self.copied < kForget) return;
  self.copies.erase(self.copies.begin(), self.copies.begin() + std::ptrdiff_t(self.copied));
  self.copied = 0;
}

// ThreadSanitizer does not follow fences. A relaxed atomic after a fence publishes what came before
// the fence, a fence after a relaxed atomic observes what that atomic's word was published with.
void fence() {
  Thread& self = current("fence_device");
  if constexpr (kTsan) {
    for (unsigned i = 0; i < self.seen_count && i < Thread::kSeen; ++i) observe(self.seen[i]);
    self.seen_count = 0;
    self.fenced = true;
  } else {
#if !ASPP_TSAN
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
  }
}

uint32_t atomic_add(uint32_t* word, uint32_t value) {
  check_aligned(word, sizeof *word, "atomic");
  check_written(word, sizeof *word, "atomic");
  Thread& self = current("atomic");
  step_aside();
  if (kTsan && self.fenced) publish(word);
  const uint32_t before = __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
  if (kTsan) self.seen[self.seen_count++ % Thread::kSeen] = word;
  return before;
}

}  // namespace aspp::cuda::emulation
