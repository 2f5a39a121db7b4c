// SPDX-License-Identifier: BSD-3-Clause
#include "minimal_forms.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>

#include "../plan_mutex.h"
#include "loose.h"
#include "parallel.h"

namespace aspp {

namespace {

std::shared_ptr<const MinimalForm> cheapest_form(const plan::Problem& problem, bool always,
                                                 bool prepared) {
  plan::PolyphaseCosts costs;
  costs.prepared = prepared;
  const plan::PolyphaseChoice choice = plan::choose_polyphase(problem, 0, costs);
  if (!choice.form || !(choice.is_polyphase() || always)) return nullptr;
  const auto rows = row_axis(problem, 0, plan::Pass::forward);
  const auto columns = col_axis(problem, 0, plan::Pass::forward);
  // Scattered outputs are computed half as fast again as whole maps.
  const double saved = always ? 1 : (1 - choice.polyphase / choice.direct) / 1.5;
  return std::make_shared<MinimalForm>(
      MinimalForm{plan::minimal_axis(rows, choice.form->rows),
                  plan::minimal_axis(columns, choice.form->columns), rows, columns, saved});
}

// Choosing and planning take up to a millisecond, which a small map feels.
class FormCache {
 public:
  using Key = std::array<int64_t, 11>;
  using Form = std::shared_ptr<const MinimalForm>;

  // Made without the lock: two threads may make the same one.
  template <typename F>
  Form get(const Key& key, F&& make) {
    if (const auto found = find(key)) return *found;
    const Form made = make();
    const std::lock_guard lock(plan_mutex);
    if (forms_.size() >= kEntries) forms_.clear();
    return forms_.try_emplace(key, made).first->second;
  }

 private:
  std::optional<Form> find(const Key& key) {
    const std::lock_guard lock(plan_mutex);
    const auto found = forms_.find(key);
    if (found == forms_.end()) return std::nullopt;
    return found->second;
  }

  static constexpr size_t kEntries = 128;
  std::map<Key, Form> forms_;
};

FormCache form_cache;

}  // namespace

MinimalForms minimal_forms(const PyramidShape& shape, const std::vector<BranchParams>& branches,
                           const Operands& operands, Polyphase polyphase, bool prepared) {
  MinimalForms forms(branches.size());
  if (polyphase == Polyphase::never || operands.product_dtype() != operands.compute_dtype())
    return forms;
  const bool always = polyphase == Polyphase::always;
  const int64_t batch = prepared ? 1 : shape.batch;
  for (size_t b = 0; b < branches.size(); ++b) {
    const BranchParams& branch = branches[b];
    const plan::Branch planned{
        {branch.kernel_h, branch.kernel_w}, {branch.rate_h, branch.rate_w}, branch.out_channels};
    if (branch.depthwise != nullptr || planned.kernel == plan::Extent{1, 1}) continue;
    const FormCache::Key key{batch,           shape.channels,   shape.height,
                             shape.width,     planned.kernel.h, planned.kernel.w,
                             planned.rate.h,  planned.rate.w,   branch.out_channels,
                             int64_t(always), int64_t(prepared)};
    forms[b] = form_cache.get(key, [&] {
      const plan::Problem problem(batch, shape.height, shape.width, {planned}, shape.channels);
      return cheapest_form(problem, always, prepared);
    });
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

constexpr int64_t kNorms = kPad;  // the place of nine

int64_t size_of(const MinimalForm& form, int64_t out_channels, int64_t channels) {
  return form.matrices() * channels * padded(out_channels) + kNorms;
}

}  // namespace

MinimalWeights taps_to_matrices(const MinimalForm& form, int64_t out_channels, int64_t channels,
                                int64_t kernel_h, int64_t kernel_w) {
  MinimalWeights w;
  w.kernel_h = kernel_h;
  w.kernel_w = kernel_w;
  w.channels = channels;
  w.out_channels = out_channels;
  w.row_weights = form.rows.weights.data()->data();
  w.column_weights = form.columns.weights.data()->data();
  w.row_count = int64_t(form.rows.weights.size());
  w.column_count = int64_t(form.columns.weights.size());
  return w;
}

namespace {

// Whether the taps of a weight are a step apart, and its input channels close enough together to be
// picked one by one: the transpose of a contiguous weight, without a copy.
bool reads_in_place(const Tensor& weight, const Operands& operands) {
  const int64_t kw = weight.size(3);
  const bool one_step = weight.size(2) == 1 || kw == 1 || weight.stride(2) == kw * weight.stride(3);
  // With a stride of 1 whole vectors are read: no channel may be missing in the last.
  const int64_t step = weight.stride(1);
  const bool whole = step != 1 || weight.size(1) % kPad == 0;
  return dtype_of(weight) == operands.compute_dtype() && one_step && step <= 16 && whole;
}

}  // namespace

Tensor combine_taps(const MinimalForm& form, const Tensor& weight, bool transposed,
                    Operands& operands) {
  const int64_t channels = weight.size(transposed ? 0 : 1);
  const int64_t out_channels = weight.size(transposed ? 1 : 0);
  MinimalWeights w = taps_to_matrices(form, out_channels, channels, weight.size(2), weight.size(3));
  w.flipped = transposed;
  if (transposed && reads_in_place(weight, operands)) {
    w.taps = weight.data_ptr();
    w.tap_stride = w.kernel_w > 1 ? weight.stride(3) : weight.stride(2);
    w.row_stride = weight.stride(0);
    w.column_stride = weight.stride(1);
  } else {
    const Tensor read = transposed ? torch::stable::transpose(weight, 0, 1) : weight;
    const Matrix taps = operands.weight(read, operands.compute_dtype());
    w.taps = taps.data;
    w.tap_stride = taps.tap;
    w.row_stride = taps.row;
  }
  const Tensor matrices = operands.empty({size_of(form, out_channels, channels)});
  ask_for_large_pages(matrices.data_ptr(),
                      matrices.numel() * (operands.double_precision() ? 8 : 4));
  constexpr int64_t kSlice = 32;
  const int64_t slices = (channels + kSlice - 1) / kSlice;
  run_tasks(panels(out_channels) * slices, 0, [&](int64_t task, void*) {
    const int64_t first = task % slices * kSlice;
    kernels().combine_taps(w, task / slices, first, std::min(first + kSlice, channels),
                           matrices.data_ptr(), operands.double_precision());
  });
  const plan::TapEnergies energies = tap_energies(weight, transposed);
  const auto write = [&](auto* numbers) {
    numbers += matrices.numel() - kNorms;
    std::fill_n(numbers, kNorms, 0);
    std::ranges::transform(energies, numbers, [](double energy) { return std::sqrt(energy); });
  };
  operands.double_precision() ? write(static_cast<double*>(matrices.data_ptr()))
                              : write(static_cast<float*>(matrices.data_ptr()));
  return matrices;
}

plan::TapEnergies energies_of_taps(const Tensor& matrices) {
  plan::TapEnergies energies{};
  const auto read = [&](const auto* numbers) {
    numbers += matrices.numel() - kNorms;
    std::transform(numbers, numbers + 9, energies.begin(), [](double norm) { return norm * norm; });
  };
  matrices.scalar_type() == ScalarType::Double ? read(static_cast<double*>(matrices.data_ptr()))
                                               : read(static_cast<float*>(matrices.data_ptr()));
  return energies;
}

std::vector<Tensor> minimal_weights(const MinimalForms& forms, const std::vector<Tensor>& weights,
                                    Operands& operands) {
  std::vector<Tensor> matrices;
  for (size_t b = 0; b < forms.size(); ++b) {
    matrices.push_back(forms[b] ? combine_taps(*forms[b], weights[b], false, operands)
                                : operands.empty({0}));
  }
  return matrices;
}

void check_prepared(const char* op, const MinimalForms& forms, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& prepared, const Operands& operands) {
  for (size_t b = 0; b < forms.size(); ++b) {
    const Tensor& given = prepared[b];
    check_device(op, entry("prepared", b), given, weights[b]);
    std::vector<int64_t> expected{0};
    if (forms[b]) expected = {size_of(*forms[b], weights[b].size(0), weights[b].size(1))};
    const bool fits =
        shape_of(given) == shape_of(expected) &&
        (!forms[b] || (dtype_of(given) == operands.compute_dtype() && given.is_contiguous()));
    require(
        fits, op, ": ", entry("prepared", b),
        " must be what polyphase_weights returns for x's size and the same polyphase, of shape ",
        shape_of(expected), ", got ", dtype_name(given.scalar_type()), " of shape ",
        shape_of(given));
  }
}

}  // namespace aspp
