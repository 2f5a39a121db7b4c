// SPDX-License-Identifier: BSD-3-Clause
#include "separable_sm80.cuh"

namespace aspp::cuda::sm80 {

template cudaError_t launch_fused_math<Math::bfloat16>(int, const SeparableParams&, cudaStream_t);

}  // namespace aspp::cuda::sm80
