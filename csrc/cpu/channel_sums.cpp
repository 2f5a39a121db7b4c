// SPDX-License-Identifier: BSD-3-Clause
// CPU bindings of the sums over pixels behind a batch norm, of channels_last maps. PyTorch's run
// along all pixels in one chain, which on maps with constant stretches, as padding is, loses three
// digits.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../operator_results.h"
#include "kernels/kernels.h"
#include "parallel.h"

namespace aspp {
namespace {

// Rows of channels [N * H * W, C] without gaps.
void check_rows(const char* op, const char* name, const Tensor& t) {
  check_image(op, name, t);
  const ScalarType type = t.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Double, op, ": ", name,
          " must be float32 or float64, got ", dtype_name(type));
  int64_t step = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    require(t.size(d) == 1 || t.stride(d) == step, op, ": ", name, " must be channels_last");
    step *= t.size(d);
  }
}

constexpr int64_t kPixels = 1024;  // of a task: no result depends on the threads

struct Sums {
  std::vector<double> of_a, of_products;  // per channel
};

Sums sums_of(const Tensor& a, const Tensor* b, const double* centre) {
  const int64_t channels = a.size(1), pixels = a.size(0) * a.size(2) * a.size(3);
  const int64_t tasks = (pixels + kPixels - 1) / kPixels;
  Sums sums{std::vector<double>(size_t(tasks * channels)),
            std::vector<double>(size_t(tasks * channels))};
  const bool wide = a.scalar_type() == ScalarType::Double;
  const int64_t bytes = channels * int64_t(a.element_size());
  const auto row = [&](const Tensor& t, int64_t pixel) {
    return static_cast<const char*>(t.data_ptr()) + pixel * bytes;
  };
  run_tasks(tasks, 0, [&](int64_t task, void*) {
    const int64_t first = task * kPixels;
    kernels().channel_sums(row(a, first), b == nullptr ? nullptr : row(*b, first), centre,
                           std::min(kPixels, pixels - first), channels,
                           &sums.of_a[size_t(task * channels)],
                           &sums.of_products[size_t(task * channels)], wide);
  });
  for (std::vector<double>* parts : {&sums.of_a, &sums.of_products}) {
    for (int64_t task = 1; task < tasks; ++task) {
      for (int64_t c = 0; c < channels; ++c)
        (*parts)[size_t(c)] += (*parts)[size_t(task * channels + c)];
    }
    parts->resize(size_t(channels));
  }
  return sums;
}

Tensor vector_of(const Tensor& like, const std::vector<double>& values) {
  const Tensor result = empty_of(like, {int64_t(values.size())});
  if (like.scalar_type() == ScalarType::Double) {
    std::ranges::copy(values, static_cast<double*>(result.mutable_data_ptr()));
  } else {
    std::ranges::transform(values, static_cast<float*>(result.mutable_data_ptr()),
                           [](double value) { return float(value); });
  }
  return result;
}

std::vector<double> values_of(const Tensor& vector) {
  std::vector<double> values;
  for (int64_t i = 0; i < vector.size(0); ++i) {
    const int64_t at = i * vector.stride(0);
    const void* data = vector.data_ptr();
    const bool wide = vector.scalar_type() == ScalarType::Double;
    values.push_back(wide ? static_cast<const double*>(data)[at]
                          : double(static_cast<const float*>(data)[at]));
  }
  return values;
}

std::tuple<Tensor, Tensor> statistics(const Tensor& y) {
  check_rows("channel_statistics", "y", y);
  std::vector<double> means = sums_of(y, nullptr, nullptr).of_a;
  const double pixels = double(y.size(0) * y.size(2) * y.size(3));
  for (double& mean : means) mean /= pixels;
  const std::vector<double> squares = sums_of(y, nullptr, means.data()).of_products;
  return {vector_of(y, means), vector_of(y, squares)};
}

std::tuple<Tensor, Tensor> sums(const Tensor& grad, const Tensor& y, const Tensor& mean) {
  check_rows("channel_sums", "y", y);
  check_rows("channel_sums", "grad", grad);
  check_like("channel_sums", "grad", grad, y);
  require(shape_of(grad) == shape_of(y), "channel_sums: grad must have y's shape ", shape_of(y),
          ", got ", shape_of(grad));
  check_vector("channel_sums", "mean", mean, y, y.size(1));
  const std::vector<double> centre = values_of(mean);
  const Sums found = sums_of(grad, &y, centre.data());
  return {vector_of(y, found.of_a), vector_of(y, found.of_products)};
}

Tensor gradient(const Tensor& grad, const Tensor& y, const Tensor& mean, const Tensor& invstd,
                const Tensor& scale, const Tensor& total, const Tensor& product) {
  constexpr const char* kOp = "channel_gradient";
  check_rows(kOp, "y", y);
  check_rows(kOp, "grad", grad);
  check_like(kOp, "grad", grad, y);
  require(shape_of(grad) == shape_of(y), kOp, ": grad must have y's shape ", shape_of(y), ", got ",
          shape_of(grad));
  const int64_t channels = y.size(1), pixels = y.size(0) * y.size(2) * y.size(3);
  const std::pair<const char*, const Tensor*> vectors[] = {{"mean", &mean},
                                                           {"invstd", &invstd},
                                                           {"scale", &scale},
                                                           {"total", &total},
                                                           {"product", &product}};
  std::vector<double> values[5];
  for (int i = 0; i < 5; ++i) {
    check_vector(kOp, vectors[i].first, *vectors[i].second, y, channels);
    values[i] = values_of(*vectors[i].second);
  }
  std::vector<double> slopes, offsets;
  for (size_t c = 0; c < size_t(channels); ++c) {
    slopes.push_back(values[4][c] / double(pixels) * values[1][c] * values[1][c]);
    offsets.push_back(values[3][c] / double(pixels));
  }
  const Tensor given[] = {vector_of(y, values[0]), vector_of(y, slopes), vector_of(y, offsets),
                          vector_of(y, values[2])};
  const void* const data[] = {given[0].data_ptr(), given[1].data_ptr(), given[2].data_ptr(),
                              given[3].data_ptr()};
  const PyramidShape shape{y.size(0), channels, y.size(2), y.size(3)};
  const Tensor result = empty_image(y, shape.batch, channels, shape, true);
  const int64_t bytes = channels * int64_t(y.element_size());
  run_tasks((pixels + kPixels - 1) / kPixels, 0, [&](int64_t task, void*) {
    const int64_t at = task * kPixels * bytes;
    kernels().channel_affine(
        static_cast<const char*>(grad.data_ptr()) + at, static_cast<const char*>(y.data_ptr()) + at,
        data, std::min(kPixels, pixels - task * kPixels), channels,
        static_cast<char*>(result.mutable_data_ptr()) + at, y.scalar_type() == ScalarType::Double);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aspp_ext, CPU, m) {
  m.impl("channel_statistics", ASPP_BOX(&statistics));
  m.impl("channel_sums", ASPP_BOX(&sums));
  m.impl("channel_gradient", ASPP_BOX(&gradient));
}

}  // namespace aspp
