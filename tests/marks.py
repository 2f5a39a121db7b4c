# SPDX-License-Identifier: BSD-3-Clause
"""Where a test runs: the markers that ``selection.py`` obeys, by the names that tests use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from selection import ALL_KERNELS

on_all = pytest.mark.kernels(*ALL_KERNELS)
on_native = pytest.mark.kernels("cpu", "emulated")
on_cpu, on_emulated, on_interpreted = (pytest.mark.kernels(name) for name in ALL_KERNELS)
on_what_has_heads = pytest.mark.kernels("cpu", "interpreted")
"""Emulated, the whole head is composed of pyramids, or the CPU's own."""

proven_emulated, proven_interpreted = (pytest.mark.prove(name) for name in ALL_KERNELS[1:])
"""In ``make test`` the CPU's kernels are enough: others take seconds for what these do in none."""

varied = pytest.mark.settings("filtered", "unfiltered", "threads")
"""Holds whichever way the CPU's pyramids go, by any number of threads."""
sanitized, stored = (pytest.mark.settings(name) for name in ("sanitized", "stored"))


def quick_emulated(when: Callable[..., bool] | None = None) -> pytest.MarkDecorator:
    return pytest.mark.quick("emulated", when=when)


def quick_interpreted(when: Callable[..., bool] | None = None) -> pytest.MarkDecorator:
    return pytest.mark.quick("interpreted", when=when)


def marks_of(op_name: str) -> list[pytest.MarkDecorator]:
    """Of a parameter that is an operator of ``OPS``."""
    if op_name.startswith("head"):
        return [on_what_has_heads]
    forward = op_name.startswith("separable") and "backward" not in op_name
    return [stored] if forward else []
