// SPDX-License-Identifier: BSD-3-Clause
// From tensors in any format and dtype to the operands the kernels read: weights with channels in
// rows and outputs contiguous, vectors padded to whole SIMD vectors. A weight that already lies
// that way (float32 or float64, stride 1 over O) is read in place: folding it so once is the cache.
#pragma once

#include <type_traits>
#include <vector>

#include "../operator_results.h"
#include "kernels/kernels.h"

namespace aspp {

Dtype dtype_of(const Tensor& t);
Image image_of(const Tensor& t);  // [N, C, H, W]
Image channels_from(Image image, int64_t channel);

struct Matrix {  // element steps from tap to tap and from row to row
  const void* data = nullptr;
  int64_t tap = 0, row = 0;
};

class Operands {
 public:
  explicit Operands(const Tensor& x);

  bool double_precision() const { return double_precision_; }
  // `count` elements, in the compute type unless told, alive as long as this object; not
  // initialised
  void* allocate(int64_t count) { return allocate(count, compute_dtype()); }
  void* allocate(int64_t count, Dtype dtype);
  void* allocate_zeros(int64_t count, Dtype dtype);
  Tensor empty(std::vector<int64_t> sizes) const;  // in the compute type, not initialised
  template <typename V>                            // void or const void
  V* offset(V* base, int64_t elements) const {
    using Byte = std::conditional_t<std::is_const_v<V>, const char, char>;
    return static_cast<Byte*>(base) + elements * (double_precision_ ? 8 : 4);
  }

  // weight [O, C, kh, kw] -> element (tap, c, o) at tap * m.tap + c * m.row + o, in product_dtype()
  Matrix weight(const Tensor& w) { return weight(w, product_dtype_); }
  Matrix weight(const Tensor& w, Dtype dtype);
  Dtype product_dtype() const { return product_dtype_; }
  Dtype compute_dtype() const { return double_precision_ ? Dtype::kFloat64 : Dtype::kFloat32; }
  // [C, 1, kh, kw] -> [kh * kw, padded C]
  const void* depthwise(const Tensor& w);
  // [count] at `first` of row `n` of v -> to[0 .. padded(count)), zeros behind
  void vector(const Tensor& v, int64_t n, int64_t first, int64_t count, void* to);
  const void* vector(const Tensor& v);

 private:
  bool double_precision_;
  Dtype product_dtype_;
  Tensor like_;
  std::vector<Tensor> storage_;
};

// Epilogue vectors laid out like the accumulator row of `branches`.
const void* columns_of(Operands& operands, const Tensor& v, int64_t rows,
                       const std::vector<BranchParams>& branches, int64_t columns);

// Gives every branch its columns; returns their number.
int64_t assign_columns(std::vector<BranchParams>& branches);

}  // namespace aspp
