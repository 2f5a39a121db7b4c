// SPDX-License-Identifier: BSD-3-Clause
#include "unwritten.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

#include "scheduler.h"

namespace aspp::cuda::emulation {
namespace {

// A byte for each byte of memory, 1 where nothing has written it, found as processors find pages:
// kernels ask at every access. Where nothing is tracked far and wide there is none.
constexpr int kPageBits = 20, kIndexBits = 14;  // of an address, which has 48
constexpr size_t kPage = size_t(1) << kPageBits, kIndices = size_t(1) << kIndexBits;
struct Pages {
  std::atomic<uint8_t*> page[kIndices];
};
std::atomic<Pages*> all_pages[kIndices];

struct Ranges {
  std::mutex mutex;
  std::map<uintptr_t, size_t> bytes;  // by where they begin

  static Ranges& get() {
    static auto* ranges = new Ranges;  // never destroyed: memory may be freed at exit
    return *ranges;
  }
};

uintptr_t address(const void* memory) { return reinterpret_cast<uintptr_t>(memory); }

std::atomic<Pages*>& pages_of(uintptr_t at) {
  return all_pages[at >> (kPageBits + kIndexBits) & (kIndices - 1)];
}
std::atomic<uint8_t*>& page_of(Pages* pages, uintptr_t at) {
  return pages->page[at >> kPageBits & (kIndices - 1)];
}

// visit(where a part of the memory begins, what the page has of it, how many bytes)
template <class Visit>
void for_each_part(const void* memory, size_t bytes, Visit&& visit) {
  for (uintptr_t at = address(memory), end = at + bytes; at < end;) {
    const size_t part = std::min(end - at, kPage - at % kPage);
    Pages* const pages = pages_of(at);
    uint8_t* const page = pages == nullptr ? nullptr : page_of(pages, at).load();
    if (page != nullptr) visit(at, page + at % kPage, part);
    at += part;
  }
}

// Pages stay. The caller holds the mutex.
void make_pages(uintptr_t begin, uintptr_t end) {
  for (uintptr_t at = begin; at < end; at = (at / kPage + 1) * kPage) {
    auto& pages = pages_of(at);
    if (pages == nullptr) pages = new Pages();
    auto& page = page_of(pages, at);
    if (page == nullptr) page = static_cast<uint8_t*>(std::calloc(kPage, 1));
  }
}

void set(const void* memory, size_t bytes, int value) {
  for_each_part(memory, bytes, [&](uintptr_t, uint8_t* of_page, size_t part) {
    std::memset(of_page, value, part);
  });
}

}  // namespace

void track(const void* memory, size_t bytes) {
  if (kTsan) return;
  const std::lock_guard lock(Ranges::get().mutex);
  Ranges::get().bytes[address(memory)] = bytes;
  make_pages(address(memory), address(memory) + bytes);
  set(memory, bytes, 1);
}

void untrack(const void* memory) {
  if (kTsan) return;
  const std::lock_guard lock(Ranges::get().mutex);
  const auto range = Ranges::get().bytes.find(address(memory));
  if (range == Ranges::get().bytes.end()) return;
  set(memory, range->second, 0);
  Ranges::get().bytes.erase(range);
}

void note_written(const void* memory, size_t bytes) {
  if (!kTsan) set(memory, bytes, 0);
}

void check_written(const void* memory, size_t bytes, const char* what) {
  if (kTsan) return;
  for_each_part(memory, bytes, [&](uintptr_t at, const uint8_t* of_page, size_t part) {
    const void* const found = std::memchr(of_page, 1, part);
    if (found == nullptr) return;
    at += size_t(static_cast<const uint8_t*>(found) - of_page);
    const std::lock_guard lock(Ranges::get().mutex);
    const auto& [begin, size] = *std::prev(Ranges::get().bytes.upper_bound(at));
    fail("%s: reads %zu bytes at byte %td of %zu, and nothing has written byte %zu", what, bytes,
         std::ptrdiff_t(address(memory)) - std::ptrdiff_t(begin), size, size_t(at - begin));
  });
}

}  // namespace aspp::cuda::emulation
