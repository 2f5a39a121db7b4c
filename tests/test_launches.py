# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA host code does to the runtime, and the transposes around it, under emulation."""

from __future__ import annotations

import programs
from planted_faults import check_passes, each_variant, plain_is_quick

EVERY_SHAPE = [
    "every_launch_is_legal_and_the_second_call_only_launches",
    "every_fused_launch_is_legal_and_asked_for",
    "the_fused_kernel_is_refused_in_words_where_it_cannot_run",
]
CACHE = [
    "a_plan_is_made_once_on_a_stream_of_its_own",
    "the_plan_used_longest_ago_goes_first",
    "half_of_the_plans_go_at_once",
    "room_is_made_once_for_a_plan",
    "a_plan_can_be_made_while_a_stream_is_captured_and_is_then_kept",
    "another_threads_capture_is_left_alone",
    "every_device_has_its_own_plans",
    "what_is_refused_leaves_the_cache_as_it_was",
    "threads_share_one_cache",
    "no_work_no_launch",
]


def test_every_launch() -> None:
    check_passes(programs.ready("launches"), *EVERY_SHAPE)


@plain_is_quick
@each_variant
def test_plan_cache(variant) -> None:
    check_passes(programs.ready("launches", variant), *CACHE)


def test_every_test_of_the_program_runs() -> None:
    text = (programs.ROOT / "tests/emulation/launches.cpp").read_text()
    assert text.count("\nTEST(") == len(CACHE) + len(EVERY_SHAPE)


@plain_is_quick
@each_variant
def test_transpose(variant) -> None:
    names = ["four_bytes"] if variant == "thread" else []  # the slowest of the three
    check_passes(programs.ready("transpose", variant), *names, ASPP_EMULATE_SEED="3")
