// SPDX-License-Identifier: BSD-3-Clause
// From tensors in any format to the operands that the kernels read, and from what they write to
// tensors: pixels in rows with their channels side by side, rows beginning at multiples of 16
// bytes, zeros up to there. What already lies that way is used in place.
#pragma once

#include "current_stream.h"
#include "params.h"

namespace aspp::cuda {

// Rows of channels, `pitch` elements apart.
struct Rows {
  void* data = nullptr;
  int64_t pitch = 0;
};

// Throws unless `error` is none.
void check_cuda(const char* op, cudaError_t error);

class Operands {
 public:
  // `like` has the device and the dtype of all operands. As long as this object lives its device is
  // the current one.
  Operands(const char* op, const Tensor& like, Math math);

  const char* op() const { return op_; }
  Math math() const { return math_; }
  // Whether the tensor is of the type that sums are of: float64 for float64, else float32.
  bool is_sum(const Tensor& t) const {
    return t.scalar_type() == (math_ == Math::float64 ? ScalarType::Double : ScalarType::Float);
  }
  cudaStream_t stream() const { return stream_.get(); }

  Rows image(const Tensor& t);  // [N, C, H, W] -> [N * H * W, C]
  // The same where each branch has its own channels, as in the gradient of a pyramid: they begin at
  // multiples of a chunk, at first[branch].
  Rows branch_image(const Tensor& t, const std::vector<int64_t>& channels,
                    std::vector<int64_t>& first);
  const void* weight(const Tensor& w);  // [O, C, kh, kw] -> [O, kh * kw, padded C]
  const void* vector(const Tensor& v);  // contiguous

  // Where a kernel writes a result to. Then `deliver` brings it to the tensor, if that is not
  // there.
  Rows image_target(const Tensor& out);   // [N * H * W, C]
  Rows weight_target(const Tensor& out);  // [O, kh * kw, padded C]
  void deliver(const Rows& rows, const Tensor& out);

  void* allocate(int64_t bytes);  // alive as long as this object
  Rows allocate_rows(int64_t rows, int64_t channels);
  int64_t padded(int64_t channels) const;
  // Refuses what kernels cannot count.
  int32_t narrow(const char* what, int64_t value) const;
  int32_t narrow_pitch(const Rows& rows) const;

 private:
  Tensor keep(const Tensor& t);
  void pack_image(const Tensor& t, int64_t first, int64_t count, char* to, int64_t pitch);
  void transpose(TransposeParams params);

  const char* op_;
  const Tensor like_;
  const Math math_;
  const int64_t bytes_, chunk_;  // of an element; elements in 16 bytes
  CurrentStream stream_;
  std::vector<Tensor> storage_;
};

}  // namespace aspp::cuda
