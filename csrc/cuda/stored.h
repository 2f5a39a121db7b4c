// SPDX-License-Identifier: BSD-3-Clause
// The separable pyramid through memory: what the 1x1s read is written by the depthwise kernels and
// read by the dense ones. It suits every shape; its gradients all go this way.
#pragma once

#include "depthwise_operands.h"
#include "pyramid_call.h"

namespace aspp::cuda {

// A forward call whose operands are as kernels read them. All of it lives as long as the Operands
// that it was made with.
struct SeparableProblem {
  PyramidShape shape;
  Rows x;                                 // [P, x.pitch]
  std::vector<DepthwiseBranch> branches;  // as depthwise_branches makes them
  std::vector<const void*> pointwise;     // per branch [O, padded C], as Operands::weight makes it
  std::vector<int64_t> out_channels;      // per branch O
  bool between_relu = false;
  // Of each branch with depthwise taps what these read [P, pitch], through memory; empty: x.
  std::vector<Rows> sources;

  const void* scale = nullptr;  // [sum O], null for none
  const void* shift = nullptr;  // [sum O] or [N, sum O], null for none
  bool shift_per_sample = false;
  bool relu = false;
};

// What is stored between the two kinds of kernels is at most so many bytes, or that of one image.
inline constexpr int64_t kStoredBytes = 32 << 20;

// out [P, out.pitch], wherever its rows begin. Slice by slice of the batch, each of as many images
// as kStoredBytes has room for.
void stored_forward(Operands& operands, const SeparableProblem& problem, const Rows& out);

// The gradients of one call's branches, step by step. Rows of gradient have padded C channels, of
// which those beyond C are written and read, but nothing comes of them.
class StoredBackward {
 public:
  StoredBackward(Operands& operands, const PyramidShape& shape, const Rows& x,
                 const std::vector<DepthwiseBranch>& branches, bool between_relu);

  // Of what the branch's 1x1 reads. `grad` has the branch's channels from `first_channel` on.
  void back(const Rows& grad, int64_t first_channel, const Tensor& pointwise, const Rows& to);
  // Of the 1x1's weight.
  void pointwise(const Rows& grad, int64_t first_channel, const Rows& operand, const Tensor& to);
  // What the 1x1 of branch b reads.
  void operand(size_t b, const Rows& to);
  // The gradient of what is between: of e to `grad` (null for nowhere; may be back), and what the
  // 1x1 reads to `operand` (null for nowhere). correction: null, or as BetweenGradParams has it.
  void between(size_t b, const Rows& back, void* grad, const Rows& operand, const void* correction);
  // The same with those of scale and shift, vectors [C] in the tensors' dtype or of type Sum.
  void between(size_t b, const Rows& back, void* grad, const Rows& operand, const Tensor& scale,
               const Tensor& shift);
  // Of the depthwise weight, from that of e.
  void depthwise(size_t b, const Rows& grad, const Tensor& to);
  // Of x, from those of all branches' e, or of x where a branch is plain.
  void input(const std::vector<Rows>& grads, const Rows& to);

 private:
  void between(BetweenGradParams& params, size_t b, const Rows& back, void* grad,
               const Rows& operand);
  int64_t sum_bytes() const { return operands_.math() == Math::float64 ? 8 : 4; }
  void sum_parts(const SumPartsParams& params);

  Operands& operands_;
  const PyramidShape shape_;
  const Rows x_;
  const std::vector<DepthwiseBranch>& branches_;
  const bool relu_;
  DepthwiseShape pixels_;
};

// Where a call's gradients go to: one tensor per branch, or an empty list where they are not
// needed.
struct SeparableGradients {
  std::optional<Tensor> x;                    // [N, C, H, W]
  std::vector<Tensor> depthwise, pointwise;   // contiguous
  std::vector<Tensor> scale, shift;           // [C], in the tensors' dtype or of type Sum
  std::vector<const void*> corrections = {};  // per branch, as BetweenGradParams; or empty
};

// Where what is between is a batch norm of this batch: one call for `scale` and `shift`, of whose
// sums its gradient's corrections are made (and added up over processes before that), and one call
// with those corrections for the others.
void stored_backward(Operands& operands, const PyramidShape& shape, const Rows& x,
                     const std::vector<DepthwiseBranch>& branches, bool between_relu,
                     const std::vector<Tensor>& pointwise, const Tensor& grad,
                     const SeparableGradients& to);

// Of the rounded e of all branches, per channel: the mean, and the sum of squared differences from
// it. [branches * C] of type Sum; zeros where a branch is plain. With `results`, rows of padded C
// channels for each branch with depthwise taps, e itself is stored there; else sums alone.
struct DepthwiseMoments {
  Tensor mean, squares;
};
DepthwiseMoments depthwise_statistics(Operands& operands, const Tensor& like,
                                      const PyramidShape& shape, const Rows& x,
                                      const std::vector<DepthwiseBranch>& branches,
                                      const std::vector<Rows>& results);

}  // namespace aspp::cuda
