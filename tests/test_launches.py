# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA host code does to the runtime, and the transposes around it, under emulation."""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest

KERNELS = "csrc/cuda/kernels/*.cu"
HOST = ("csrc/plan/*.cpp", "csrc/cuda/plan_cache.cpp")
EVERY_SHAPE = [
    "every_launch_is_legal_and_the_second_call_only_launches",
    "every_fused_launch_is_legal_and_asked_for",
    "the_fused_kernel_is_refused_in_words_where_it_cannot_run",
]
CACHE = [
    "a_plan_is_made_once_on_a_stream_of_its_own",
    "the_plan_used_longest_ago_goes_first",
    "a_plan_can_be_made_while_a_stream_is_captured_and_is_then_kept",
    "another_threads_capture_is_left_alone",
    "every_device_has_its_own_plans",
    "what_is_refused_leaves_the_cache_as_it_was",
    "threads_share_one_cache",
    "no_work_no_launch",
]


@pytest.fixture(scope="module")
def launches() -> dict[str, Path]:
    variants = list(emulated.VARIANTS)
    return emulated.build("launches", variants, *HOST, "csrc/cuda/prepare.cpp", KERNELS)


@pytest.fixture(scope="module")
def transpose() -> dict[str, Path]:
    kernel = "csrc/cuda/kernels/transpose_sm80.cu"
    return emulated.build("transpose", list(emulated.VARIANTS), kernel)


def check(program: Path, *names: str, **variables: str) -> None:
    ran = emulated.run(program, *names, **variables)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]


def test_every_launch(launches) -> None:
    check(launches["plain"], *EVERY_SHAPE)


@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_plan_cache(launches, variant) -> None:
    check(launches[variant], *CACHE)


def test_every_test_of_the_program_runs() -> None:
    text = (emulated.ROOT / "tests/emulation/launches.cpp").read_text()
    assert text.count("\nTEST(") == len(CACHE) + len(EVERY_SHAPE)


@pytest.mark.parametrize("variant", emulated.VARIANTS)
def test_transpose(transpose, variant) -> None:
    names = ["four_bytes"] if variant == "thread" else []  # the slowest of the three
    check(transpose[variant], *names, ASPP_EMULATE_SEED="3")
