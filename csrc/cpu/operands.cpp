// SPDX-License-Identifier: BSD-3-Clause
#include "operands.h"

#include <cstring>

#include "parallel.h"

namespace aspp {

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: refuse("aspp_ext: no CPU kernel for ", dtype_name(t.scalar_type()));
  }
}

Image image_of(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Operands::Operands(const Tensor& x)
    : double_precision_(x.scalar_type() == ScalarType::Double),
      product_dtype_(x.scalar_type() == ScalarType::BFloat16 && kernels().bfloat16_products
                         ? Dtype::kBFloat16
                         : compute_dtype()),
      like_(x) {}

namespace {

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return ScalarType::Double;
    case Dtype::kBFloat16: return ScalarType::BFloat16;
    case Dtype::kFloat16: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

char* at_element(const Image& image, int64_t elements) {
  return static_cast<char*>(image.data) + elements * size_of(image.dtype);
}

}  // namespace

Image channels_from(Image image, int64_t channel) {
  image.data = at_element(image, channel * image.c_stride);
  return image;
}

void* Operands::allocate(int64_t count, Dtype dtype) {
  const int64_t size[] = {count};
  storage_.push_back(with_memory(
      like_, [&] { return torch::stable::new_empty(like_, {size, 1}, scalar_type(dtype)); }));
  return storage_.back().data_ptr();
}

void* Operands::allocate_zeros(int64_t count, Dtype dtype) {
  void* memory = allocate(count, dtype);
  std::memset(memory, 0, size_t(count * size_of(dtype)));
  return memory;
}

Tensor Operands::empty(std::vector<int64_t> sizes) const {
  return with_memory(
      like_, [&] { return torch::stable::new_empty(like_, sizes, scalar_type(compute_dtype())); });
}

Matrix Operands::weight(const Tensor& w, Dtype dtype) {
  const int64_t out = w.size(0), in = w.size(1), kh = w.size(2), kw = w.size(3);
  const int64_t taps = kh * kw, row = padded(out);
  const bool one_step = kh == 1 || kw == 1 || w.stride(2) == kw * w.stride(3);
  if (dtype_of(w) == dtype && out == row && w.stride(0) == 1 && w.stride(1) >= out && one_step) {
    return {w.data_ptr(), kw > 1 ? w.stride(3) : w.stride(2), w.stride(1)};
  }
  // Source columns in the order they lie in memory: all (c, tap) at once when a row of w is
  // contiguous, else tap by tap.
  const bool contiguous_rows = one_step && w.stride(1) == taps * (kw > 1 ? w.stride(3) : 1) &&
                               (taps == 1 || (kw > 1 ? w.stride(3) : w.stride(2)) == 1);
  const int64_t passes = contiguous_rows ? 1 : taps;
  const int64_t length = contiguous_rows ? in * taps : in;
  constexpr int64_t kSlice = 256;
  const int64_t slices = (length + kSlice - 1) / kSlice;
  char* packed = static_cast<char*>(allocate(in * taps * row, dtype));
  run_tasks(passes * slices, 0, [&](int64_t task, void*) {
    const int64_t tap = task / slices, first = task % slices * kSlice;
    const int64_t count = length - first < kSlice ? length - first : kSlice;
    Image source = image_of(w);
    const int64_t start = tap / kw * w.stride(2) + tap % kw * w.stride(3);
    source.x_stride = contiguous_rows && taps > 1 ? 1 : w.stride(1);
    source.c_stride = w.stride(0);
    source.data = at_element(source, start + first * source.x_stride);
    kernels().to_pixels(source, 0, out, count, 0, 1,
                        packed + (tap * in + first) * row * size_of(dtype), dtype, row);
  });
  return contiguous_rows ? Matrix{packed, row, taps * row} : Matrix{packed, in * row, row};
}

const void* Operands::depthwise(const Tensor& w) {
  const int64_t stride = padded(w.size(0));
  void* packed = allocate(w.size(2) * w.size(3) * stride);
  Image source = image_of(w);
  source.c_stride = w.stride(0);
  kernels().to_pixels(source, 0, w.size(0), w.size(3), 0, w.size(2), packed, compute_dtype(),
                      stride);
  return packed;
}

void Operands::vector(const Tensor& v, int64_t n, int64_t first, int64_t count, void* to) {
  const bool matrix = v.dim() == 2;
  const int64_t step = matrix ? v.stride(1) : v.stride(0);
  Image source{v.data_ptr(), dtype_of(v), 0, step, 0, 0};
  source.data = at_element(source, (matrix ? n * v.stride(0) : 0) + first * step);
  kernels().to_pixels(source, 0, count, 1, 0, 1, to, compute_dtype(), padded(count));
}

const void* Operands::vector(const Tensor& v) {
  void* to = allocate(padded(v.size(0)));
  vector(v, 0, 0, v.size(0), to);
  return to;
}

const void* columns_of(Operands& operands, const Tensor& v, int64_t rows,
                       const std::vector<BranchParams>& branches, int64_t columns) {
  void* to = operands.allocate(rows * columns);
  for (int64_t n = 0; n < rows; ++n) {
    for (const BranchParams& branch : branches) {
      operands.vector(v, n, branch.channel, branch.out_channels,
                      operands.offset(to, n * columns + branch.column));
    }
  }
  return to;
}

int64_t assign_columns(std::vector<BranchParams>& branches) {
  int64_t columns = 0, channels = 0;
  for (BranchParams& branch : branches) {
    branch.column = columns;
    branch.channel = channels;
    columns += padded(branch.out_channels);
    channels += branch.out_channels;
  }
  return columns;
}

}  // namespace aspp
