# SPDX-License-Identifier: BSD-3-Clause
"""Which kernels have passed every check on real hardware, and the committed result that says so.

A kernel runs by default only on the architectures listed here. ``scripts/gpu_check.sh`` writes the
results; a line is added here in the commit that adds its file.
"""

from __future__ import annotations

from typing import NamedTuple


class Result(NamedTuple):
    """A correctness file of the repository and the sources that it is about."""

    path: str  # benchmarks/results/<device>-correctness.csv
    commit: str
    sources: str  # tests/test_dispatch.py: digest_of_sources(), which finds a record gone stale


VERIFIED: dict[tuple[str, str], Result] = {}
"""(implementation, architecture like "sm_90") -> the result."""
