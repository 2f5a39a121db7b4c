// SPDX-License-Identifier: BSD-3-Clause
#include "minimal_lines.h"

#include <algorithm>

namespace aspp {

namespace {

void sort_unique(std::vector<int64_t>& positions) {
  std::sort(positions.begin(), positions.end());
  positions.erase(std::unique(positions.begin(), positions.end()), positions.end());
}

int64_t index_of(const std::vector<int64_t>& positions, int64_t position) {
  return std::lower_bound(positions.begin(), positions.end(), position) - positions.begin();
}

}  // namespace

AxisPart::AxisPart(const plan::MinimalAxis& axis, plan::Interval pieces)
    : denominator_(double(axis.denominator)) {
  std::vector<const plan::MinimalProduct*> products;
  for (auto piece = pieces.begin; piece < pieces.end; ++piece) {
    const plan::MinimalPiece& one = axis.pieces[size_t(piece)];
    for (auto k = one.products.begin; k < one.products.end; ++k) {
      products.push_back(&axis.products[size_t(k)]);
    }
    written_.insert(written_.end(), one.outputs.begin(), one.outputs.end());
  }
  std::stable_sort(products.begin(), products.end(),
                   [](const auto* a, const auto* b) { return a->weight < b->weight; });
  for (const plan::MinimalProduct* product : products) {
    weight_of_.push_back(product->weight);
    for (const plan::Term& term : product->inputs) read_.push_back(term.at);
  }
  sort_unique(read_);
  sort_unique(written_);

  const auto weights = int64_t(axis.weights.size());
  for (int64_t w = 0; w <= weights; ++w) weight_begin_.push_back(index_of(weight_of_, w));
  std::vector<std::vector<plan::Term>> outputs(written_.size());
  for (size_t k = 0; k < products.size(); ++k) {
    for (const plan::Term& term : products[k]->inputs) {
      inputs_.at.push_back(index_of(read_, term.at));
      inputs_.coefficient.push_back(term.coefficient);
    }
    inputs_.end_row();
    for (const plan::Term& term : products[k]->outputs) {
      const int64_t at = index_of(written_, term.at);
      pulled_.at.push_back(at);
      pulled_.coefficient.push_back(term.coefficient);
      outputs[size_t(at)].push_back({plan::Index(k), term.coefficient});
    }
    pulled_.end_row();
  }
  for (const auto& terms : outputs) {
    for (const plan::Term& term : terms) {
      outputs_.at.push_back(term.at);
      outputs_.coefficient.push_back(term.coefficient);
    }
    outputs_.end_row();
  }
}

MinimalLines AxisPart::lines() const {
  MinimalLines lines;
  lines.read = read_.data();
  lines.read_count = int64_t(read_.size());
  lines.written = written_.data();
  lines.inputs = inputs_.combinations();
  lines.outputs = outputs_.combinations();
  lines.pulled = pulled_.combinations();
  lines.weight_begin = weight_begin_.data();
  lines.weights = int64_t(weight_begin_.size()) - 1;
  lines.denominator = denominator_;
  return lines;
}

std::vector<AxisPart> parts_of(const plan::MinimalAxis& axis, int64_t products) {
  const auto all = int64_t(axis.products.size()), pieces = int64_t(axis.pieces.size());
  const int64_t wanted = std::max<int64_t>((all + products - 1) / products, 1);
  std::vector<AxisPart> parts;
  for (int64_t begin = 0, used = 0; begin < pieces;) {
    const int64_t left = std::max<int64_t>(wanted - int64_t(parts.size()), 1);
    const int64_t share = (all - used + left - 1) / left;  // of what is left
    int64_t end = begin, count = 0;
    while (end < pieces) {
      const int64_t next = axis.pieces[size_t(end)].products.size();
      if (end > begin && (count + next > products || count + next / 2 > share)) break;
      count += next;
      ++end;
    }
    parts.emplace_back(axis, plan::Interval{begin, end});
    used += count;
    begin = end;
  }
  return parts;
}

}  // namespace aspp
