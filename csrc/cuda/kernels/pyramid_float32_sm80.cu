// SPDX-License-Identifier: BSD-3-Clause
#include "pyramid_sm80.cuh"

namespace aspp::cuda::sm80 {

template cudaError_t launch_math<Math::float32>(Pass, int, const PyramidParams&, cudaStream_t);

}  // namespace aspp::cuda::sm80
