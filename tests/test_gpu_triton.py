# SPDX-License-Identifier: BSD-3-Clause
"""What only Triton's kernels have to show: that they are compiled once, and all of them launched.

That their results are right, test_gpu*.py ask of them as of the CUDA kernels.
"""

from __future__ import annotations

import pytest
import torch
from gpu_cases import BY_TRITON, DEVICE, RUNS, each_run

from aspp_ext import _triton
from aspp_ext.testing import OPS, PROBLEMS
from aspp_ext.verify.rightness import REAL

triton = pytest.importorskip("triton")

from triton_mock import pretended  # noqa: E402
from triton_shapes import compilations, kernels, kinds, new_shapes  # noqa: E402

compiled = pytest.mark.skipif(_triton.interpreted, reason="Triton's kernels are interpreted")
STATISTICS = "atrous_pyramid_statistics"


@triton.jit
def nothing(x):
    pass


@pytest.mark.gpu
@pytest.mark.triton
def test_they_are_compiled() -> None:
    """And compilations are seen, so that none seen is none done."""
    assert _triton.missing is None
    assert not _triton.interpreted
    with compilations() as found:
        for _ in range(2):
            nothing[(1,)](torch.empty(1, device=DEVICE))
    assert len(found) == 1


@pytest.mark.gpu
@each_run(run for run in RUNS if run.by is BY_TRITON and run.name in BY_TRITON.operators)
def test_a_new_shape_compiles_nothing(run) -> None:
    op = OPS[run.name]
    for problem in kinds():
        run(*op.make(problem, run.dtype, device=DEVICE))
    with compilations() as found:
        for problem in new_shapes():
            run(*op.make(problem, run.dtype, device=DEVICE))
    assert not found


@pytest.mark.gpu
@each_run(run for run in RUNS if run.by is BY_TRITON and run.name == "pyramid")
def test_statistics_of_a_new_shape_compile_nothing(run) -> None:
    statistics = run.by.family.op(STATISTICS)
    for problem in kinds():
        statistics(*OPS["pyramid"].make(problem, run.dtype, device=DEVICE)[:3], run.tf32)
    with compilations() as found:
        for problem in new_shapes():
            statistics(*OPS["pyramid"].make(problem, run.dtype, device=DEVICE)[:3], run.tf32)
    assert not found


@compiled
@pytest.mark.prove
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_new_shapes_compile_nothing_on_a_pretended_gpu(dtype, monkeypatch) -> None:
    """The same without a GPU: the host code is the real one, and nothing is compiled."""
    monkeypatch.setattr(_triton, "interpreted", True)  # or it would refuse the CPU's tensors
    calls = [(name, BY_TRITON.results(name)) for name in BY_TRITON.operators]
    with pretended("sm_90"), compilations() as found:
        for problem in kinds():
            for name, call in calls:
                call(*OPS[name].make(problem, dtype))
            BY_TRITON.family.op(STATISTICS)(*OPS["pyramid"].make(problem, dtype)[:3])
        assert len(found) > len(calls)
        found.clear()
        for problem in new_shapes():
            for name, call in calls:
                call(*OPS[name].make(problem, dtype))
            BY_TRITON.family.op(STATISTICS)(*OPS["pyramid"].make(problem, dtype)[:3])
        assert not found


@compiled
@pytest.mark.prove
def test_what_is_verified_launches_every_kernel(monkeypatch) -> None:
    """On a pretended GPU: sums are cut into slices by how many processors there are."""
    monkeypatch.setattr(_triton, "interpreted", True)
    launched = set()
    for problem in (*PROBLEMS.values(), *REAL["cuda"]):
        with pretended("sm_90") as device:  # which keeps every launch's tensors
            for name in BY_TRITON.operators:
                BY_TRITON.results(name)(*OPS[name].make(problem, torch.bfloat16))
            if problem.shape[0] > 0:
                arguments = OPS["pyramid"].make(problem, torch.bfloat16)[:3]
                BY_TRITON.family.op(STATISTICS)(*arguments)
            launched |= {launch.kernel for launch in device.launches}
    assert launched == kernels()
