// SPDX-License-Identifier: BSD-3-Clause
// The fused separable kernel under emulation against the definition, on random small problems of
// integers: every bit must agree. Prints the first difference and fails, or prints how many
// problems passed.
//
//   separable_check [seed] [problems] [math: 0 .. 3, -1 any]
#include <cstring>
#include <memory>
#include <string>

#include "cuda/emulation/emulation.h"
#include "cuda/separable.h"
#include "matrices.h"

namespace {

using namespace aspp;
using namespace aspp::checks;
using plan::Pass;

constexpr int64_t kSharedBytes = 227 * 1024;
int computed = 0;  // problems

// Scale and shift [2, pitch] in float32, zeros in the padding.
struct Affine {
  Affine(int channels, int padded) : padded(padded), memory(2 * size_t(padded) * sizeof(float)) {
    for (int i = 0; i < 2 * padded; ++i)
      put(Math::float32, memory.data, i, i % padded < channels ? draw(-2, 2) : 0);
  }
  float* values() const { return static_cast<float*>(memory.data); }
  double scale(int channel) const { return values()[channel]; }
  double shift(int channel) const { return values()[padded + channel]; }
  int padded;
  Memory memory;
};

struct Branch {
  plan::Branch plan;
  std::unique_ptr<Matrix> filter;  // [taps, C]; null: a plain 1x1
  std::unique_ptr<Affine> affine;  // null: nothing between
  std::unique_ptr<Matrix> weight;  // [O, C]
};

struct Case {
  Math math;
  int batch, height, width, channels;
  std::vector<Branch> branches;
  bool between_relu;
  std::string text;
};

// Maps of short rows, whose halo is one run, and of rows longer than a tile and its halo.
Case draw_case(Math math) {
  Case c{math, draw(1, 3), draw(1, 12), draw(1, 12), draw(1, 40), {}, draw(0, 1) == 1, ""};
  if (draw(0, 2) == 0) c.channels = draw(60, 200);
  if (draw(0, 3) == 0) c.batch = 1, c.height = draw(1, 3), c.width = draw(120, 200);
  const int branches = draw(1, 4);
  for (int b = 0; b < branches; ++b) {
    const int kernel[] = {1, 3, 3, 5};
    const int most = draw(0, 4) == 0 ? 150 : 20;
    plan::Branch branch{
        {kernel[draw(0, 3)], kernel[draw(0, 3)]}, {draw(1, 10), draw(1, 10)}, draw(1, most)};
    const bool plain = draw(0, 4) == 0;
    if (plain) branch.kernel = {1, 1};
    const int taps = int(branch.kernel.h * branch.kernel.w);
    c.branches.push_back({branch, nullptr, nullptr, nullptr});
    Branch& made = c.branches.back();
    if (!plain) made.filter = std::make_unique<Matrix>(math, taps, c.channels, 0);
    if (!plain && draw(0, 1))
      made.affine = std::make_unique<Affine>(c.channels, made.filter->padded);
    made.weight = std::make_unique<Matrix>(math, branch.out_channels, c.channels, 0);
  }
  return c;
}

plan::Problem problem_of(const Case& c) {
  std::vector<plan::Branch> branches;
  for (const Branch& b : c.branches) branches.push_back(b.plan);
  return plan::Problem(c.batch, c.height, c.width, branches, c.channels);
}

// What the 1x1 of a branch reads at (n, y, x).
double operand(const Case& c, const Branch& b, const Matrix& image, int n, int y, int x,
               int channel) {
  const auto at = [&](int64_t row, int64_t column) {
    return image.at((int64_t(n) * c.height + row) * c.width + column, channel);
  };
  if (!b.filter) return at(y, x);
  const auto& [kernel, rate, out_channels] = b.plan;
  double sum = 0;
  for (int64_t i = 0; i < kernel.h; ++i)
    for (int64_t j = 0; j < kernel.w; ++j) {
      const int64_t row = y + (i - kernel.h / 2) * rate.h, column = x + (j - kernel.w / 2) * rate.w;
      if (row >= 0 && row < c.height && column >= 0 && column < c.width)
        sum += at(row, column) * b.filter->at(i * kernel.w + j, channel);
    }
  if (b.affine) {
    sum = sum * b.affine->scale(channel) + b.affine->shift(channel);
    if (c.between_relu && sum < 0) sum = 0;
  }
  return rounded(c.math, sum);
}

bool run(Case& c) {
  const int64_t pixels = int64_t(c.batch) * c.height * c.width;
  const Matrix x(c.math, pixels, c.channels, draw(0, 1));
  int outs = 0, widest = 0;
  for (const Branch& b : c.branches) {
    outs += int(b.plan.out_channels);
    widest = std::max(widest, int(b.plan.out_channels));
  }
  // Few processors make every list of units long, of many each has a share of a sum.
  const int64_t shared = draw(0, 1) ? kSharedBytes : 99 * 1024;
  const int index = cuda::pick_shape(c.math, widest, shared);
  const cuda::TileShape shape = cuda::tile_shape(c.math, index);
  plan::Options options;
  options.order = plan::Order::phases;
  options.tile = shape.tile();
  options.processors = draw(0, 1) ? draw(1, 5) : draw(6, 40);
  options.shortest_slice = draw(1, 3);
  options.cut_overhead = draw(0, 1) ? -1000 : 0;  // less than nothing: cuts wherever possible
  const plan::WorkList list =
      plan::make_work_list(problem_of(c), Pass::separable, options, options.processors);
  c.text =
      plan::sentence(problem_of(c), " math ", int(c.math), " shape ", index, " processors ",
                     options.processors, " units ", list.units.size(), " partials ", list.partials);

  std::unique_ptr<Matrix> scale, shift;
  const bool relu = draw(0, 1), per_sample = draw(0, 1);
  if (draw(0, 1)) scale = std::make_unique<Matrix>(c.math, 1, outs, 0);
  if (draw(0, 1)) shift = std::make_unique<Matrix>(c.math, per_sample ? c.batch : 1, outs, 0);
  Matrix out(c.math, pixels, outs, 0);
  const int out_pitch = draw(0, 1) ? out.pitch : outs;  // not always aligned
  for (int64_t i = 0; i < pixels * out.pitch; ++i) put(c.math, out.memory.data, i, NAN);

  Memory partials(size_t(list.partials) * size_t(shape.m * shape.n) * sizeof(float));
  std::vector<uint32_t> counters(size_t(list.counters), 0);
  auto params = std::make_unique<cuda::SeparableParams>();
  cuda::SeparableParams& p = *params;
  p.units = list.units.data();
  p.worker_begin = list.worker_begin.data();
  p.regions = list.regions.data();
  p.runs = list.runs.data();
  p.workers = list.workers();
  p.batch = c.batch, p.height = c.height, p.width = c.width;
  p.in_channels = c.channels;
  p.weight_channels = x.padded;
  p.a = x.memory.data, p.a_pitch = x.pitch;
  p.out = out.memory.data, p.out_pitch = out_pitch;
  p.scale = scale ? scale->memory.data : nullptr;
  p.shift = shift ? shift->memory.data : nullptr;
  p.shift_pitch = shift && per_sample ? shift->pitch : 0;
  p.relu = relu;
  p.partials = partials.data;
  p.counters = counters.data();
  p.between_relu = c.between_relu;
  int first = 0;
  for (size_t b = 0; b < c.branches.size(); ++b) {
    const Branch& branch = c.branches[b];
    p.branches[b].weight = branch.weight->memory.data;
    p.branches[b].out_channels = int32_t(branch.plan.out_channels);
    p.branches[b].out_channel = first;
    p.branches[b].filter = branch.filter ? branch.filter->memory.data : nullptr;
    p.branches[b].affine = branch.affine ? branch.affine->memory.data : nullptr;
    first += int(branch.plan.out_channels);
  }
  for (const plan::WorkRegion& region : list.regions) {
    const plan::WorkRun& run = list.runs[size_t(region.run_begin)];
    const cuda::Halo halo(shape.m, c.width, run.count / run.columns, run.columns, run.dx_step);
    p.halo_pixels = std::max(p.halo_pixels, halo.pixels);
    p.most_taps = std::max(p.most_taps, run.count);
  }
  // Such a halo is for the path through memory.
  if (cuda::FusedLayout(shape, c.math, p.halo_pixels, p.most_taps).total > kSharedBytes)
    return true;
  ++computed;
  if (launch_separable_sm80(c.math, index, p, nullptr) != cudaSuccess) {
    std::printf("%s\n  launch failed\n", c.text.c_str());
    return false;
  }

  first = 0;
  std::vector<double> row(size_t(c.channels));
  for (const Branch& branch : c.branches) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const auto of_image = int(pixel % (c.height * c.width));
      const auto sample = int(pixel / (c.height * c.width));
      for (int i = 0; i < c.channels; ++i)
        row[size_t(i)] = operand(c, branch, x, sample, of_image / c.width, of_image % c.width, i);
      for (int o = 0; o < branch.plan.out_channels; ++o) {
        double value = 0;
        for (int i = 0; i < c.channels; ++i) value += row[size_t(i)] * branch.weight->at(o, i);
        if (scale) value *= scale->at(0, first + o);
        if (shift) value += shift->at(per_sample ? sample : 0, first + o);
        if (relu && value < 0) value = 0;
        const double got = get(c.math, out.memory.data, pixel * out_pitch + first + o);
        if (got == rounded(c.math, value)) continue;
        std::printf("%s\n  got %g, expected %g at pixel %ld channel %d\n", c.text.c_str(), got,
                    rounded(c.math, value), long(pixel), first + o);
        return false;
      }
    }
    first += int(branch.plan.out_channels);
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int otherwise) {
    return i < argc ? std::atoi(argv[i]) : otherwise;
  };
  const int seed = argument(1, 0), problems = argument(2, 20), math = argument(3, -1);
  cuda::emulation::set_devices({cuda::emulation::device_of(90)});
  for (int i = 0; computed < problems; ++i) {
    generator.seed(unsigned(seed + i));
    Case c = draw_case(Math(math < 0 ? draw(0, 3) : math));
    if (!run(c)) {
      std::printf("  seed %d\n", seed + i);
      return 1;
    }
  }
  std::printf("%d problems are exact\n", computed);
  return 0;
}
