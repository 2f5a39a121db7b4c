// SPDX-License-Identifier: BSD-3-Clause
#include "polyphase.h"

#include <algorithm>
#include <atomic>

#include "forward.h"
#include "minimal_lines.h"
#include "parallel.h"

namespace aspp {

namespace {

constexpr int64_t kColumnProducts = 256;

// The products of a branch, in parts of its rows and of its columns.
class Chunks {
 public:
  // As few as keep their sums in the caches, since each reads all matrices; where that leaves them
  // long, a whole number for each of `threads`.
  Chunks(const MinimalForm& form, int64_t batch, int64_t threads)
      : columns_(parts_of(form.columns, kColumnProducts)) {
    constexpr int64_t kLeast = 1024;
    const int64_t all = form.products() * batch;
    int64_t chunks = (all + plan::kChunkRows - 1) / plan::kChunkRows;
    const int64_t even = (chunks + threads - 1) / threads * threads;
    if (chunks > 1 && all / even >= kLeast) chunks = even;
    int64_t widest = 1;
    for (const AxisPart& part : columns_) widest = std::max(widest, part.products());
    rows_ = parts_of(form.rows, std::max<int64_t>((all + chunks - 1) / chunks / widest, 1));
    for (const AxisPart& part : rows_) row_lines_.push_back(part.lines());
    for (const AxisPart& part : columns_) column_lines_.push_back(part.lines());
  }

  std::vector<PolyphaseChunk> of_batch(int64_t batch) const {
    std::vector<PolyphaseChunk> chunks;
    for (int64_t n = 0; n < batch; ++n) {
      for (const MinimalLines& rows : row_lines_) {
        for (const MinimalLines& columns : column_lines_) chunks.push_back({&rows, &columns, n});
      }
    }
    return chunks;
  }

 private:
  std::vector<AxisPart> rows_, columns_;
  std::vector<MinimalLines> row_lines_, column_lines_;
};

// Panels of one task: as many as share combined inputs well, unless threads would have no work.
int64_t panels_of_task(int64_t panels, int64_t chunks) {
  int64_t count = std::min<int64_t>(panels, 4);
  const int64_t wanted = int64_t(torch::stable::get_num_threads());
  while (count > 1 && chunks * ((panels + count - 1) / count) < wanted) --count;
  return count;
}

struct Task {
  size_t run;
  PolyphaseChunk chunk;

  int64_t products() const {
    return chunk.rows->products() * chunk.columns->products() * chunk.panel_count;
  }
};

}  // namespace

void run_polyphase(std::vector<MinimalRun> runs, int64_t batch, bool double_precision) {
  const Kernels& k = kernels();
  std::vector<Chunks> chunks;
  std::vector<Task> tasks;
  chunks.reserve(runs.size());
  for (size_t r = 0; r < runs.size(); ++r) {
    // No bit of an output depends on the division into chunks.
    chunks.emplace_back(*runs[r].form, batch, int64_t(torch::stable::get_num_threads()));
    std::vector<PolyphaseChunk> whole = chunks.back().of_batch(batch);
    const LooseOutputs& loose = *runs[r].loose;
    if (!loose.marked.empty()) runs[r].params.direct = loose.marked.data();
    std::erase_if(whole,
                  [&](const PolyphaseChunk& chunk) { return loose.images[size_t(chunk.n)]; });
    const int64_t all = panels(runs[r].params.out_channels);
    const int64_t count = panels_of_task(all, int64_t(whole.size()));
    for (PolyphaseChunk chunk : whole) {
      for (int64_t panel = 0; panel < all; panel += count) {
        chunk.first_panel = panel;
        chunk.panel_count = std::min(count, all - panel);
        tasks.push_back({r, chunk});
      }
    }
  }
  // Long tasks first, so that the threads end together.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.products() > b.products(); });
  int64_t scratch = 0;
  for (const Task& task : tasks) {
    scratch = std::max(scratch, k.polyphase_scratch(task.chunk, double_precision));
  }
  struct Outcome {
    std::atomic<int64_t> nanoseconds[3]{};
  };
  std::vector<Outcome> outcomes(runs.size());
  run_tasks(int64_t(tasks.size()), scratch, [&](int64_t index, void* memory) {
    Task& task = tasks[size_t(index)];
    Outcome& outcome = outcomes[task.run];
    int64_t spent[3] = {};
    if (runs[task.run].times != nullptr) task.chunk.nanoseconds = spent;
    k.polyphase_forward(runs[task.run].params, task.chunk, memory, double_precision);
    for (int i = 0; i < 3; ++i) outcome.nanoseconds[i] += spent[i];
  });
  for (size_t r = 0; r < runs.size(); ++r) {
    if (runs[r].times == nullptr) continue;
    const auto seconds = [&](int i) { return double(outcomes[r].nanoseconds[i]) * 1e-9; };
    *runs[r].times = {seconds(0), seconds(1), seconds(2)};
  }
}

std::vector<LooseOutputs> loose_outputs(const PyramidParams& params, const MinimalForms& forms,
                                        const std::vector<Tensor>& matrices,
                                        bool double_precision) {
  if (!any_minimal(forms)) return std::vector<LooseOutputs>(forms.size());
  const PyramidShape shape{params.batch, params.channels, params.height, params.width};
  std::vector<plan::TapEnergies> taps(forms.size());
  for (size_t b = 0; b < forms.size(); ++b) {
    if (forms[b]) taps[b] = energies_of_taps(matrices[b]);
  }
  return loose_outputs(forms, taps, pixel_energies(params.x, shape, double_precision), params.batch,
                       double_precision);
}

std::vector<size_t> run_minimal(const PyramidParams& params, const MinimalForms& forms,
                                const std::vector<Tensor>& matrices,
                                const std::vector<Tensor>& weights,
                                const std::vector<LooseOutputs>& loose, Operands& operands,
                                std::vector<MinimalTimes>* times) {
  std::vector<MinimalRun> runs;
  std::vector<size_t> rest;
  for (size_t b = 0; b < forms.size(); ++b) {
    if (!forms[b]) {
      rest.push_back(b);
      continue;
    }
    const BranchParams& branch = params.branches[b];
    PolyphaseParams p;
    p.x = params.x;
    p.channels = params.channels;
    p.height = params.height;
    p.width = params.width;
    p.out_channels = branch.out_channels;
    p.weights = matrices[b].data_ptr();
    if (params.scale) p.scale = operands.offset(params.scale, branch.column);
    if (params.shift) p.shift = operands.offset(params.shift, branch.column);
    p.shift_n_stride = params.shift_n_stride;
    p.relu = params.relu;
    p.out = channels_from(params.out, branch.channel);
    runs.push_back({p, forms[b].get(), &loose[b], times == nullptr ? nullptr : &(*times)[b]});
  }
  run_polyphase(std::move(runs), params.batch, operands.double_precision());
  for (size_t b = 0; b < forms.size(); ++b) {
    if (!forms[b] || loose[b].marked.empty()) continue;
    BranchParams branch = params.branches[b];
    set_weight(operands, branch, weights[b]);
    run_marked(params, branch, loose[b].marked, operands.double_precision());
  }
  return rest;
}

void run_branches(const PyramidParams& params, const MinimalForms& forms,
                  const std::vector<Tensor>& matrices, const std::vector<Tensor>& weights,
                  Operands& operands) {
  const auto loose = loose_outputs(params, forms, matrices, operands.double_precision());
  run_directly(params, run_minimal(params, forms, matrices, weights, loose, operands), weights,
               operands);
}

void run_grad_weight(const MinimalForm& form, const Image& x, const Image& grad, int64_t batch,
                     const Tensor& grad_weight, bool double_precision) {
  const Kernels& k = kernels();
  const Chunks chunks(form, batch, 1);  // sums run through the chunks: the same for any threads
  const std::vector<PolyphaseChunk> all = chunks.of_batch(batch);
  PolyphaseGradWeight p;
  p.x = x;
  p.grad = grad;
  p.map = taps_to_matrices(form, grad_weight.size(0), grad_weight.size(1), grad_weight.size(2),
                           grad_weight.size(3));
  p.chunks = all.data();
  p.chunk_count = int64_t(all.size());
  p.grad_weight = grad_weight.data_ptr();
  const int64_t blocks = (p.map.channels + k.polyphase_block - 1) / k.polyphase_block;
  const int64_t width = panels(p.map.out_channels), count = panels_of_task(width, blocks);
  const int64_t groups = (width + count - 1) / count;
  run_tasks(blocks * groups, k.polyphase_grad_weight_scratch(p, count, double_precision),
            [&](int64_t task, void* scratch) {
              const int64_t panel = task % groups * count;
              k.polyphase_grad_weight(p, task / groups * k.polyphase_block, panel,
                                      std::min(count, width - panel), scratch, double_precision);
            });
}

}  // namespace aspp
