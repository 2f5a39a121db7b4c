# SPDX-License-Identifier: BSD-3-Clause
"""Which kernels have passed every check on real hardware, and the committed result that says so.

A kernel runs by default only on the architectures listed here. ``scripts/gpu_check.sh`` writes the
results; a line is added here in the commit that adds its file.
"""

from __future__ import annotations

from typing import NamedTuple

PROOFS: dict[str, tuple[str, ...]] = {
    "cuda": (
        *("build", "instructions", "tests"),
        *("memcheck", "racecheck", "synccheck", "initcheck"),
    ),
    "triton": ("build", "triton", "triton_memcheck", "triton_initcheck"),
}
"""implementation -> the steps of ``scripts/gpu_check.sh`` that all have to pass. One run proves, or
does not prove, each of them."""


class Result(NamedTuple):
    """A correctness file of the repository and an implementation's sources that it is about."""

    path: str  # benchmarks/results/<device>-correctness.csv
    commit: str
    sources: str  # tests/test_dispatch.py: digest_of_sources(), which finds a record gone stale


VERIFIED: dict[tuple[str, str], Result] = {}
"""(implementation, architecture like "sm_90") -> the result."""


def unproven(implementation: str, title: str, architecture: str) -> str | None:
    """The reason not to choose an implementation's kernels unasked, or None.

    Args:
        title: what a sentence calls the implementation.
    """
    if (implementation, architecture) in VERIFIED:
        return None
    return (
        f"no committed result verifies the {title} kernels on {architecture} yet; "
        f"backend='{implementation}' or ASPP_EXT_BACKEND={implementation} runs them anyway"
    )
