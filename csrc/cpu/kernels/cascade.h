// SPDX-License-Identifier: BSD-3-Clause
// A sum of many rows of channels in which no chain is long: kStretch of them make one of the next
// level, so that the error grows with the number of levels and not of rows.
#pragma once

#include <cstring>

#include "vector.h"

namespace aspp::ASPP_ISA {

template <typename T, int kChannels>
class Cascade {
 public:
  explicit Cascade(int64_t channels) : channels_(channels) {
    std::memset(levels_, 0, sizeof(levels_));
  }

  // Where to add the next row. Not behind the last `channels` of it.
  T* next() {
    int64_t rows = count_++;
    for (int level = 0; level + 1 < kLevels && rows > 0; ++level) {
      if (rows % kStretch != 0) break;
      rows /= kStretch;
      carry(levels_[level], levels_[level + 1]);
    }
    return levels_[0];
  }

  void add(Vec<T> row) {  // of one vector
    T* const to = next();
    store(to, load(to) + row);
  }

  void add_to(T* total) {
    for (int level = 0; level + 1 < kLevels; ++level) carry(levels_[level], levels_[level + 1]);
    carry(levels_[kLevels - 1], total);
  }

 private:
  static constexpr int kLevels = 4;

  void carry(T* from, T* to) {
    for (int64_t c = 0; c < channels_; c += kLanes<T>) {
      store(to + c, load(to + c) + load(from + c));
      store(from + c, Vec<T>{});
    }
  }

  const int64_t channels_;  // whole vectors
  int64_t count_ = 0;
  T levels_[kLevels][kChannels];
};

}  // namespace aspp::ASPP_ISA
