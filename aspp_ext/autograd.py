# SPDX-License-Identifier: BSD-3-Clause
"""The operators as ``torch.autograd.Function``: the registered formulas, by another door."""

from .ops.pyramid import AtrousPyramid, AtrousPyramidGradInput, AtrousPyramidGradWeight
from .ops.separable_autograd import AtrousSeparablePyramid, AtrousSeparablePyramidBackward

__all__ = [
    "AtrousPyramid",
    "AtrousPyramidGradInput",
    "AtrousPyramidGradWeight",
    "AtrousSeparablePyramid",
    "AtrousSeparablePyramidBackward",
]
