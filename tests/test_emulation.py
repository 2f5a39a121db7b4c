# SPDX-License-Identifier: BSD-3-Clause
"""The emulation that stands for a GPU: its twins, its model of blocks and of the runtime, and that
it notices each kind of fault a kernel can have, by the means meant for it."""

from __future__ import annotations

import re

import programs
import pytest
from planted_faults import plain_is_quick

VARIANTS = list(programs.VARIANTS)

SILENT, WRONG = 0, 3  # what faults.cpp ends with where results are right, and where not
RACE = r"WARNING: ThreadSanitizer: data race"
OVERRUN = r"ERROR: AddressSanitizer: heap-buffer-overflow"

# fault: what a plain build says or ends with, what AddressSanitizer says, what ThreadSanitizer says
FAULTS = {
    "missing_barrier": (WRONG, None, RACE),
    "missing_second_barrier": (WRONG, None, RACE),
    "missing_warp_barrier": (WRONG, None, RACE),
    "missing_second_warp_barrier": (WRONG, None, RACE),
    "shuffle_is_no_barrier": (SILENT, None, RACE),
    "missing_wait": (WRONG, None, RACE),
    "missing_barrier_after_wait": (WRONG, None, RACE),
    "overwritten_stage": (WRONG, None, RACE),
    "missing_fence_before": (SILENT, None, RACE),
    "missing_fence_after": (SILENT, None, RACE),
    "two_blocks_write": (SILENT, None, RACE),
    "copy_beyond_global": (SILENT, OVERRUN, None),
    "read_beyond_global": (SILENT, OVERRUN, None),
    "read_beyond_shared": (SILENT, OVERRUN, None),
    "write_beyond_shared": (r"behind its 2048 bytes of shared memory", OVERRUN, None),
    "copy_beyond_shared": (r"cp_async_16: \w+ is not in the block's 2032 bytes", None, None),
    "matrix_in_global": (r"ldmatrix_x4: \w+ is not in the block's 2048 bytes", None, None),
    "not_committed": (r"ends with 1 cp.async copies not committed", None, None),
    "never_awaited": (r"ends with 1 cp.async copies committed but not waited for", None, None),
    "copy_from_misaligned": (r"cp_async_16: \w+ is not a multiple of 16 bytes", None, None),
    "read_unwritten": (r"load: reads 4 bytes at byte 2044 of 2048, and nothing", None, None),
    "read_unwritten_chunk": (r"load_chunk: reads 16 bytes at byte 2032 of 2048", None, None),
    "read_unwritten_past_l1": (r"load_volatile: .*, and nothing has written byte 2032", None, None),
    "copy_unwritten": (r"cp_async_16: .*, and nothing has written byte 2032", None, None),
    "count_on_unwritten": (r"atomic: .*, and nothing has written byte 2032", None, None),
    "misaligned_store": (r"store_chunk: \w+ is not a multiple of 16 bytes", None, None),
    "misaligned_matrix": (r"ldmatrix_x4: \w+ is not a multiple of 16 bytes", None, None),
    "ends_before_barrier": (r"thread .*: (ends while|sync_block waits for)", None, None),
    "half_at_barrier": (
        r"deadlock, .*: 64 of 128 wait at sync_block, such as .*; lanes ffff0000 of warp 0 wait",
        None,
        None,
    ),
    "missing_lane": (
        r"thread \(35, 0, 0\): ends while|waits for the whole warp, of which lanes 00000008",
        None,
        None,
    ),
    "mixed_operations": (r"mma_m16n8k16_b?f16, while lanes \w+ of the warp wait in", None, None),
    "partial_warp": (r"shuffle needs 32 lanes, this warp has only 000000ff", None, None),
    "outside_kernel": (r"sync_block outside a kernel", None, None),
    "launch_inside": (r"a launch inside a kernel", None, None),
}


SANITIZED_TOO = ("never_awaited", "half_at_barrier")

MODELS = [
    (name, variant)
    for name in ("twins", "execution", "runtime")
    for variant in programs.PROGRAMS[name].variants
]


@plain_is_quick
@pytest.mark.parametrize(("name", "variant"), MODELS)
def test_model(name, variant) -> None:
    ran = programs.run(programs.ready(name, variant), ASAN_OPTIONS="detect_leaks=1")
    assert ran.returncode == 0, ran.stdout + ran.stderr


@plain_is_quick
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_without_their_faults_pass(variant) -> None:
    ran = programs.run(programs.ready("faults", variant), "right")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert set(ran.stdout.split()) == set(FAULTS)


def expectations() -> dict[tuple[str, str], str | int]:
    """What a plain build notices, a sanitized one notices too, most of which need not be run."""
    result = {}
    for fault, (plain, address, thread) in FAULTS.items():
        result[fault, "plain"] = plain
        for variant, own in (("address", address), ("thread", thread)):
            if own or fault in SANITIZED_TOO:
                result[fault, variant] = own or plain
    return result


@plain_is_quick
@pytest.mark.parametrize(("fault", "variant"), expectations())
def test_fault_is_noticed(fault, variant) -> None:
    expected = expectations()[fault, variant]
    ran = programs.run(programs.ready("faults", variant), fault)
    if expected in (SILENT, WRONG):
        assert ran.returncode == expected, ran.stderr
        return
    assert ran.returncode not in (SILENT, WRONG), ran.stdout
    assert re.search(expected, ran.stderr), ran.stderr
    if expected in (RACE, OVERRUN):
        assert "faults.cpp" in ran.stderr  # the kernel's line is named
