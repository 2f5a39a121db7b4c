// SPDX-License-Identifier: BSD-3-Clause
// What reaches the runtime when an operator is called, below torch: which launches, allocations,
// copies and waits, on every model of a device, for thousands of shapes; nothing is computed.
#include <random>
#include <thread>

#include "check.h"
#include "cuda/prepare.h"
#include "cuda/separable.h"

using namespace aspp;
using namespace aspp::cuda;
namespace emulation = aspp::cuda::emulation;
using plan::Pass;
using plan::Problem;

namespace {

constexpr Pass kPasses[] = {Pass::forward, Pass::grad_input, Pass::grad_weight};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int any(int low, int high) { return low + int(engine_() % unsigned(high - low + 1)); }

  // Mostly sizes that occur, some that nobody wants.
  Problem problem() {
    const int sides[] = {1, 2, 7, 16, 33, 33, 65, 65, 97, 129};
    const int channels[] = {1, 3, 8, 64, 100, 256, 512, 2048};
    std::vector<plan::Branch> branches;
    for (int b = any(1, any(0, 9) == 0 ? kMaxBranches : 5); b > 0; --b)
      branches.push_back({{2 * any(0, 1) + 1, 2 * any(0, any(0, 3)) + 1},
                          {any(1, 36), any(1, 36)},
                          channels[any(0, 6)]});
    return Problem(any(1, 8), sides[any(0, 9)], sides[any(0, 9)], branches, channels[any(0, 7)]);
  }

 private:
  std::mt19937 engine_;
};

const Problem& small(int batch = 2);

cudaStream_t new_stream(unsigned flags = cudaStreamNonBlocking) {
  cudaStream_t stream;
  EQUAL(cudaStreamCreateWithFlags(&stream, flags), cudaSuccess);
  return stream;
}

size_t waits() {
  return emulation::count("cudaStreamSynchronize") + emulation::count("cudaDeviceSynchronize");
}

struct OneCall {
  Prepared prepared;
  PyramidParams params{};
  std::vector<emulation::Event> log;
};

// All that a call does to the runtime but for torch's allocations and the copies of operands.
OneCall call(PlanCache& cache, Pass pass, Math math, const Problem& problem, cudaStream_t stream) {
  OneCall one;
  emulation::clear_log();
  EQUAL(prepare_pyramid(cache, pass, math, problem, stream, one.prepared), cudaSuccess);
  one.prepared.plan->describe(one.params);
  EQUAL(launch_pyramid_sm80(pass, math, one.prepared.shape, one.params, stream), cudaSuccess);
  one.log = emulation::log();
  return one;
}

// The launch of a call is legal on the device, as large as the plan says, and where it belongs.
void check_launch(const OneCall& one, Math math, const emulation::Device& device, int index,
                  cudaStream_t stream) {
  const TileShape tile = tile_shape(math, one.prepared.shape);
  int launches = 0;
  for (const emulation::Event& event : one.log) {
    EQUAL(event.result, cudaSuccess);
    if (std::strcmp(event.call, "launch") != 0) continue;
    ++launches;
    EQUAL(event.device, index);
    HOLDS(event.stream == stream);
    EQUAL(int(event.grid.x), one.prepared.plan->workers);
    HOLDS(event.grid.y == 1 && event.grid.z == 1);
    EQUAL(int(event.block.x), tile.threads());
    EQUAL(int(event.shared_bytes), tile.shared_bytes());
    HOLDS(event.shared_bytes <= device.shared_optin);
  }
  EQUAL(launches, 1);
  const size_t blocks = device.shared_per_processor / size_t(tile.shared_bytes() + 1024);
  HOLDS(one.prepared.plan->workers >= 1);
  HOLDS(size_t(one.prepared.plan->workers) <= size_t(device.processors) * blocks);
  HOLDS(one.prepared.plan->workers <= device.processors * tile.blocks);
}

TEST(every_launch_is_legal_and_the_second_call_only_launches) {
  emulation::set_dry_run(true);
  for (const emulation::Device& device : emulation::kDevices) {
    emulation::set_devices({device});
    PlanCache cache(16);
    const cudaStream_t stream = new_stream();
    Random random(unsigned(device.major * 10 + device.minor));
    for (int i = 0; i < 40; ++i) {
      const Problem problem = random.problem();
      for (const Pass pass : kPasses)
        for (int m = 0; m < kMaths; ++m) {
          const auto math = static_cast<Math>(m);
          const OneCall first = call(cache, pass, math, problem, stream);
          check_launch(first, math, device, 0, stream);
          const OneCall second = call(cache, pass, math, problem, stream);
          check_launch(second, math, device, 0, stream);
          HOLDS(second.prepared.plan == first.prepared.plan);
          for (const char* forbidden :
               {"cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaStreamCreateWithFlags"})
            EQUAL(emulation::count(forbidden), size_t(0));
          EQUAL(waits(), size_t(0));
        }
    }
    HOLDS(cache.size() <= 16);
    EQUAL(cudaStreamDestroy(stream), cudaSuccess);
  }
  emulation::set_dry_run(false);
  emulation::set_devices({emulation::kDevices[0]});
}

// The fused kernel runs where, and only where, the choice says so: it is the only one to know
// whether a halo fits.
TEST(every_fused_launch_is_legal_and_asked_for) {
  emulation::set_dry_run(true);
  for (const emulation::Device& device : emulation::kDevices) {
    emulation::set_devices({device});
    PlanCache cache(16);
    const cudaStream_t stream = new_stream();
    Random random(unsigned(device.major * 10 + device.minor));
    int fused = 0, stored = 0;
    for (int i = 0; i < 20; ++i) {
      const Problem problem = random.problem();
      for (int m = 0; m < kMaths; ++m) {
        const auto math = static_cast<Math>(m);
        for (const char* wish : {"", "stored"}) {
          Prepared prepared;
          FusedChoice choice;
          EQUAL(prepare_separable(cache, math, problem, wish, stream, prepared, choice),
                cudaSuccess);
          EQUAL(choice.shape < 0, !choice.why_not.empty());
          EQUAL(prepared.plan != nullptr, choice.is_fused() && *wish == 0);
          if (prepared.plan == nullptr) {
            ++stored;
            continue;
          }
          ++fused;
          SeparableParams params{};
          prepared.plan->describe(params);
          params.halo_pixels = choice.pixels;
          params.most_taps = choice.taps;
          const FusedLayout layout(tile_shape(math, prepared.shape), math, choice.pixels,
                                   choice.taps);
          HOLDS(size_t(layout.total) <= device.shared_optin);
          emulation::clear_log();
          EQUAL(launch_separable_sm80(math, prepared.shape, params, stream), cudaSuccess);
          EQUAL(emulation::count("launch"), size_t(1));
          const emulation::Event event = emulation::log().back();
          HOLDS(event.stream == stream && int(event.grid.x) == prepared.plan->workers);
          EQUAL(int(event.shared_bytes), layout.total);
          HOLDS(prepared.plan->workers <= device.processors);
        }
      }
    }
    HOLDS(stored > 0);
    EQUAL(fused > 0, device.shared_optin > 99 * emulation::kKiB);  // two tiles and two halos
    EQUAL(cudaStreamDestroy(stream), cudaSuccess);
  }
  emulation::set_dry_run(false);
  emulation::set_devices({emulation::kDevices[0]});
}

TEST(the_fused_kernel_is_refused_in_words_where_it_cannot_run) {
  PlanCache cache(4);
  Prepared prepared;
  FusedChoice choice;
  const Problem wide(1, 40, 400, {{{3, 3}, {9, 60}, 8}}, 8), many(1, 20, 20, {{{7, 7}, {1, 1}, 8}});
  const auto refusal = [&](Math math, const Problem& problem) -> std::string {
    try {
      prepare_separable(cache, math, problem, "fused", nullptr, prepared, choice);
      return "";
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
  };
  HOLDS(refusal(Math::bfloat16, wide).find("a tile's halo of 744 pixels") != std::string::npos);
  HOLDS(refusal(Math::bfloat16, many).find("49 live taps") != std::string::npos);
  HOLDS(refusal(Math::float64, small()).find("float64") != std::string::npos);
  HOLDS(refusal(Math::bfloat16, small()).empty());
}

const Problem& small(int batch) {
  static std::vector<Problem> problems;
  while (int(problems.size()) <= batch)
    problems.push_back({int(problems.size()), 5, 7, {{{3, 3}, {2, 1}, 9}, {{1, 1}, {1, 1}, 4}}, 6});
  return problems[size_t(batch)];
}

SharedPlan find(PlanCache& cache, int batch, cudaStream_t stream, int device = 0) {
  SharedPlan plan;
  EQUAL(cache.find(device, small(batch), Pass::forward, {8, 8, 4, 4}, 3, stream, plan),
        cudaSuccess);
  return plan;
}

// What the device holds is the work list.
void check_contents(const SharedPlan& plan, int batch) {
  const plan::Options options{plan::Order::cheapest, {8, 8, 4, 4}, 3};
  const WorkList list = make_work_list(small(batch), Pass::forward, options, 3);
  PyramidParams params{};
  plan->describe(params);
  const auto same = [](const void* there, const auto& here) {
    return reinterpret_cast<uintptr_t>(there) % 16 == 0 &&
           std::memcmp(there, here.data(), here.size() * sizeof(here[0])) == 0;
  };
  EQUAL(params.workers, list.workers());
  EQUAL(plan->partials, list.partials);
  EQUAL(plan->counters, list.counters);
  EQUAL(plan->tiles, list.tiles);
  HOLDS(same(params.units, list.units) && same(params.worker_begin, list.worker_begin));
  HOLDS(same(params.regions, list.regions) && same(params.taps, list.taps));
  HOLDS(same(params.runs, list.runs));
}

TEST(a_plan_is_made_once_on_a_stream_of_its_own) {
  const cudaStream_t stream = new_stream();
  PlanCache cache(4);
  emulation::clear_log();
  const SharedPlan plan = find(cache, 2, stream);
  check_contents(plan, 2);
  EQUAL(emulation::count("cudaMalloc"), size_t(1));
  EQUAL(waits(), size_t(1));
  for (const emulation::Event& event : emulation::log())
    if (!std::strcmp(event.call, "cudaMemcpyAsync") ||
        !std::strcmp(event.call, "cudaStreamSynchronize"))
      HOLDS(event.stream != stream && event.stream != nullptr);
  HOLDS(find(cache, 2, stream) == plan);
  HOLDS(find(cache, 2, nullptr) == plan);  // valid on every stream
  EQUAL(emulation::count("cudaMalloc"), size_t(1));
  find(cache, 3, stream);
  EQUAL(emulation::count("cudaStreamCreateWithFlags"), size_t(1));
}

TEST(the_plan_used_longest_ago_goes_first) {
  const size_t before = emulation::live_allocations();
  {
    PlanCache cache(3);
    const SharedPlan held = find(cache, 1, nullptr);
    for (const int batch : {2, 3, 1, 4}) find(cache, batch, nullptr);  // 2 goes
    EQUAL(cache.size(), size_t(3));
    EQUAL(emulation::live_allocations(), before + 3);
    emulation::clear_log();
    for (const int batch : {1, 3, 4}) find(cache, batch, nullptr);
    EQUAL(emulation::count("cudaMalloc"), size_t(0));
    for (const int batch : {2, 3, 4}) check_contents(find(cache, batch, nullptr), batch);
    EQUAL(emulation::count("cudaMalloc"), size_t(1));
    EQUAL(emulation::live_allocations(), before + 4);  // the one held has left the cache
    check_contents(held, 1);
  }
  EQUAL(emulation::live_allocations(), before);
}

TEST(half_of_the_plans_go_at_once) {
  const size_t before = emulation::live_allocations();
  PlanCache cache(6);
  for (int batch = 1; batch <= 6; ++batch) find(cache, batch, nullptr);
  const cudaStream_t stream = new_stream();
  EQUAL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  for (const int batch : {1, 7}) find(cache, batch, stream);
  cudaGraph_t graph = nullptr;
  EQUAL(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  EQUAL(cudaGraphDestroy(graph), cudaSuccess);
  emulation::clear_log();
  find(cache, 8, nullptr);
  EQUAL(emulation::count("cudaFree"), size_t(0));  // what was captured does not count
  find(cache, 9, nullptr);
  EQUAL(emulation::count("cudaFree"), size_t(3));
  EQUAL(emulation::live_allocations(), before + 6);
  for (const int batch : {5, 6, 7, 8, 9, 1}) find(cache, batch, nullptr);
  EQUAL(emulation::count("cudaMalloc"), size_t(2));
  for (const int batch : {2, 3}) find(cache, batch, nullptr);
  EQUAL(emulation::count("cudaFree"), size_t(3));
}

int rooms_made = 0;
cudaError_t found_when_made = cudaSuccess;
void make_room(int device) {
  ++rooms_made;
  EQUAL(device, 0);
  found_when_made = cudaPeekAtLastError();
}

TEST(room_is_made_once_for_a_plan) {
  PlanCache cache(4, make_room);
  emulation::clear_log();
  emulation::fail_allocations(1);
  check_contents(find(cache, 1, nullptr), 1);
  EQUAL(rooms_made, 1);
  EQUAL(emulation::count("cudaMalloc"), size_t(2));
  EQUAL(found_when_made, cudaSuccess);
  EQUAL(cudaGetLastError(), cudaSuccess);

  emulation::fail_allocations(2);
  SharedPlan plan;
  const plan::Tile tile{8, 8, 4, 4};
  EQUAL(cache.find(0, small(2), Pass::forward, tile, 3, nullptr, plan), cudaErrorMemoryAllocation);
  HOLDS(plan == nullptr && cache.size() == 1);
  EQUAL(rooms_made, 2);
  EQUAL(cudaGetLastError(), cudaErrorMemoryAllocation);  // for whoever reports it
  check_contents(find(cache, 2, nullptr), 2);
  EQUAL(rooms_made, 2);
}

TEST(a_plan_can_be_made_while_a_stream_is_captured_and_is_then_kept) {
  for (const cudaStreamCaptureMode mode :
       {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal,
        cudaStreamCaptureModeRelaxed}) {
    PlanCache cache(2);
    const cudaStream_t stream = new_stream();
    find(cache, 9, stream);
    const SharedPlan old = find(cache, 1, stream);
    emulation::clear_log();
    EQUAL(cudaStreamBeginCapture(stream, mode), cudaSuccess);
    SharedPlan captured[4];
    for (int batch = 1; batch <= 3; ++batch) {
      captured[batch] = find(cache, batch, stream);
      check_contents(captured[batch], batch);
    }
    HOLDS(captured[1] == old);
    EQUAL(cache.size(), size_t(4));
    EQUAL(emulation::count("cudaFree"), size_t(0));  // which waits for the device
    cudaGraph_t graph = nullptr;
    EQUAL(cudaStreamEndCapture(stream, &graph), cudaSuccess);
    EQUAL(cudaGraphDestroy(graph), cudaSuccess);
    for (int batch = 4; batch < 9; ++batch) find(cache, batch, stream);
    for (int batch = 1; batch <= 3; ++batch) HOLDS(find(cache, batch, stream) == captured[batch]);
    EQUAL(cudaStreamDestroy(stream), cudaSuccess);
  }
}

TEST(another_threads_capture_is_left_alone) {
  const cudaStream_t stream = new_stream();
  PlanCache cache(1);
  EQUAL(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  std::thread([&] {
    const cudaStream_t own = new_stream();
    for (int batch = 1; batch < 5; ++batch) check_contents(find(cache, batch, own), batch);
    EQUAL(cudaStreamDestroy(own), cudaSuccess);
  }).join();
  cudaGraph_t graph = nullptr;
  EQUAL(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  EQUAL(cudaGraphDestroy(graph), cudaSuccess);
}

TEST(every_device_has_its_own_plans) {
  emulation::set_dry_run(true);
  emulation::set_devices({emulation::device_of(80), emulation::device_of(120)});
  PlanCache cache(8);
  SharedPlan plans[2];
  for (int device = 0; device < 2; ++device) {
    EQUAL(cudaSetDevice(device), cudaSuccess);
    const cudaStream_t stream = new_stream();
    const OneCall one = call(cache, Pass::forward, Math::bfloat16, small(), stream);
    check_launch(one, Math::bfloat16, emulation::device_of(device ? 120 : 80), device, stream);
    for (const emulation::Event& event : one.log) EQUAL(event.device, device);
    plans[device] = one.prepared.plan;
  }
  HOLDS(plans[0] != plans[1]);
  EQUAL(cudaSetDevice(0), cudaSuccess);
  emulation::set_devices({emulation::kDevices[0]});
  emulation::set_dry_run(false);
}

TEST(what_is_refused_leaves_the_cache_as_it_was) {
  PlanCache cache(2);
  SharedPlan plan;
  const Problem large(2, 1, 1 << 30, {{{1, 1}, {1, 1}, 1}});
  bool refused = false;
  try {
    cache.find(0, large, Pass::forward, {8, 8, 4, 4}, 3, nullptr, plan);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  HOLDS(refused && plan == nullptr && cache.size() == 0);

  emulation::Device tiny = emulation::kDevices[0];
  tiny.shared_optin = 48 << 10;
  emulation::set_devices({tiny});
  refused = false;
  Prepared prepared;
  try {
    prepare_pyramid(cache, Pass::forward, Math::float32, small(), nullptr, prepared);
  } catch (const std::invalid_argument& error) {
    refused = std::strstr(error.what(), "bytes of shared memory but the device has 49152");
  }
  HOLDS(refused && cache.size() == 0);
  emulation::set_devices({emulation::kDevices[0]});
}

TEST(threads_share_one_cache) {
  PlanCache cache(3);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&cache, t] {
      Random random(unsigned(t) + 1);
      const cudaStream_t stream = new_stream();
      for (int i = 0; i < 200; ++i) {
        const int batch = random.any(1, 8);
        SharedPlan plan;
        const cudaError_t error =
            cache.find(0, small(batch), Pass::forward, {8, 8, 4, 4}, 3, stream, plan);
        if (error != cudaSuccess || plan->workers != 3) std::abort();
        if (i % 20 == 0) check_contents(plan, batch);
      }
    });
  for (std::thread& thread : threads) thread.join();
  EQUAL(cache.size(), size_t(3));
}

TEST(no_work_no_launch) {
  PlanCache cache(2);
  emulation::clear_log();
  const OneCall one = call(cache, Pass::forward, Math::float32, small(0), nullptr);
  EQUAL(one.prepared.plan->workers, 0);
  EQUAL(emulation::count("launch"), size_t(0));
}

}  // namespace

int main(int count, char** names) {
  small(9);  // so that threads only read
  return check::main(count, names);
}
