// SPDX-License-Identifier: BSD-3-Clause
// One launch of the dense pyramid kernels, from the problem to the launch: what the bindings of the
// dense operators and of those that contain 1x1s have in common.
#pragma once

#include <optional>

#include "../operator_checks.h"
#include "operands.h"
#include "prepare.h"

namespace aspp::cuda {

inline constexpr Limits kCudaLimits{"on CUDA", INT64_MAX, kMaxBranches, kMostCounted};

Math math_of(const Tensor& t, bool tf32);

// The process' own. Never destroyed: the CUDA runtime may be gone by then.
PlanCache& plan_cache();

struct Kernel {
  int64_t height, width, out_channels;
};

std::vector<Kernel> kernels_of(const std::vector<Tensor>& weights);

// Calls `prepare`, which returns a cudaError_t; what the planner refuses, the operator refuses.
template <class Prepare>
void prepare_or_refuse(const Operands& operands, Prepare&& prepare) {
  cudaError_t error = cudaSuccess;
  try {
    error = prepare();
  } catch (const std::logic_error& refusal) {
    refuse(operands.op(), ": ", refusal.what());
  } catch (const std::overflow_error& refusal) {
    refuse(operands.op(), ": ", refusal.what());
  }
  check_cuda(operands.op(), error);
}

// What every launch over a work list is told: the batch's sizes; and the plan, with room for the
// sums of slices.
void set_sizes(const Operands& operands, const PyramidShape& shape, WorkParams& params);
void set_plan(Operands& operands, const Prepared& prepared, WorkParams& params);

class PyramidCall {
 public:
  PyramidParams params{};

  // `rates` are (rate_h, rate_w) per kernel; shape.out_channels is not read. What cannot be planned
  // is refused here, before any operand is copied.
  PyramidCall(Operands& operands, plan::Pass pass, const PyramidShape& shape,
              const std::vector<Kernel>& kernels, const std::vector<int64_t>& rates);

  void set_weights(const std::vector<Tensor>& weights);
  // What all branches read or, forward only, what one of them does.
  void set_a(const Rows& rows);
  void set_a(size_t branch, const Rows& rows);
  void set_b(const Rows& rows);
  void set_grad(const Tensor& grad);
  void set_out(const Rows& rows);
  // Null and false for none; `channels` is those of the result.
  void set_epilogue(const void* scale, const void* shift, bool shift_per_sample, bool relu,
                    int64_t channels);
  // Of the result, per channel, into [sum O] tensors of type Sum.
  void set_statistics(const Tensor& mean, const Tensor& squares);

  void launch();

 private:
  void prepare(const PyramidShape& shape, const std::vector<Kernel>& kernels,
               const std::vector<int64_t>& rates);

  Operands& operands_;
  const plan::Pass pass_;
  const Math math_;
  Prepared prepared_;
  std::optional<CombineParams> combine_;
  std::vector<int64_t> out_channels_;
};

}  // namespace aspp::cuda
