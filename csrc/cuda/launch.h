// SPDX-License-Identifier: BSD-3-Clause
// The bridge between the bindings and the kernels: functions of plain data and a stream. They do
// not allocate, do not wait, and may be called while a stream is being captured.
#pragma once

#include <cuda_runtime.h>

#include "params.h"
#include "tile_shapes.h"

namespace aspp::cuda {

// params.workers blocks of tile_shape(math, shape); none where there is no work.
cudaError_t launch_pyramid_sm80(plan::Pass pass, Math math, int shape, const PyramidParams& params,
                                cudaStream_t stream);
cudaError_t launch_transpose_sm80(const TransposeParams& params, cudaStream_t stream);
cudaError_t launch_combine_sm80(Math math, const CombineParams& params, cudaStream_t stream);

}  // namespace aspp::cuda
