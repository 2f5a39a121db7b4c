// SPDX-License-Identifier: BSD-3-Clause
// Which results minimal filtering would round too much, so that they are computed directly: the
// outputs that see small pixels or taps alone while their products hold large ones, down to zeros
// beside anything, up to what is not finite or would not be.
//
// It is decided by energies (csrc/plan/noise.h), image by image, and costs a pass over the pixels.
// Not seen are single channels within a pixel and single output channels of a weight: their share
// in its noise is the average one. Of a weight's gradient at least, what a channel that is zero
// somewhere leaves: no huge pixels, and no roundings of zero.
#pragma once

#include "../plan/noise.h"
#include "minimal_forms.h"

namespace aspp {

// Of pixels, [N, H, W].
std::vector<double> pixel_energies(const Image& x, const PyramidShape& shape,
                                   bool double_precision);
// Of a weight [O, C, kh, kw], in all its channels.
plan::TapEnergies tap_energies(const Tensor& weight, bool flipped);

// The outputs of a branch that are computed directly.
struct LooseOutputs {
  std::vector<char> marked;  // [N, H, W]; empty where there are none
  std::vector<char> images;  // [N], where all are: directly costs less than both ways together
};

// Of each branch with a form, for the energies of its taps and of the input of all.
std::vector<LooseOutputs> loose_outputs(const MinimalForms& forms,
                                        const std::vector<plan::TapEnergies>& taps,
                                        const std::vector<double>& pixels, int64_t batch,
                                        bool double_precision);
// Whether the gradient of a weight is, for the energies of its input and of its output's gradient.
bool is_loose(const MinimalForm& form, const std::vector<double>& pixels,
              const std::vector<double>& grads, int64_t batch, bool double_precision);

// Writes the zeros of a gradient [O, C, kh, kw] that minimal filtering computed: those of a tap and
// a channel that is zero wherever the tap joins it to anything.
void clear_zeros(const MinimalForm& form, const Image& x, const std::vector<double>& pixels,
                 const Image& grad, const std::vector<double>& grads, int64_t batch,
                 const Tensor& grad_weight, bool double_precision);

}  // namespace aspp
