// SPDX-License-Identifier: BSD-3-Clause
// Device memory that nothing has written since it was allocated. A kernel must not read it,
// whatever it makes of the values: compute-sanitizer's initcheck would tell it off.
//
// ThreadSanitizer's builds leave that to the others, as these notes would be races of their own.
#pragma once

#include <cstddef>

namespace aspp::cuda::emulation {

// Of memory, from its allocation to its end.
void track(const void* memory, size_t bytes);
void untrack(const void* memory);

// Of any memory.
void note_written(const void* memory, size_t bytes);
// Fails where a byte is tracked and was not written. `what` reads it.
void check_written(const void* memory, size_t bytes, const char* what);

class Tracked {
 public:
  Tracked(const void* memory, size_t bytes) : memory_(memory) { track(memory, bytes); }
  ~Tracked() { untrack(memory_); }
  Tracked(const Tracked&) = delete;
  Tracked& operator=(const Tracked&) = delete;

 private:
  const void* const memory_;
};

}  // namespace aspp::cuda::emulation
