// SPDX-License-Identifier: BSD-3-Clause
#include "noise.h"

namespace aspp::plan {
namespace {

double squared(double value) { return value * value; }

// Of the weights of an axis.
std::vector<std::array<double, 3>> squares(const MinimalAxis& axis) {
  std::vector<std::array<double, 3>> result = axis.weights;
  for (auto& taps : result)
    for (double& tap : taps) tap *= tap;
  return result;
}

// line[x] = sum of squared coefficients times rows of a map
void combine_rows(const std::vector<Term>& terms, std::span<const double> map,
                  std::vector<double>& line) {
  std::fill(line.begin(), line.end(), 0.);
  for (const Term& term : terms)
    for (std::size_t x = 0; x < line.size(); ++x)
      line[x] += squared(term.coefficient) * map[term.at * line.size() + x];
}

double combine_columns(const std::vector<Term>& terms, const std::vector<double>& line) {
  double sum = 0;
  for (const Term& term : terms) sum += squared(term.coefficient) * line[term.at];
  return sum;
}

double denominator(const NoiseForm& form) {
  return squared(static_cast<double>(form.rows.denominator * form.columns.denominator));
}

}  // namespace

Noise output_noise(const NoiseForm& form, std::span<const double> inputs, const TapEnergies& taps) {
  const auto& [rows, columns, row_axis, column_axis] = form;
  const auto row_weights = squares(rows), column_weights = squares(columns);
  std::vector<double> matrices;  // energies of all pairs of weights
  for (const auto& a : row_weights)
    for (const auto& b : column_weights) {
      double sum = 0;  // with the taps that are no part, too: of what is infinite they make NaN
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) sum += a[i] * b[j] * taps[3 * i + j];
      matrices.push_back(sum);
    }

  const std::size_t size = row_axis.size * column_axis.size;
  Noise noise{std::vector<double>(size), std::vector<double>(size)};
  std::vector<double> combined(column_axis.size), made(column_axis.size);
  for (const MinimalProduct& row : rows.products) {
    combine_rows(row.inputs, inputs, combined);
    std::fill(made.begin(), made.end(), 0.);
    for (const MinimalProduct& column : columns.products) {
      const double product = combine_columns(column.inputs, combined) *
                             matrices[row.weight * columns.weights.size() + column.weight] /
                             denominator(form);
      for (const Term& term : column.outputs) made[term.at] += squared(term.coefficient) * product;
    }
    for (const Term& term : row.outputs)
      for (std::size_t x = 0; x < made.size(); ++x)
        noise.minimal[term.at * made.size() + x] += squared(term.coefficient) * made[x];
  }
  for_each_live_pair(form, [&](Index tap, Index output, Index input) {
    noise.direct[output] += taps[tap] * inputs[input];
  });
  return noise;
}

TapNoise tap_noise(const NoiseForm& form, std::span<const double> inputs,
                   std::span<const double> grads) {
  const auto& [rows, columns, row_axis, column_axis] = form;
  const auto row_weights = squares(rows), column_weights = squares(columns);
  std::vector<double> matrices(row_weights.size() * column_weights.size());
  std::vector<double> combined(column_axis.size), pulled(column_axis.size);
  for (const MinimalProduct& row : rows.products) {
    combine_rows(row.inputs, inputs, combined);
    combine_rows(row.outputs, grads, pulled);
    for (const MinimalProduct& column : columns.products)
      matrices[row.weight * columns.weights.size() + column.weight] +=
          combine_columns(column.inputs, combined) * combine_columns(column.outputs, pulled);
  }
  TapNoise noise;
  for (std::size_t u = 0; u < row_weights.size(); ++u)
    for (std::size_t v = 0; v < column_weights.size(); ++v)
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
          noise.minimal[3 * i + j] += row_weights[u][i] * column_weights[v][j] *
                                      matrices[u * column_weights.size() + v] / denominator(form);
  for_each_live_pair(form, [&](Index tap, Index output, Index input) {
    const double term = grads[output] * inputs[input];
    noise.direct[tap] += term;
    noise.fourth[tap] += term * term;
  });
  return noise;
}

}  // namespace aspp::plan
