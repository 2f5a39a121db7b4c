# SPDX-License-Identifier: BSD-3-Clause
"""What tests, benchmarks and :mod:`aspp_ext.verify` share.

An operator in ``OPS`` is run on every problem in ``PROBLEMS``, in every dtype, by every
implementation. Adding a line to either table enrols it everywhere.
"""

from .law import assert_no_worse_than_torch, nan_poison, why_worse_than_torch
from .operators import DTYPES, OPS, Op, converted, has_triton, outputs
from .oracle import oracle_of
from .problems import PROBLEMS, Branch, Problem, Values, laid_out

__all__ = [
    "DTYPES",
    "OPS",
    "PROBLEMS",
    "Branch",
    "Op",
    "Problem",
    "Values",
    "assert_no_worse_than_torch",
    "converted",
    "has_triton",
    "laid_out",
    "nan_poison",
    "oracle_of",
    "outputs",
    "why_worse_than_torch",
]
