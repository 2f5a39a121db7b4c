# SPDX-License-Identifier: BSD-3-Clause
"""The GPU benchmarks' own machinery, on the CPU or on a stand-in for a CUDA device."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

from aspp_ext.testing import timing
from benchmarks import report
from benchmarks.gpu import ceilings, device, problems, run
from benchmarks.gpu import peers as gpu_peers

CPU = ["--device", "cpu"]


class Events:
    """A stand-in for torch.cuda: every call takes `device_s`, and what is done is written down."""

    def __init__(self, device_s: float) -> None:
        self.done: list[str] = []
        self.device_s = device_s
        self.allocated = iter((100, 700))
        events = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                events.done.append("record")

            def synchronize(self) -> None:
                events.done.append("wait")

            def elapsed_time(self, stop: Event) -> float:
                return 1e3 * events.device_s

        self.Event = Event

    def __getattr__(self, name: str):
        if name in ("memory_allocated", "max_memory_allocated"):
            return lambda: next(self.allocated)
        return lambda *arguments: self.done.append(" ".join([name, *map(str, arguments)]))


@pytest.fixture
def cuda(monkeypatch) -> tuple[device.Cuda, Events]:
    events = Events(0.003)
    monkeypatch.setattr(torch, "cuda", events)
    there = device.Cuda.__new__(device.Cuda)
    there.by_events = timing.CudaStopwatch()
    return there, events


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    backends = torch.backends
    before = backends.cudnn.benchmark, backends.cudnn.deterministic
    yield
    backends.cudnn.benchmark, backends.cudnn.deterministic = before


# The device


def test_device_time_is_between_the_events_and_host_time_by_the_clock(cuda):
    there, events = cuda

    def call():
        events.done.append("call")
        time.sleep(0.01)

    seconds, host = there.stopwatch(call)
    assert seconds == pytest.approx(0.003)
    assert host >= 0.01
    assert events.done == ["_sleep 6000000", "record", "call", "record", "wait"]
    there.stopwatch(call)
    lead = int(events.done[5].split()[1]) / 2e9
    assert lead >= 1.5 * 0.01, "the host needs that long to queue the call"
    assert lead <= there.by_events.LONGEST_LEAD_S


def test_peak_memory_is_that_of_the_call_alone(cuda):
    there, events = cuda
    assert there.peak_bytes(lambda: events.done.append("call")) == 600
    assert events.done == ["synchronize", "reset_peak_memory_stats", "call", "synchronize"]


def test_both_times_reach_the_results():
    ticks = iter([(0.5, 0.25), (1.0, 0.5), (3.0, 1.5), (2.0, 1.0)])
    timings = timing.interleave(
        {"a": lambda: None},
        budget_s=0.0,
        least_rounds=3,
        most_rounds=3,
        settle_s=0.0,
        stopwatch=lambda call: next(ticks),
    )
    assert timings["a"].samples == (1.0, 3.0, 2.0)
    assert timings["a"].host_ms == pytest.approx(1000.0)


def test_launches_come_from_the_trace_in_order():
    arguments = {"grid": [132, 1, 1], "block": [256, 1, 1], "registers per thread": 200}
    events = [
        {"cat": "kernel", "name": "second", "ts": 5.0, "dur": 2.0, "args": arguments},
        {"cat": "cpu_op", "name": "aten::conv2d", "ts": 0.0, "dur": 9.0},
        {"cat": "gpu_memset", "name": "first", "ts": 1.0, "dur": 1.0, "args": {}},
        {"name": "no category"},
    ]
    found = device.launches(events, ["kernel", "gpu_memset"])
    assert [kernel.name for kernel in found] == ["first", "second"]
    assert found[1] == device.Kernel("second", 2.0, "132x1x1", "256x1x1", 200, 0)


def test_without_a_device_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="PyTorch sees none here"):
        device.device_named("cuda")


# Contenders


def test_a_time_limit_stops_what_takes_longer():
    with pytest.raises(TimeoutError, match="took more than 0 s"), gpu_peers.time_limit(0.05):
        time.sleep(3600)
    with gpu_peers.time_limit(3600):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_each_contender_sets_the_search(monkeypatch):
    problem = problems.for_a_dry_run(problems.PROBLEMS[0])
    module, x = problem.build()
    for contender in gpu_peers.contenders(device.Host()):
        if contender.why_not(problem) is not None:
            continue
        torch.backends.cudnn.benchmark = seen = not getattr(contender, "benchmark", True)
        contender.build(module, x)()
        assert torch.backends.cudnn.benchmark is not seen, contender.name


def test_one_implementation_is_forced_and_no_other(monkeypatch):
    monkeypatch.setenv(gpu_peers.BACKEND, "reference")
    module, x = problems.for_a_dry_run(problems.PROBLEMS[0]).build()
    with pytest.raises(ValueError, match="backend must be one of"):
        gpu_peers.Ours("NHWC", "nobody").build(module, x)()
    assert os.environ[gpu_peers.BACKEND] == "reference"
    monkeypatch.delenv(gpu_peers.BACKEND)
    gpu_peers.Ours("NHWC", "cpu").build(module, x)()
    assert gpu_peers.BACKEND not in os.environ


@pytest.mark.parametrize("head", ["dense", "separable"])
def test_what_an_implementation_cannot_run_is_said(head, monkeypatch):
    problem = problems.for_a_dry_run(problems.on_gpu("module", "large", head=head))
    reasons = {
        contender.name: contender.why_not(problem)
        for contender in gpu_peers.contenders(device.Host())
        if contender.group == "ours"
    }
    assert list(reasons) == [
        f"aspp_ext {backend} {layout}"
        for backend in ("cpu", "triton")
        for layout in ("NCHW", "NHWC")
    ]
    assert reasons["aspp_ext cpu NHWC"] is None
    assert reasons["aspp_ext triton NHWC"]
    assert "CUDA" in str(gpu_peers.Ours("NHWC", "cuda").why_not(problem))


def test_float32_is_rounded_only_where_it_is_said():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    for name, expected in (("tf32", True), ("float32", False)):
        with ceilings.products_in(name):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (expected, expected)
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before


# Problems and targets


def test_every_target_is_among_the_problems():
    assert {target.problem for target in problems.TARGETS} <= set(problems.PROBLEMS)
    keys = {problem.key for problem in problems.PROBLEMS}
    small = {problems.for_a_dry_run(problem).key for problem in problems.PROBLEMS}
    timed = {f"aspp_ext {backend}" for backend in device.Cuda.backends}
    assert {target.contender for target in problems.TARGETS} == timed
    assert len(keys) == len(small) == len(problems.PROBLEMS)


def test_a_step_of_the_operator_has_neither_bias_nor_relu():
    problem = problems.for_a_dry_run(problems.on_gpu("operator", "large", "training"))
    module, x = problem.build()
    assert all(conv.bias is None for conv in module.dense)
    assert (module(x) < 0).any()
    _, *gradients = gpu_peers.Ours("NHWC", "cpu").build(module, x)()
    assert [g.shape for g in gradients] == [x.shape, *(p.shape for p in module.parameters())]


def test_own_bytes_are_input_and_parameters():
    problem = problems.for_a_dry_run(problems.on_gpu("operator", "large", "training"))
    elements = 8 * 32 * 9 * 9 + 32 * 32 * (1 + 3 * 9)
    assert run.own_bytes(problem) == 2 * elements


def test_memory_has_to_stay_below_its_target():
    target = next(t for t in problems.TARGETS if t.against == "memory")
    level, problem, dtype, mode = target.problem.key
    facts = {**device.Host().facts(), "level": level, "problem": problem}
    facts |= {"dtype": dtype, "mode": mode}

    def rows(ours: float) -> list[report.Row]:
        own = {"aspp_ext cuda NCHW": 999.0, "aspp_ext cuda NHWC": ours, "aspp_ext triton NHWC": 1.0}
        peaks = {**own, "eager NCHW": 120.0, "eager NHWC": 100.0}
        return [
            report.Row(
                **facts,
                contender=name,
                group="ours" if name in own else "pytorch",
                peak_mib=peak,
            )
            for name, peak in peaks.items()
        ]

    for ours, text in ((60.0, "met"), (61.0, "above")):
        (verdict,) = report.verdicts(rows(ours), [target])
        assert verdict.got == pytest.approx(ours / 100.0)
        assert verdict.text == text
    (verdict,) = report.verdicts([], [target])
    assert verdict.text == "not measured"


def test_a_target_is_about_one_contender_and_may_name_its_rival():
    problem = problems.separable("operator", "large")
    level, name, dtype, mode = problem.key
    facts = {**device.Host().facts(), "level": level, "problem": name, "dtype": dtype, "mode": mode}
    times = {
        "aspp_ext cuda NHWC": 2.0,
        "aspp_ext triton NCHW": 6.0,
        "aspp_ext triton NHWC": 4.0,
        "eager NCHW": 12.0,
        "eager NCHW, search": 10.0,
        "eager NHWC": 5.0,
    }
    rows = [
        report.Row(
            **facts,
            contender=contender,
            group="ours" if contender.startswith("aspp_ext") else "pytorch",
            p50_ms=time_ms,
            vs_best_pytorch=5.0 / time_ms,
        )
        for contender, time_ms in times.items()
    ]
    targets = [target for target in problems.TARGETS if target.problem == problem]
    verdicts = report.verdicts(rows, targets)
    got = [(v.target.contender[9:], v.target.against, v.got, v.text) for v in verdicts]
    assert got == [
        ("cuda", "pytorch", 2.5, "met"),
        ("cuda", "eager NCHW", 5.0, "met"),
        ("cuda", "memory", None, "not measured"),
        ("triton", "pytorch", 1.25, "short"),
        ("triton", "eager NCHW", 2.5, "met"),
    ]
    without = [row for row in rows if not row.contender.startswith("eager NCHW")]
    assert [v.got for v in report.verdicts(without, targets)] == [2.5, None, None, 1.25, None]
    assert report.target_table(rows, targets).row_count == len(targets)
