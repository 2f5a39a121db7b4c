// SPDX-License-Identifier: BSD-3-Clause
// The pyramid kernels under emulation against the definition, on random small problems of integers:
// every bit must agree. Prints the first difference and fails, or prints how many problems passed.
//
//   pyramid_check [seed] [problems] [pass: 0 1 2, -1 any] [math: 0 .. 4, -1 any]
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "cuda/launch.h"
#include "matrices.h"

namespace {

using namespace aspp;
using namespace aspp::checks;
using plan::Pass;

struct Branch {
  plan::Branch plan;
  int column;                      // of its first channel in the padded image of grad
  std::unique_ptr<Matrix> weight;  // [O * taps, C]
  std::unique_ptr<Matrix> grad_weight;
};

struct Case {
  Pass pass;
  Math math;
  int batch, height, width, channels;
  std::vector<Branch> branches;
  std::string text;
};

Case draw_case(Pass pass, Math math) {
  Case c{pass, math, draw(1, 3), draw(1, 9), draw(1, 9), draw(1, 40), {}, ""};
  if (draw(0, 3) == 0) c.channels = draw(60, 200);
  const int branches = draw(1, 4);
  for (int b = 0; b < branches; ++b) {
    const int kernel[] = {1, 3, 3, 5};
    const int most = draw(0, 4) == 0 ? 150 : 20;
    c.branches.push_back(
        {{{kernel[draw(0, 3)], kernel[draw(0, 3)]}, {draw(1, 10), draw(1, 10)}, draw(1, most)},
         0,
         nullptr,
         nullptr});
  }
  return c;
}

plan::Problem problem_of(const Case& c) {
  std::vector<plan::Branch> branches;
  for (const Branch& b : c.branches) branches.push_back(b.plan);
  return plan::Problem(c.batch, c.height, c.width, branches, c.channels);
}

bool same(double got, double expected) { return got == expected; }

template <class... Arguments>
bool differs(const Case& c, double got, double expected, const char* format, Arguments... where) {
  if (same(got, expected)) return false;
  std::printf("%s\n  got %g, expected %g at ", c.text.c_str(), got, expected);
  std::printf(format, where...);
  std::printf("\n");
  return true;
}

// The pixel that tap (row, column) of a branch reads at (y, x), or -1 outside the map.
int64_t source(const Case& c, const plan::Branch& b, int row, int column, int n, int y, int x) {
  const int64_t yy = y + (row - b.kernel.h / 2) * b.rate.h;
  const int64_t xx = x + (column - b.kernel.w / 2) * b.rate.w;
  const bool inside = yy >= 0 && yy < c.height && xx >= 0 && xx < c.width;
  return inside ? (int64_t(n) * c.height + yy) * c.width + xx : -1;
}

template <class Visit>
void for_each_tap(const Case& c, const plan::Branch& b, Visit&& visit) {
  for (int n = 0; n < c.batch; ++n)
    for (int y = 0; y < c.height; ++y)
      for (int x = 0; x < c.width; ++x)
        for (int row = 0; row < b.kernel.h; ++row)
          for (int column = 0; column < b.kernel.w; ++column) {
            const int64_t read = source(c, b, row, column, n, y, x);
            if (read >= 0)
              visit((int64_t(n) * c.height + y) * c.width + x, read,
                    int(row * b.kernel.w + column));
          }
}

struct Epilogue {
  std::unique_ptr<Matrix> scale, shift;
  bool relu = false, per_sample = false;
};

// Per tile and row of warps, and combined, what batch normalisation needs.
struct Statistics {
  Statistics(const Case& c, const plan::WorkList& list, const cuda::TileShape& shape, int outs)
      : rows(shape.m / shape.warp_m),
        bytes(c.math == Math::float64 ? 8 : 4),
        means(size_t(list.tiles) * rows * shape.n * bytes),
        squares(means.bytes),
        counts(size_t(list.tiles) * rows, -1),
        mean(size_t(outs) * bytes),
        sum_of_squares(mean.bytes) {
    for (const Memory* memory : {&means, &squares, &mean, &sum_of_squares})
      std::memset(memory->data, 0xff, memory->bytes);  // NaN
    combine.tile_means = means.data, combine.tile_squares = squares.data;
    combine.tile_counts = counts.data();
    combine.mean = mean.data, combine.squares = sum_of_squares.data;
    combine.rows = rows, combine.tile_n = shape.n;
    combine.branches = int(c.branches.size());
    int first = 0;
    for (int b = 0; b < combine.branches; ++b) {
      const plan::TileRange tiles = list.branch_tiles[b];
      const auto channels = int32_t(c.branches[b].plan.out_channels);
      combine.branch[b] = {tiles.first, tiles.count, first, channels};
      first += channels;
    }
  }

  double at(const Memory& values, size_t i) const {
    return bytes == 8 ? static_cast<const double*>(values.data)[i]
                      : static_cast<const float*>(values.data)[i];
  }

  // Against two passes in double over `values` [pixels, pitch].
  bool right(const Case& c, const void* values, int64_t pixels, int pitch) const {
    for (size_t channel = 0; channel < mean.bytes / bytes; ++channel) {
      double sum = 0, of_squares = 0;
      const auto value = [&](int64_t p) { return get(c.math, values, p * pitch + int(channel)); };
      for (int64_t p = 0; p < pixels; ++p) sum += value(p);
      for (int64_t p = 0; p < pixels; ++p) of_squares += std::pow(value(p) - sum / pixels, 2);
      const double size = std::abs(sum / pixels) + std::sqrt(of_squares / pixels);
      const double close = bytes == 8 ? 1e-12 : 1e-5;
      const double got = at(mean, channel), got_squares = at(sum_of_squares, channel);
      if (std::abs(got - sum / pixels) <= close * size &&
          std::abs(got_squares - of_squares) <= close * of_squares)
        continue;
      std::printf("%s\n  channel %zu: mean %g and squares %g, expected %g and %g\n", c.text.c_str(),
                  channel, got, got_squares, sum / pixels, of_squares);
      return false;
    }
    return true;
  }

  int rows;
  size_t bytes;
  Memory means, squares;
  std::vector<int32_t> counts;
  Memory mean, sum_of_squares;
  cuda::CombineParams combine{};
};

bool run(Case& c) {
  const int chunk = cuda::chunk_of(c.math);
  const int64_t pixels = int64_t(c.batch) * c.height * c.width;
  int outs = 0, padded_outs = 0;
  for (Branch& b : c.branches) {
    b.column = padded_outs;
    outs += int(b.plan.out_channels);
    padded_outs += round_up(int(b.plan.out_channels), chunk);
    const int64_t taps = b.plan.kernel.h * b.plan.kernel.w;
    b.weight = std::make_unique<Matrix>(c.math, b.plan.out_channels * taps, c.channels, 0);
    b.grad_weight = std::make_unique<Matrix>(c.math, b.plan.out_channels * taps, c.channels, 0);
  }
  const Matrix x(c.math, pixels, c.channels, draw(0, 1));
  Matrix grad(c.math, pixels, padded_outs, draw(0, 1));
  for (int64_t p = 0; p < pixels; ++p)
    for (const Branch& b : c.branches)
      for (int o = int(b.plan.out_channels); o < round_up(int(b.plan.out_channels), chunk); ++o)
        put(c.math, grad.memory.data, p * grad.pitch + b.column + o, 0);

  // Small shared memory takes the narrow tile; few processors make every list of units long, of
  // many each has a share of a sum.
  const int64_t shared = draw(0, 1) ? 227 * 1024 : 99 * 1024;
  const int64_t n = c.pass == Pass::forward ? c.branches[0].plan.out_channels : c.channels;
  const int index = cuda::pick_shape(c.math, n, shared);
  const cuda::TileShape shape = cuda::tile_shape(c.math, index);
  const plan::Order orders[] = {plan::Order::regions, plan::Order::merged, plan::Order::linear,
                                plan::Order::cheapest};
  plan::Options options;
  options.order = orders[draw(0, 3)];
  options.tile = shape.tile();
  options.processors = draw(0, 1) ? draw(1, 5) : draw(6, 40);
  options.shortest_slice = draw(1, 3);
  options.cut_overhead =
      draw(0, 1) ? -1000 : 0;  // less than nothing: cuts wherever that is possible
  const plan::WorkList list =
      plan::make_work_list(problem_of(c), c.pass, options, options.processors);
  c.text = plan::sentence(problem_of(c), " pass ", int(c.pass), " math ", int(c.math), " shape ",
                          index, " order ", name(options.order), " processors ", options.processors,
                          " units ", list.units.size(), " partials ", list.partials);

  Epilogue epilogue;
  if (c.pass == Pass::forward && draw(0, 1)) {
    if (draw(0, 1)) epilogue.scale = std::make_unique<Matrix>(c.math, 1, outs, 0);
    epilogue.per_sample = draw(0, 1);
    if (draw(0, 1))
      epilogue.shift = std::make_unique<Matrix>(c.math, epilogue.per_sample ? c.batch : 1, outs, 0);
    epilogue.relu = draw(0, 1);
  }
  const int columns = c.pass == Pass::forward ? outs : c.channels;
  Matrix out(c.math, pixels, columns, 0);
  const int out_pitch = draw(0, 1) ? out.pitch : columns;  // not always aligned
  for (int64_t i = 0; i < pixels * out.pitch; ++i) put(c.math, out.memory.data, i, NAN);

  const size_t sum = c.math == Math::float64 ? 8 : 4;
  Memory partials(size_t(list.partials) * size_t(shape.m * shape.n) * sum);
  std::vector<uint32_t> counters(size_t(list.counters), 0);
  auto params = std::make_unique<cuda::PyramidParams>();
  cuda::PyramidParams& p = *params;
  p.units = list.units.data();
  p.worker_begin = list.worker_begin.data();
  p.regions = list.regions.data();
  p.taps = list.taps.data();
  p.workers = list.workers();
  p.batch = c.batch, p.height = c.height, p.width = c.width;
  p.in_channels = c.channels;
  p.weight_channels = p.grad_weight_channels = x.padded;
  const Matrix& a = c.pass == Pass::forward ? x : grad;
  p.a = a.memory.data, p.a_pitch = a.pitch;
  p.b = x.memory.data, p.b_pitch = x.pitch;
  p.out = out.memory.data, p.out_pitch = out_pitch;
  p.scale = epilogue.scale ? epilogue.scale->memory.data : nullptr;
  p.shift = epilogue.shift ? epilogue.shift->memory.data : nullptr;
  p.shift_pitch = epilogue.shift && epilogue.per_sample ? epilogue.shift->pitch : 0;
  p.relu = epilogue.relu;
  p.partials = partials.data;
  p.counters = counters.data();
  int first = 0;
  for (size_t b = 0; b < c.branches.size(); ++b) {
    const Branch& branch = c.branches[b];
    p.branches[b] = {x.memory.data,
                     branch.weight->memory.data,
                     branch.grad_weight->memory.data,
                     int32_t(branch.plan.kernel.h * branch.plan.kernel.w),
                     int32_t(branch.plan.out_channels),
                     x.pitch,
                     branch.column,
                     first};
    first += int(branch.plan.out_channels);
  }
  const bool plain = !epilogue.scale && !epilogue.shift && !epilogue.relu;
  std::unique_ptr<Statistics> statistics;
  if (c.pass == Pass::forward && plain) {
    statistics = std::make_unique<Statistics>(c, list, shape, outs);
    p.tile_means = statistics->means.data;
    p.tile_squares = statistics->squares.data;
    p.tile_counts = statistics->counts.data();
  }
  if (launch_pyramid_sm80(c.pass, c.math, index, p, nullptr) != cudaSuccess ||
      (statistics && launch_combine_sm80(c.math, statistics->combine, nullptr) != cudaSuccess)) {
    std::printf("%s\n  launch failed\n", c.text.c_str());
    return false;
  }

  if (statistics && !statistics->right(c, out.memory.data, pixels, out_pitch)) return false;

  first = 0;
  std::vector<double> grad_x(size_t(pixels * c.channels), 0.0);
  for (const Branch& branch : c.branches) {
    const auto& [kernel, rate, o_count] = branch.plan;
    const int taps = int(kernel.h * kernel.w);
    std::vector<double> y(size_t(pixels * o_count), 0.0);
    std::vector<double> grad_w(size_t(o_count * taps * c.channels), 0.0);
    for_each_tap(c, branch.plan, [&](int64_t p_out, int64_t p_in, int tap) {
      for (int o = 0; o < o_count; ++o)
        for (int i = 0; i < c.channels; ++i) {
          const double w = branch.weight->at(int64_t(o) * taps + tap, i);
          const double g = grad.at(p_out, branch.column + o);
          if (c.pass == Pass::forward) y[size_t(p_out * o_count + o)] += x.at(p_in, i) * w;
          if (c.pass == Pass::grad_input) grad_x[size_t(p_in * c.channels + i)] += g * w;
          if (c.pass == Pass::grad_weight)
            grad_w[size_t((int64_t(o) * taps + tap) * c.channels + i)] += g * x.at(p_in, i);
        }
    });
    for (int64_t pixel = 0; c.pass == Pass::forward && pixel < pixels; ++pixel)
      for (int o = 0; o < o_count; ++o) {
        double value = y[size_t(pixel * o_count + o)];
        if (epilogue.scale) value *= epilogue.scale->at(0, first + o);
        const int64_t sample = epilogue.per_sample ? pixel / (c.height * c.width) : 0;
        if (epilogue.shift) value += epilogue.shift->at(sample, first + o);
        if (epilogue.relu && value < 0) value = 0;
        if (differs(c, get(c.math, out.memory.data, pixel * out_pitch + first + o),
                    rounded(c.math, value), "pixel %ld channel %d", long(pixel), first + o))
          return false;
      }
    for (int64_t row = 0; c.pass == Pass::grad_weight && row < o_count * taps; ++row)
      for (int i = 0; i < c.channels; ++i)
        if (differs(c, branch.grad_weight->at(row, i),
                    rounded(c.math, grad_w[size_t(row * c.channels + i)]),
                    "branch at %d, weight row %ld channel %d", first, long(row), i))
          return false;
    first += int(o_count);
  }
  for (int64_t pixel = 0; c.pass == Pass::grad_input && pixel < pixels; ++pixel)
    for (int i = 0; i < c.channels; ++i)
      if (differs(c, get(c.math, out.memory.data, pixel * out_pitch + i),
                  rounded(c.math, grad_x[size_t(pixel * c.channels + i)]), "pixel %ld channel %d",
                  long(pixel), i))
        return false;
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, int otherwise) {
    return i < argc ? std::atoi(argv[i]) : otherwise;
  };
  const int seed = argument(1, 0), problems = argument(2, 20);
  const int pass = argument(3, -1), math = argument(4, -1);
  for (int i = 0; i < problems; ++i) {
    generator.seed(unsigned(seed + i));
    Case c = draw_case(Pass(pass < 0 ? draw(0, 2) : pass), Math(math < 0 ? draw(0, 4) : math));
    if (!run(c)) {
      std::printf("  seed %d\n", seed + i);
      return 1;
    }
  }
  std::printf("%d problems are exact\n", problems);
  return 0;
}
