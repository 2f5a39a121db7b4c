// SPDX-License-Identifier: BSD-3-Clause
// The order in which kernels of depthwise taps walk the batch: an image's rows phase by phase, 0,
// r, 2 r, ..., 1, r + 1, 2 r + 1, ... for a rate of r. In it the rows that a tap reads are
// neighbours of the row that it is for, as if the rate were 1, and what neighbouring rows share is
// read once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace aspp::cuda::sm80 {

// A pixel of the batch and where it is on the map.
struct Place {
  int32_t index;  // (n * height + y) * width + x
  int32_t y, x;
};

class Phases {
 public:
  Phases() = default;
  __host__ __device__ Phases(int32_t height, int32_t width, int32_t rate)
      : width_(width),
        area_(height * width),
        rate_(rate),
        rows_(height / rate),
        longer_(height % rate) {}

  // The row of the map that is `number`-th in an image.
  __device__ __forceinline__ int32_t row(int32_t number) const {
    const int32_t of_longer = longer_ * (rows_ + 1);
    const bool longer = number < of_longer;
    const int32_t rows = longer ? rows_ + 1 : rows_;
    const int32_t from = longer ? number : number - of_longer;
    const int32_t phase = from / rows;
    return phase + (longer ? 0 : longer_) + (from - phase * rows) * rate_;
  }

  // The pixel that is `number`-th in the batch.
  __device__ __forceinline__ Place pixel(int32_t number) const {
    const int32_t image = number / area_, of_image = number - image * area_;
    const int32_t row_number = of_image / width_;
    Place place;
    place.y = row(row_number);
    place.x = of_image - row_number * width_;
    place.index = image * area_ + place.y * width_ + place.x;
    return place;
  }

 private:
  int32_t width_ = 1, area_ = 1, rate_ = 1;
  int32_t rows_ = 1, longer_ = 0;  // of a phase at least; how many phases have one more
};

}  // namespace aspp::cuda::sm80
