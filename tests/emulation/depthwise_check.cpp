// SPDX-License-Identifier: BSD-3-Clause
// The depthwise kernels under emulation against the definition, on random small problems of
// integers: every bit must agree. Prints the first difference and fails, or prints how many
// problems passed.
//
//   depthwise_check [seed] [problems] [kernel: 0 .. 3, -1 any] [math: 0 .. 4, -1 any]
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/depthwise.h"
#include "cuda/launch.h"
#include "matrices.h"

namespace {

using namespace aspp;
using namespace aspp::checks;
using cuda::DepthwiseBranch;

enum Kernel { forward, between_grad, grad_weight, grad_input };

struct Branch {
  DepthwiseBranch taps{};
  std::unique_ptr<Matrix> filter;  // [taps, C]
  std::unique_ptr<Matrix> affine;  // [2, C] in the tensors' dtype or of type Sum
  std::unique_ptr<Memory> packed;  // [2, padded C] of type Sum
};

struct Case {
  Kernel kernel;
  Math math;
  cuda::DepthwiseShape shape{};
  int64_t pixels = 0;
  std::vector<Branch> branches;
  bool relu = false;
  std::string text;

  Math sum() const { return math == Math::float64 ? Math::float64 : Math::float32; }
};

bool differs(const Case& c, double got, double expected, const char* what, int64_t row,
             int64_t column) {
  if (got == expected || (std::isnan(got) && std::isnan(expected))) return false;
  std::printf("%s\n  got %g, expected %g in %s at [%ld, %ld]\n", c.text.c_str(), got, expected,
              what, long(row), long(column));
  return true;
}

// A kernel and its weights. Those of taps that are outside the map everywhere are NaN.
Branch draw_branch(Case& c, bool plain) {
  const int sizes[] = {1, 3, 3, 5, 7};
  Branch b;
  const auto rate = [] { return draw(0, 9) == 0 ? INT32_MAX - draw(0, 1) : draw(1, 9); };
  b.taps = {nullptr, nullptr, sizes[draw(0, 4)], sizes[draw(0, 4)], rate(), rate(), 0};
  DepthwiseBranch& taps = b.taps;
  if (plain) {
    taps.kernel_h = taps.kernel_w = 1;
    return b;
  }
  taps.taps = taps.kernel_h * taps.kernel_w;
  b.filter = std::make_unique<Matrix>(c.math, taps.taps, c.shape.channels, 0);
  taps.filter = b.filter->memory.data;
  for (int64_t i = 0; i < taps.kernel_h; ++i)
    for (int64_t j = 0; j < taps.kernel_w; ++j)
      if (std::abs(i - taps.kernel_h / 2) * taps.rate_h >= c.shape.height ||
          std::abs(j - taps.kernel_w / 2) * taps.rate_w >= c.shape.width)
        for (int channel = 0; channel < c.shape.channels; ++channel)
          put(c.math, b.filter->memory.data, (i * taps.kernel_w + j) * b.filter->pitch + channel,
              NAN);
  return b;
}

// Two values per channel, as they are given and as the kernel for that packs them.
struct Pair {
  std::unique_ptr<Matrix> given;   // [2, C] in the tensors' dtype or of type Sum
  std::unique_ptr<Memory> packed;  // [2, padded C] of type Sum
};

bool draw_pair(const Case& c, Pair& pair) {
  const bool of_sums = draw(0, 1);
  pair.given = std::make_unique<Matrix>(of_sums ? c.sum() : c.math, 2, c.shape.channels, 0);
  pair.packed = std::make_unique<Memory>(size_t(2 * c.shape.pitch * cuda::bytes_of(c.sum())));
  const Matrix& given = *pair.given;
  const char* const values = static_cast<const char*>(given.memory.data);
  cuda::PackAffineParams p{};
  p.channels = c.shape.channels, p.pitch = c.shape.pitch, p.branches = 1, p.of_sums = of_sums;
  p.branch[0] = {values, values + given.pitch * cuda::bytes_of(given.math), pair.packed->data};
  if (launch_pack_affine_sm80(c.math, p, nullptr) != cudaSuccess) return false;
  for (int row = 0; row < 2; ++row)
    for (int channel = 0; channel < c.shape.pitch; ++channel)
      if (differs(c, get(c.sum(), pair.packed->data, row * c.shape.pitch + channel),
                  channel < c.shape.channels ? given.at(row, channel) : 0, "a packed pair", row,
                  channel))
        return false;
  return true;
}

// The filters, from weights [C, taps], by the kernel that packs them.
bool right_filters(const Case& c) {
  std::vector<std::unique_ptr<Memory>> weights, packed;
  auto params = std::make_unique<cuda::PackFiltersParams>();
  cuda::PackFiltersParams& p = *params;
  p.channels = c.shape.channels, p.pitch = c.shape.pitch;
  for (const Branch& b : c.branches) {
    if (!b.filter) continue;
    const int taps = b.taps.taps;
    weights.push_back(
        std::make_unique<Memory>(size_t(c.shape.channels * taps * cuda::bytes_of(c.math))));
    packed.push_back(std::make_unique<Memory>(b.filter->memory.bytes));
    for (int channel = 0; channel < c.shape.channels; ++channel)
      for (int tap = 0; tap < taps; ++tap)
        put(c.math, weights.back()->data, channel * taps + tap, b.filter->at(tap, channel));
    p.most_taps = std::max(p.most_taps, taps);
    p.branch[p.branches++] = {weights.back()->data, packed.back()->data, taps};
  }
  if (launch_pack_filters_sm80(c.math, p, nullptr) != cudaSuccess) return false;
  int made = 0;
  for (const Branch& b : c.branches) {
    if (!b.filter) continue;
    const void* const got = packed[size_t(made++)]->data;
    for (int tap = 0; tap < b.taps.taps; ++tap)
      for (int channel = 0; channel < c.shape.pitch; ++channel)
        if (differs(c, get(c.math, got, tap * c.shape.pitch + channel), b.filter->at(tap, channel),
                    "a packed filter", tap, channel))
          return false;
  }
  return true;
}

// What is between.
bool draw_affine(const Case& c, Branch& b) {
  Pair pair;
  if (!draw_pair(c, pair)) return false;
  b.affine = std::move(pair.given);
  b.packed = std::move(pair.packed);
  b.taps.affine = b.packed->data;
  return true;
}

Case draw_case(Kernel kernel, Math math) {
  Case c;
  c.kernel = kernel, c.math = math;
  c.shape = {draw(1, 3), draw(1, 16), draw(1, 16), draw(1, 40), 0};
  if (draw(0, 3) == 0) c.shape.channels = draw(60, 140);
  c.shape.pitch = round_up(c.shape.channels, cuda::chunk_of(math));
  c.pixels = int64_t(c.shape.batch) * c.shape.height * c.shape.width;
  c.relu = draw(0, 1);
  const int branches = kernel == forward || kernel == grad_input ? draw(1, 4) : 1;
  for (int b = 0; b < branches; ++b)
    c.branches.push_back(draw_branch(c, kernel == grad_input && draw(0, 2) == 0));
  c.text = "kernel " + std::to_string(kernel) + " math " + std::to_string(int(math));
  for (const int size : {c.shape.batch, c.shape.height, c.shape.width, c.shape.channels})
    c.text += " " + std::to_string(size);
  for (const Branch& b : c.branches)
    for (const int size : {b.taps.kernel_h, b.taps.kernel_w, b.taps.rate_h, b.taps.rate_w})
      c.text += (size == b.taps.kernel_h ? ", " : " ") + std::to_string(size);
  return c;
}

// visit(pixel, the pixel that the tap reads, tap)
template <class Visit>
void for_each_tap(const Case& c, const DepthwiseBranch& b, Visit&& visit) {
  const auto [batch, height, width, channels, pitch] = c.shape;
  for (int64_t p = 0; p < c.pixels; ++p)
    for (int64_t i = 0; i < b.kernel_h; ++i)
      for (int64_t j = 0; j < b.kernel_w; ++j) {
        const int64_t dy = (i - b.kernel_h / 2) * b.rate_h, dx = (j - b.kernel_w / 2) * b.rate_w;
        const int64_t y = p / width % height + dy, x = p % width + dx;
        if (y >= 0 && y < height && x >= 0 && x < width)
          visit(p, p + dy * width + dx, i * b.kernel_w + j);
      }
}

using Values = std::vector<double>;  // [pixels, C]

Values taps_of(const Case& c, const Branch& b, const Matrix& x) {
  const int channels = c.shape.channels;
  Values e(size_t(c.pixels * channels), 0.0);
  for_each_tap(c, b.taps, [&](int64_t p, int64_t read, int64_t tap) {
    for (int i = 0; i < channels; ++i)
      e[size_t(p * channels + i)] += b.filter->at(tap, i) * x.at(read, i);
  });
  return e;
}

double between(const Case& c, const Branch& b, double e, int channel) {
  if (b.taps.affine == nullptr) return e;
  const double z = e * b.affine->at(0, channel) + b.affine->at(1, channel);
  return c.relu && z < 0 ? 0 : z;
}

void fill(Matrix& m, int first_column, double value) {
  for (int64_t row = 0; row < m.rows; ++row)
    for (int column = first_column; column < m.pitch; ++column)
      put(m.math, m.memory.data, row * m.pitch + column, value);
}

// What the 1x1 of the branch reads; behind its padding nothing may have been written.
bool right_operand(const Case& c, const Branch& b, const Values& e, const Matrix& out) {
  for (int64_t p = 0; p < c.pixels; ++p)
    for (int i = 0; i < out.pitch; ++i) {
      double expected = i < out.padded ? 0 : NAN;
      if (i < c.shape.channels)
        expected = rounded(c.math, between(c, b, e[size_t(p * c.shape.channels + i)], i));
      if (differs(c, out.at(p, i), expected, "what the 1x1 reads", p, i)) return false;
    }
  return true;
}

// Against two passes in double over the rounded e.
bool right_statistics(const Case& c, const Values& e, const Memory& mean, const Memory& squares,
                      int64_t first) {
  const auto channels = size_t(c.shape.channels);
  for (size_t i = 0; i < channels; ++i) {
    double sum = 0, of_squares = 0;
    const auto value = [&](int64_t p) { return rounded(c.math, e[size_t(p) * channels + i]); };
    for (int64_t p = 0; p < c.pixels; ++p) sum += value(p);
    const double m = sum / double(c.pixels);
    for (int64_t p = 0; p < c.pixels; ++p) of_squares += (value(p) - m) * (value(p) - m);
    const double size = std::abs(m) + std::sqrt(of_squares / double(c.pixels));
    const double close = c.math == Math::float64 ? 1e-12 : 1e-5;
    const double got = get(c.sum(), mean.data, first + int64_t(i));
    const double got_squares = get(c.sum(), squares.data, first + int64_t(i));
    if (std::abs(got - m) <= close * size &&
        std::abs(got_squares - of_squares) <= close * of_squares)
      continue;
    std::printf("%s\n  channel %zu: got mean %g and squares %g, expected %g and %g\n",
                c.text.c_str(), i, got, got_squares, m, of_squares);
    return false;
  }
  return true;
}

bool run_forward(Case& c) {
  const Matrix x(c.math, c.pixels, c.shape.channels, draw(0, 1));
  std::vector<std::unique_ptr<Matrix>> outs;
  auto params = std::make_unique<cuda::DepthwiseParams>();
  cuda::DepthwiseParams& p = *params;
  p.shape = c.shape;
  p.x = x.memory.data, p.x_pitch = x.pitch;
  p.relu = c.relu;
  p.branches = int(c.branches.size());
  const int slack = draw(0, 1);
  for (Branch& b : c.branches) {
    if (draw(0, 1) && !draw_affine(c, b)) return false;
    outs.push_back(std::make_unique<Matrix>(c.math, c.pixels, c.shape.channels, slack));
    fill(*outs.back(), 0, NAN);
    p.out_pitch = outs.back()->pitch;
    const bool stored = draw(0, 3) > 0;
    p.branch[outs.size() - 1] = {b.taps, stored ? outs.back()->memory.data : nullptr};
  }
  const int columns = cuda::depthwise_columns(c.math);
  const int64_t tiles =
      cuda::depthwise_tiles(c.shape) * cuda::depthwise_column_tiles(c.shape, columns);
  const size_t sum = size_t(cuda::bytes_of(c.sum())), all = size_t(tiles) * c.branches.size();
  const Memory means(all * columns * sum), squares(means.bytes);
  const Memory mean(c.branches.size() * c.shape.channels * sum), of_squares(mean.bytes);
  std::vector<int32_t> counts(all, -1);
  for (const Memory* memory : {&means, &squares, &mean, &of_squares})
    std::memset(memory->data, 0xff, memory->bytes);  // NaN
  cuda::CombineParams combine{};
  const bool statistics = draw(0, 1);
  if (statistics) {
    combine.tile_means = p.tile_means = means.data;
    combine.tile_squares = p.tile_squares = squares.data;
    combine.tile_counts = p.tile_counts = counts.data();
    combine.mean = mean.data, combine.squares = of_squares.data;
    combine.rows = 1, combine.tile_n = columns, combine.branches = p.branches;
    for (int b = 0; b < p.branches; ++b)
      combine.branch[b] = {int(b * tiles), int(tiles), b * c.shape.channels, c.shape.channels};
  }
  if (launch_depthwise_sm80(c.math, p, nullptr) != cudaSuccess ||
      (statistics && launch_combine_sm80(c.math, combine, nullptr) != cudaSuccess))
    return false;
  for (size_t b = 0; b < c.branches.size(); ++b) {
    const Values e = taps_of(c, c.branches[b], x);
    if (p.branch[b].out != nullptr && !right_operand(c, c.branches[b], e, *outs[b])) return false;
    if (statistics && !right_statistics(c, e, mean, of_squares, int64_t(b) * c.shape.channels))
      return false;
  }
  return true;
}

// Sums [parts, rows, pitch] to [channels, rows], which are returned as doubles.
bool sum_parts(const Case& c, cuda::SumPartsParams p, Values& result) {
  const int64_t rows = int64_t(p.kernel_h) * p.kernel_w;
  p.channels = c.shape.channels, p.pitch = c.shape.pitch;
  p.out_is_sum = draw(0, 1);
  p.channel_step = rows;
  const Math of = p.out_is_sum ? c.sum() : c.math;
  const Memory out(size_t(rows * p.channels * cuda::bytes_of(of)));
  p.out = out.data;
  if (launch_sum_parts_sm80(c.math, p, nullptr) != cudaSuccess) return false;
  result.clear();
  for (int64_t i = 0; i < rows * p.channels; ++i) result.push_back(get(of, out.data, i));
  return true;
}

// Got in whichever of two formats.
bool differs_rounded(const Case& c, double got, double expected, const char* what, int64_t row,
                     int64_t column) {
  return got != expected && differs(c, got, rounded(c.math, expected), what, row, column);
}

bool run_between_grad(Case& c) {
  Branch& b = c.branches[0];
  if (!draw_affine(c, b)) return false;
  const int channels = c.shape.channels, slack = draw(0, 1);
  const Matrix x(c.math, c.pixels, channels, draw(0, 1));
  Matrix back(c.math, c.pixels, channels, slack), grad(c.math, c.pixels, channels, slack);
  Matrix out(c.math, c.pixels, channels, draw(0, 1));
  fill(back, channels, NAN);
  fill(grad, 0, NAN);
  fill(out, 0, NAN);
  Values g(size_t(c.pixels * channels));
  for (int64_t p = 0; p < c.pixels; ++p)
    for (int i = 0; i < channels; ++i) g[size_t(p * channels + i)] = back.at(p, i);
  Pair correction;
  const bool corrected = draw(0, 2) == 0;
  if (corrected && !draw_pair(c, correction)) return false;
  const bool in_place = draw(0, 1), stored = draw(0, 3) > 0;
  const bool summed = !corrected && draw(0, 3) > 0, written = corrected || draw(0, 3) > 0;
  Matrix& target = in_place ? back : grad;
  const Memory sums(
      size_t(cuda::depthwise_tiles(c.shape) * 2 * c.shape.pitch * cuda::bytes_of(c.sum())));
  std::memset(sums.data, 0xff, sums.bytes);
  cuda::BetweenGradParams p{};
  p.shape = c.shape;
  p.x = x.memory.data, p.x_pitch = x.pitch;
  p.back = back.memory.data, p.back_pitch = back.pitch;
  p.branch = b.taps, p.relu = c.relu;
  p.grad = written ? target.memory.data : nullptr;
  p.out = stored ? out.memory.data : nullptr, p.out_pitch = out.pitch;
  p.sums = summed ? sums.data : nullptr;
  p.correction = corrected ? correction.packed->data : nullptr;
  if (launch_between_grad_sm80(c.math, p, nullptr) != cudaSuccess) return false;

  const Values e = taps_of(c, b, x);
  if (stored && !right_operand(c, b, e, out)) return false;
  Values of[2] = {Values(size_t(channels), 0.0), Values(size_t(channels), 0.0)};
  for (int64_t pixel = 0; pixel < c.pixels; ++pixel)
    for (int i = 0; i < channels; ++i) {
      const auto at = size_t(pixel * channels + i);
      const double z = e[at] * b.affine->at(0, i) + b.affine->at(1, i);
      const double masked = c.relu && z <= 0 ? 0 : g[at];
      of[0][size_t(i)] += masked * e[at];
      of[1][size_t(i)] += masked;
      double of_e = masked * b.affine->at(0, i);
      if (corrected) of_e += correction.given->at(0, i) + correction.given->at(1, i) * e[at];
      if (written &&
          differs(c, target.at(pixel, i), rounded(c.math, of_e), "the gradient of e", pixel, i))
        return false;
    }
  for (int row = 0; summed && row < 2; ++row) {
    cuda::SumPartsParams parts{};
    parts.sums =
        static_cast<const char*>(sums.data) + row * c.shape.pitch * cuda::bytes_of(c.sum());
    parts.parts = cuda::depthwise_tiles(c.shape), parts.part_step = 2 * c.shape.pitch;
    parts.kernel_h = parts.kernel_w = parts.window_h = parts.window_w = 1;
    Values got;
    if (!sum_parts(c, parts, got)) return false;
    for (int i = 0; i < channels; ++i)
      if (differs_rounded(c, got[size_t(i)], of[row][size_t(i)], "scale and shift", row, i))
        return false;
  }
  return true;
}

bool run_grad_weight(Case& c) {
  const Branch& b = c.branches[0];
  const int channels = c.shape.channels;
  const Matrix x(c.math, c.pixels, channels, draw(0, 1));
  Matrix grad(c.math, c.pixels, channels, draw(0, 1));
  fill(grad, channels, NAN);
  cuda::SumPartsParams parts{};
  parts.kernel_h = b.taps.kernel_h, parts.kernel_w = b.taps.kernel_w;
  const auto window = [](int kernel, int rate, int size) {
    return 2 * cuda::depthwise_reach(kernel, rate, size) + 1;
  };
  parts.window_h = window(b.taps.kernel_h, b.taps.rate_h, c.shape.height);
  parts.window_w = window(b.taps.kernel_w, b.taps.rate_w, c.shape.width);
  parts.parts = draw(1, int(cuda::depthwise_tiles(c.shape)));
  parts.part_step = int64_t(parts.window_h) * parts.window_w * c.shape.pitch;
  const Memory sums(size_t(parts.parts * parts.part_step * cuda::bytes_of(c.sum())));
  std::memset(sums.data, 0xff, sums.bytes);
  parts.sums = sums.data;
  cuda::DepthwiseGradWeightParams p{};
  p.shape = c.shape;
  p.x = x.memory.data, p.x_pitch = x.pitch;
  p.grad = grad.memory.data, p.grad_pitch = grad.pitch;
  p.branch = b.taps, p.parts = int(parts.parts), p.sums = sums.data;
  Values got;
  if (launch_depthwise_grad_weight_sm80(c.math, p, nullptr) != cudaSuccess ||
      !sum_parts(c, parts, got))
    return false;
  Values expected(got.size(), 0.0);
  for_each_tap(c, b.taps, [&](int64_t pixel, int64_t read, int64_t tap) {
    for (int i = 0; i < channels; ++i)
      expected[size_t(i * b.taps.taps + tap)] += grad.at(pixel, i) * x.at(read, i);
  });
  for (size_t i = 0; i < got.size(); ++i)
    if (differs_rounded(c, got[i], expected[i], "the gradient of the weight",
                        int64_t(i) / b.taps.taps, int64_t(i) % b.taps.taps))
      return false;
  return true;
}

bool run_grad_input(Case& c) {
  const int channels = c.shape.channels, slack = draw(0, 1);
  std::vector<std::unique_ptr<Matrix>> grads;
  auto params = std::make_unique<cuda::DepthwiseGradInputParams>();
  cuda::DepthwiseGradInputParams& p = *params;
  p.shape = c.shape;
  p.phase = draw(0, 9) == 0 ? INT32_MAX : draw(1, 20);
  p.branches = int(c.branches.size());
  Values expected(size_t(c.pixels * channels), 0.0);
  for (const Branch& b : c.branches) {
    grads.push_back(std::make_unique<Matrix>(c.math, c.pixels, channels, slack));
    const Matrix& grad = *grads.back();
    fill(*grads.back(), channels, NAN);
    p.grad_pitch = grad.pitch;
    p.branch[grads.size() - 1] = {b.taps, grad.memory.data};
    for_each_tap(c, b.taps, [&](int64_t pixel, int64_t read, int64_t tap) {
      for (int i = 0; i < channels; ++i)
        expected[size_t(read * channels + i)] +=
            grad.at(pixel, i) * (b.filter ? b.filter->at(tap, i) : 1);
    });
  }
  Matrix out(c.math, c.pixels, channels, 1);
  fill(out, 0, NAN);
  p.out = out.memory.data;
  p.out_pitch = draw(0, 1) ? out.pitch : channels;  // not always aligned
  if (launch_depthwise_grad_input_sm80(c.math, p, nullptr) != cudaSuccess) return false;
  for (int64_t pixel = 0; pixel < c.pixels; ++pixel)
    for (int i = 0; i < p.out_pitch; ++i)
      if (differs(c, get(c.math, out.memory.data, pixel * p.out_pitch + i),
                  i < channels ? rounded(c.math, expected[size_t(pixel * channels + i)]) : NAN,
                  "the gradient of x", pixel, i))
        return false;
  return true;
}

bool run(Case& c) {
  if (!right_filters(c)) return false;
  switch (c.kernel) {
    case forward: return run_forward(c);
    case between_grad: return run_between_grad(c);
    case grad_weight: return run_grad_weight(c);
    default: return run_grad_input(c);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int otherwise) {
    return i < argc ? std::atoi(argv[i]) : otherwise;
  };
  const int seed = argument(1, 0), problems = argument(2, 20);
  const int kernel = argument(3, -1), math = argument(4, -1);
  for (int i = 0; i < problems; ++i) {
    generator.seed(unsigned(seed + i));
    Case c =
        draw_case(Kernel(kernel < 0 ? draw(0, 3) : kernel), Math(math < 0 ? draw(0, 4) : math));
    if (!run(c)) {
      std::printf("%s\n  failed with seed %d\n", c.text.c_str(), seed + i);
      return 1;
    }
  }
  std::printf("%d problems are exact\n", problems);
  return 0;
}
