// SPDX-License-Identifier: BSD-3-Clause
#include "polyphase.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "minimal_lines.h"
#include "parallel.h"

namespace aspp {

namespace {

// Products of a chunk: enough of them per matrix that reading the weights does not show, few enough
// that their sums stay in the caches.
constexpr int64_t kChunkProducts = 3072;
constexpr int64_t kColumnProducts = 256;
constexpr int64_t kChunkPanels = 4;

bool policy_is(const char* name) {
  const char* text = std::getenv("ASPP_EXT_POLYPHASE");
  return text != nullptr && std::strcmp(text, name) == 0;
}

// A branch in chunks of products.
class Chunks {
 public:
  explicit Chunks(const MinimalForm& form) : columns_(parts_of(form.columns, kColumnProducts)) {
    int64_t widest = 1;
    for (const AxisPart& part : columns_) widest = std::max(widest, part.products());
    rows_ = parts_of(form.rows, std::max<int64_t>(kChunkProducts / widest, 1));
    for (const AxisPart& part : rows_) row_lines_.push_back(part.lines());
    for (const AxisPart& part : columns_) column_lines_.push_back(part.lines());
  }

  template <typename F>  // body(chunk) for every chunk of `panels` panels
  void for_each(int64_t batch, int64_t panels, F&& body) const {
    for (int64_t n = 0; n < batch; ++n) {
      for (const MinimalLines& rows : row_lines_) {
        for (const MinimalLines& columns : column_lines_) {
          for (int64_t panel = 0; panel < panels; panel += kChunkPanels) {
            body(PolyphaseChunk{&rows, &columns, n, panel, std::min(kChunkPanels, panels - panel)});
          }
        }
      }
    }
  }

 private:
  std::vector<AxisPart> rows_, columns_;
  std::vector<MinimalLines> row_lines_, column_lines_;
};

struct Task {
  size_t branch;
  PolyphaseChunk chunk;

  int64_t products() const {
    return chunk.rows->products() * chunk.columns->products() * chunk.panel_count;
  }
};

}  // namespace

MinimalForms minimal_forms(const PyramidShape& shape, const std::vector<BranchParams>& branches,
                           const Operands& operands, bool prepared) {
  MinimalForms forms(branches.size());
  if (policy_is("0") || operands.product_dtype() != operands.compute_dtype()) return forms;
  plan::PolyphaseCosts costs;
  costs.prepared = prepared;
  for (size_t b = 0; b < branches.size(); ++b) {
    const BranchParams& branch = branches[b];
    if (branch.depthwise != nullptr) continue;
    const plan::Problem problem(shape.batch, shape.height, shape.width,
                                {{{branch.kernel_h, branch.kernel_w},
                                  {branch.rate_h, branch.rate_w},
                                  branch.out_channels}},
                                shape.channels);
    const plan::PolyphaseChoice choice = plan::choose_polyphase(problem, 0, costs);
    if (!choice.form || !(choice.is_polyphase() || policy_is("always"))) continue;
    forms[b] = {plan::minimal_axis(row_axis(problem, 0, plan::Pass::forward), choice.form->rows),
                plan::minimal_axis(col_axis(problem, 0, plan::Pass::forward),
                                   choice.form->columns)};
  }
  return forms;
}

bool any_minimal(const MinimalForms& forms) {
  return std::any_of(forms.begin(), forms.end(), [](const auto& form) { return bool(form); });
}
bool all_minimal(const MinimalForms& forms) {
  return std::all_of(forms.begin(), forms.end(), [](const auto& form) { return bool(form); });
}

namespace {

// A page of the usual size is faulted in for each 4 KB: for matrices of 100 MB that alone would
// take as long as the products.
void ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const uintptr_t begin = (uintptr_t(memory) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t end = (uintptr_t(memory) + uintptr_t(bytes)) / kLarge * kLarge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

Tensor combine_taps(const MinimalForm& form, const Tensor& weight, bool flipped,
                    Operands& operands) {
  const int64_t channels = weight.size(1), out_channels = weight.size(0);
  const Matrix taps = operands.weight(weight, operands.compute_dtype());
  MinimalWeights w;
  w.taps = taps.data;
  w.tap_stride = taps.tap;
  w.row_stride = taps.row;
  w.kernel_h = weight.size(2);
  w.kernel_w = weight.size(3);
  w.flipped = flipped;
  w.channels = channels;
  w.out_channels = out_channels;
  w.row_weights = form.rows.weights.data()->data();
  w.column_weights = form.columns.weights.data()->data();
  w.row_count = int64_t(form.rows.weights.size());
  w.column_count = int64_t(form.columns.weights.size());
  const Tensor matrices = operands.empty({form.matrices(), channels, padded(out_channels)});
  ask_for_large_pages(matrices.data_ptr(),
                      matrices.numel() * (operands.double_precision() ? 8 : 4));
  constexpr int64_t kSlice = 32;
  const int64_t slices = (channels + kSlice - 1) / kSlice;
  run_tasks(panels(out_channels) * slices, 0, [&](int64_t task, void*) {
    const int64_t first = task % slices * kSlice;
    kernels().combine_taps(w, task / slices, first, std::min(first + kSlice, channels),
                           matrices.data_ptr(), operands.double_precision());
  });
  return matrices;
}

void check_prepared(const char* op, const MinimalForm& form, const Tensor& prepared, size_t index,
                    const Tensor& weight, const Operands& operands) {
  const std::vector<int64_t> expected{form.matrices(), weight.size(1), padded(weight.size(0))};
  const bool fits = dtype_of(prepared) == operands.compute_dtype() && prepared.is_contiguous() &&
                    shape_of(prepared) == shape_of(expected);
  require(fits, op, ": ", entry("prepared", index),
          " must be what polyphase_weights returns for x's size, of shape ", shape_of(expected),
          ", got ", dtype_name(prepared.scalar_type()), " of shape ", shape_of(prepared));
}

}  // namespace

std::vector<Tensor> minimal_weights(const char* op, const MinimalForms& forms,
                                    const std::vector<Tensor>& weights,
                                    const std::vector<Tensor>& prepared, Operands& operands,
                                    bool flipped) {
  std::vector<Tensor> matrices;
  for (size_t b = 0; b < forms.size(); ++b) {
    if (!forms[b]) {
      matrices.push_back(operands.empty({0}));
    } else if (prepared.empty()) {
      matrices.push_back(combine_taps(*forms[b], weights[b], flipped, operands));
    } else {
      check_prepared(op, *forms[b], prepared[b], b, weights[b], operands);
      matrices.push_back(prepared[b]);
    }
  }
  return matrices;
}

std::vector<size_t> run_minimal(const PyramidParams& params, const MinimalForms& forms,
                                const std::vector<Tensor>& matrices, const Operands& operands,
                                MinimalTimes* times) {
  const Kernels& k = kernels();
  const bool wide = operands.double_precision();
  std::vector<PolyphaseParams> branches(forms.size());
  std::vector<std::unique_ptr<Chunks>> chunks(forms.size());
  std::vector<Task> tasks;
  int64_t scratch = 0;
  for (size_t b = 0; b < forms.size(); ++b) {
    if (!forms[b]) continue;
    const BranchParams& branch = params.branches[b];
    PolyphaseParams& p = branches[b];
    p.x = params.x;
    p.channels = params.channels;
    p.out_channels = branch.out_channels;
    p.weights = matrices[b].data_ptr();
    if (params.scale) p.scale = operands.offset(params.scale, branch.column);
    if (params.shift) p.shift = operands.offset(params.shift, branch.column);
    p.shift_n_stride = params.shift_n_stride;
    p.relu = params.relu;
    p.out = channels_from(params.out, branch.channel);
    chunks[b] = std::make_unique<Chunks>(*forms[b]);
    chunks[b]->for_each(params.batch, panels(branch.out_channels),
                        [&](const PolyphaseChunk& chunk) {
                          tasks.push_back({b, chunk});
                          scratch = std::max(scratch, k.polyphase_scratch(chunk, wide));
                        });
  }
  // Long tasks first, so that the threads end together.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.products() > b.products(); });
  std::vector<std::atomic<bool>> failed(forms.size());
  std::atomic<int64_t> nanoseconds[3] = {};
  run_tasks(int64_t(tasks.size()), scratch, [&](int64_t index, void* memory) {
    Task& task = tasks[size_t(index)];
    int64_t spent[3] = {};
    if (times != nullptr) task.chunk.nanoseconds = spent;
    if (!k.polyphase_forward(branches[task.branch], task.chunk, memory, wide)) {
      failed[task.branch] = true;
    }
    for (int i = 0; i < 3; ++i) nanoseconds[i] += spent[i];
  });
  if (times != nullptr) {
    *times = {double(nanoseconds[0]) * 1e-9, double(nanoseconds[1]) * 1e-9,
              double(nanoseconds[2]) * 1e-9};
  }
  std::vector<size_t> rest;
  for (size_t b = 0; b < forms.size(); ++b) {
    if (!forms[b] || failed[b]) rest.push_back(b);
  }
  return rest;
}

}  // namespace aspp
