# SPDX-License-Identifier: BSD-3-Clause
"""Threads and processes: the same bits on one thread and two, from many threads, after a fork."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from marks import on_native, proven_emulated, quick_emulated

from aspp_ext.testing import OPS, PROBLEMS, outputs

pytestmark = [proven_emulated, on_native, pytest.mark.settings("filtered", "unfiltered")]

BUSY = ["aspp", "many_chunks", "row_windows_batch", "seven_branches"]
# Where dense gradients are not filtered minimally they are oneDNN's, which divides its sums among
# the threads there are.
ONEDNN = ("pyramid_grad_input", "pyramid_grad_weight")


@quick_emulated(lambda name, dtype: (name, dtype) == ("pyramid", torch.bfloat16))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_two_threads_and_repetition_give_the_same_bits(name, dtype) -> None:
    op = OPS[name]
    for problem in PROBLEMS.values():
        if dtype == torch.bfloat16 and problem.name not in BUSY:
            continue
        arguments = op.make(problem, dtype)
        results = []
        for threads in (2, 2) if name in ONEDNN else (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs(op.native(*arguments)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other)), problem.name


@pytest.mark.parametrize("name", OPS)
def test_called_from_eight_threads(name) -> None:
    """Scratch belongs to a thread, so that callers do not see each other's."""
    op = OPS[name]
    work = [op.make(PROBLEMS[name], torch.float32) for name in BUSY]
    expected = [outputs(op.native(*arguments)) for arguments in work]
    wrong: list[str] = []
    start = threading.Barrier(8)

    def caller(k: int) -> None:
        torch.set_num_threads(1 if name in ONEDNN else 1 + k % 2)
        start.wait()
        for i in range(6):
            at = (i + k) % len(work)
            if not all(map(torch.equal, outputs(op.native(*work[at])), expected[at])):
                wrong.append(f"thread {k}, {BUSY[at]}")

    threads = [threading.Thread(target=caller, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_fork_after_use() -> None:
    """As a data loader does; a child of PyTorch's pool has one thread."""
    op = OPS["separable_between_epilogue"]
    arguments = op.make(PROBLEMS["many_chunks"], torch.float32)
    torch.set_num_threads(2)
    expected = op.native(*arguments)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(op.native(*arguments), expected) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(op.native(*arguments), expected)
