// SPDX-License-Identifier: BSD-3-Clause
#include "pyramid_sm80.cuh"

#include "../launch.h"

namespace aspp::cuda {

cudaError_t launch_pyramid_sm80(plan::Pass pass, Math math, int shape, const PyramidParams& params,
                                cudaStream_t stream) {
  switch (math) {
    case Math::bfloat16: return sm80::launch_math<Math::bfloat16>(pass, shape, params, stream);
    case Math::float16: return sm80::launch_math<Math::float16>(pass, shape, params, stream);
    case Math::tf32: return sm80::launch_math<Math::tf32>(pass, shape, params, stream);
    case Math::float32: return sm80::launch_math<Math::float32>(pass, shape, params, stream);
    default: return sm80::launch_math<Math::float64>(pass, shape, params, stream);
  }
}

}  // namespace aspp::cuda
