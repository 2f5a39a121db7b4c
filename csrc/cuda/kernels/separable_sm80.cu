// SPDX-License-Identifier: BSD-3-Clause
#include "separable_sm80.cuh"

namespace aspp::cuda {

cudaError_t launch_separable_sm80(Math math, int shape, const SeparableParams& params,
                                  cudaStream_t stream) {
  switch (math) {
    case Math::bfloat16: return sm80::launch_fused_math<Math::bfloat16>(shape, params, stream);
    case Math::float16: return sm80::launch_fused_math<Math::float16>(shape, params, stream);
    case Math::tf32: return sm80::launch_fused_math<Math::tf32>(shape, params, stream);
    case Math::float32: return sm80::launch_fused_math<Math::float32>(shape, params, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace aspp::cuda
