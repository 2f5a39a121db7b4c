// SPDX-License-Identifier: BSD-3-Clause
#include "loose.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "parallel.h"

namespace aspp {

namespace {

// Noise by minimal filtering, as a multiple of that directly. On pixels of one energy it is at most
// 2.1 (tests/test_loose.py), so that these have no loose outputs.
constexpr double kMostNoise = 2.5;

// A sum whose large terms are fewer is rounded so seldom that the way through products shows,
// whatever its noise. Of small maps it is a part of the pixels.
constexpr double kFewTerms = 24;

// Between the largest pixel and an eighth of those that are not zero. ReLU leaves channels of a
// gradient zero in places: one that is zero where pixels are huge sums up small ones alone.
constexpr double kMostRange = 0x1p20;

// Of energies. Sums of what is below fit into the compute type: a product of two norms bounds a sum
// over channels, and the coefficients and the number of products are what is left between this and
// the largest float; of doubles energies leave no more.
double largest_energy(bool double_precision) { return double_precision ? 0x1p1000 : 0x1p220; }

std::vector<double> bounded(const double* energies, int64_t count, bool double_precision) {
  const double largest = largest_energy(double_precision);
  std::vector<double> result(energies, energies + count);
  for (double& energy : result) {
    if (!(energy <= largest)) energy = std::numeric_limits<double>::infinity();
  }
  return result;
}

plan::NoiseForm noise_form(const MinimalForm& form) {
  return {form.rows, form.columns, form.row_axis, form.column_axis};
}

bool is_wide(std::vector<double> energies) {
  std::erase(energies, 0.);
  if (energies.empty()) return false;
  const auto small = energies.begin() + int64_t(energies.size() / 8);
  std::ranges::nth_element(energies, small);
  return !(*std::ranges::max_element(energies) <= kMostRange * *small);
}

using Taps = uint32_t;  // bits

// To channels [first, last) the taps of the pixels in which they are not zero, until all of them
// have all: pixels of all parts of the map come first, so that this is soon.
template <typename T>
void add_taps(const Image& image, int64_t n, int64_t width, const std::vector<Taps>& taps,
              int64_t first, int64_t last, Taps all, Taps* found) {
  const auto size = int64_t(taps.size());
  int64_t step = size * 5 / 8;
  while (std::gcd(step, size) != 1) ++step;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t p = i * step % size;
    const T* pixel = static_cast<const T*>(image.data) + n * image.n_stride +
                     p / width * image.y_stride + p % width * image.x_stride;
    const Taps here = taps[size_t(p)];
    Taps common = all;
    if (image.c_stride == 1) {
      for (int64_t c = first; c < last; ++c) common &= found[c] |= pixel[c] != 0 ? here : 0;
    } else {
      for (int64_t c = first; c < last; ++c)
        common &= found[c] |= pixel[c * image.c_stride] != 0 ? here : 0;
    }
    if (common == all) return;
  }
}

bool is_loose(double minimal, double direct, bool double_precision) {
  const bool good = minimal <= kMostNoise * kMostNoise * direct;  // NaN is not
  return !good || minimal > largest_energy(double_precision);
}

}  // namespace

std::vector<double> pixel_energies(const Image& x, const PyramidShape& shape,
                                   bool double_precision) {
  constexpr int64_t kPixels = 512;
  const int64_t rows = std::max<int64_t>(kPixels / shape.width, 1);
  const int64_t parts = (shape.height + rows - 1) / rows;
  std::vector<double> energies(size_t(shape.batch * shape.height * shape.width));
  run_tasks(shape.batch * parts, 0, [&](int64_t task, void*) {
    const int64_t n = task / parts, first = task % parts * rows;
    kernels().pixel_energies(
        x, n, shape.channels, shape.width, first, std::min(first + rows, shape.height),
        energies.data() + (n * shape.height + first) * shape.width, double_precision);
  });
  return energies;
}

plan::TapEnergies tap_energies(const Tensor& weight, bool flipped) {
  // Output or input channels as the images of a batch, whichever have a step between them.
  const bool by_input = weight.stride(0) == 1;
  Image taps = image_of(weight);
  if (by_input) std::swap(taps.n_stride, taps.c_stride);
  PyramidShape shape;
  shape.batch = weight.size(by_input ? 1 : 0);
  shape.channels = weight.size(by_input ? 0 : 1);
  shape.height = weight.size(2);
  shape.width = weight.size(3);
  const bool wide = weight.scalar_type() == ScalarType::Double;
  const std::vector<double> parts = pixel_energies(taps, shape, wide);
  const int64_t count = shape.height * shape.width;
  plan::TapEnergies energies{};
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = shape.height == 3 ? t / shape.width : 1;
    const int64_t j = shape.width == 3 ? t % shape.width : 1;
    double& energy = energies[size_t(flipped ? 8 - (3 * i + j) : 3 * i + j)];
    for (int64_t n = 0; n < shape.batch; ++n) energy += parts[size_t(n * count + t)];
  }
  return energies;
}

std::vector<LooseOutputs> loose_outputs(const MinimalForms& forms,
                                        const std::vector<plan::TapEnergies>& taps,
                                        const std::vector<double>& pixels, int64_t batch,
                                        bool double_precision) {
  const int64_t size = int64_t(pixels.size()) / batch, branches = int64_t(forms.size());
  std::vector<LooseOutputs> loose(forms.size());
  for (size_t b = 0; b < forms.size(); ++b) {
    if (forms[b]) loose[b] = {std::vector<char>(pixels.size()), std::vector<char>(size_t(batch))};
  }
  run_tasks(batch * branches, 0, [&](int64_t task, void*) {
    const auto b = size_t(task % branches), n = size_t(task / branches);
    if (!forms[b]) return;
    plan::TapEnergies all_taps;
    std::ranges::copy(bounded(taps[b].data(), 9, double_precision), all_taps.begin());
    const size_t first = n * size_t(size);
    const plan::Noise noise = plan::output_noise(
        noise_form(*forms[b]), bounded(&pixels[first], size, double_precision), all_taps);
    char* marked = &loose[b].marked[first];
    int64_t count = 0;
    for (int64_t p = 0; p < size; ++p) {
      marked[p] = is_loose(noise.minimal[size_t(p)], noise.direct[size_t(p)], double_precision);
      count += marked[p];
    }
    if (double(count) < forms[b]->most_loose * double(size)) return;
    loose[b].images[n] = true;
    std::fill_n(marked, size, char(true));
  });
  for (LooseOutputs& branch : loose) {
    if (std::ranges::find(branch.marked, char(true)) == branch.marked.end()) branch.marked.clear();
  }
  return loose;
}

bool is_loose(const MinimalForm& form, const std::vector<double>& pixels,
              const std::vector<double>& grads, int64_t batch, bool double_precision) {
  if (is_wide(pixels)) return true;
  const int64_t size = int64_t(pixels.size()) / batch;
  plan::TapNoise sum;
  for (int64_t n = 0; n < batch; ++n) {
    const auto of_image = [&](const std::vector<double>& energies) {
      return bounded(&energies[size_t(n * size)], size, double_precision);
    };
    const plan::TapNoise noise =
        plan::tap_noise(noise_form(form), of_image(pixels), of_image(grads));
    for (size_t t = 0; t < 9; ++t) {
      sum.minimal[t] += noise.minimal[t];
      sum.direct[t] += noise.direct[t];
      sum.fourth[t] += noise.fourth[t];
    }
  }
  for (size_t t = 0; t < 9; ++t) {
    if (sum.minimal[t] == 0) continue;
    if (is_loose(sum.minimal[t], sum.direct[t], double_precision)) return true;
    const double terms = sum.direct[t] * sum.direct[t] / sum.fourth[t];
    if (!(terms >= std::min(kFewTerms, double(size * batch) / 8))) return true;
  }
  return false;
}

void clear_zeros(const MinimalForm& form, const Image& x, const std::vector<double>& pixels,
                 const Image& grad, const std::vector<double>& grads, int64_t batch,
                 const Tensor& grad_weight, bool double_precision) {
  constexpr int64_t kBlock = 64;  // channels of a task
  const int64_t out_channels = grad_weight.size(0), channels = grad_weight.size(1);
  const size_t size = pixels.size() / size_t(batch);
  Taps live = 0;
  std::vector<Taps> of_grad(out_channels, 0), of_x(channels, 0);
  for (int64_t n = 0; n < batch; ++n) {
    // Of each pixel those that join it to one that is not zero.
    std::vector<Taps> from_grad(size, 0), from_x(size, 0);
    const double *inputs = &pixels[size_t(n) * size], *outputs = &grads[size_t(n) * size];
    plan::for_each_live_pair(noise_form(form), [&](int64_t tap, int64_t output, int64_t input) {
      const Taps bit = Taps(1) << tap;
      live |= bit;
      if (inputs[input] != 0) from_grad[size_t(output)] |= bit;
      if (outputs[output] != 0) from_x[size_t(input)] |= bit;
    });
    const int64_t blocks = (out_channels + kBlock - 1) / kBlock;
    run_tasks(blocks + (channels + kBlock - 1) / kBlock, 0, [&](int64_t task, void*) {
      const bool is_grad = task < blocks;
      const int64_t first = (is_grad ? task : task - blocks) * kBlock;
      const int64_t last = std::min(first + kBlock, is_grad ? out_channels : channels);
      const auto add = double_precision ? add_taps<double> : add_taps<float>;
      add(is_grad ? grad : x, n, form.column_axis.size, is_grad ? from_grad : from_x, first, last,
          live, is_grad ? of_grad.data() : of_x.data());
    });
  }
  const int64_t kernel_h = grad_weight.size(2), kernel_w = grad_weight.size(3);
  const auto clear = [&](auto* data) {
    for (int64_t o = 0; o < out_channels; ++o) {
      for (int64_t c = 0; c < channels; ++c) {
        const Taps zeros = live & ~(of_grad[size_t(o)] & of_x[size_t(c)]);
        for (int64_t t = 0; zeros != 0 && t < kernel_h * kernel_w; ++t) {
          const int64_t i = t / kernel_w, j = t % kernel_w;
          if ((zeros >> plan::place_of(form.row_axis, i, form.column_axis, j) & 1) == 0) continue;
          data[o * grad_weight.stride(0) + c * grad_weight.stride(1) + i * grad_weight.stride(2) +
               j * grad_weight.stride(3)] = 0;
        }
      }
    }
  };
  if (double_precision) {
    clear(static_cast<double*>(grad_weight.mutable_data_ptr()));
  } else {
    clear(static_cast<float*>(grad_weight.mutable_data_ptr()));
  }
}

}  // namespace aspp
