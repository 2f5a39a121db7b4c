// SPDX-License-Identifier: BSD-3-Clause
// A thread's working memory, divided into buffers. Without memory it only counts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace aspp::ASPP_ISA {

template <typename T>
class Buffers {
 public:
  explicit Buffers(void* memory) : begin_(static_cast<char*>(memory)), at_(begin_) {}

  T* take(ptrdiff_t elements) {
    T* here = reinterpret_cast<T*>(at_);
    at_ += (elements * ptrdiff_t(sizeof(T)) + 127) / 64 * 64;  // whole cache lines and a spare one
    return here;
  }
  int64_t bytes() const { return at_ - begin_; }

 private:
  char *const begin_, *at_;
};

}  // namespace aspp::ASPP_ISA
