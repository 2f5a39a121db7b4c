# SPDX-License-Identifier: BSD-3-Clause
"""The programs that measure on a GPU, on tiny problems on the CPU."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aspp_ext.ops import separable_choice
from benchmarks import cudnn_baselines, machine, peers, report
from benchmarks.gpu import calls, counters, device, kernels, problems, run
from benchmarks.gpu import peers as gpu_peers

CPU = ["--device", "cpu"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Wrong(gpu_peers.Eager):
    """Off by a tenth in one element."""

    def __init__(self) -> None:
        super().__init__("NCHW", False)
        self.name, self.group = "planted", "other"

    def build(self, module, example):
        call = super().build(module, example)

        def planted():
            first, *others = call()
            first = first.clone()
            first.view(-1)[3] += 0.1
            return (first, *others)

        return planted


def test_a_wrong_result_is_refused_and_fails_the_run(tmp_path, monkeypatch):
    ready = [gpu_peers.Eager("NCHW", False), Wrong()]
    monkeypatch.setattr(run, "contenders", lambda device: ready)
    monkeypatch.setattr(run, "slow_contenders", lambda limit: [])
    options = [*CPU, "--out", str(tmp_path), "--budget", "0", "--only", "4x4 1/2/3, bfloat16"]
    assert run.main(options) == run.WRONG
    rows = {row.contender: row for row in report.read_csv(tmp_path / "dry-run.csv") if row.group}
    assert rows["planted"].p50_ms is None
    assert rows["planted"].note.startswith("wrong: result 0 may be off by")
    assert rows["eager NCHW"].p50_ms > 0


class Broken(gpu_peers.Ours):
    def build(self, module, example):
        raise RuntimeError("no registers left")


@pytest.mark.parametrize(
    ("ours", "status"),
    [
        ([gpu_peers.Ours("NHWC", "cuda"), gpu_peers.Ours("NHWC", "cpu")], 0),
        ([gpu_peers.Ours("NHWC", "cuda")], run.WRONG),
        ([Broken("NHWC", "cpu"), gpu_peers.Ours("NCHW", "cpu")], run.WRONG),
    ],
    ids=["one cannot", "none can", "one fails"],
)
def test_what_one_implementation_cannot_run_another_may(ours, status, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "contenders", lambda device: [*ours, gpu_peers.Eager("NCHW", False)])
    monkeypatch.setattr(run, "slow_contenders", lambda limit: [])
    options = [*CPU, "--out", str(tmp_path), "--budget", "0", "--only", "separable 2048->256 33x33"]
    assert run.main(options) == 2, "titles are those of the tiny problems"
    options[-1] = "operator: separable 32->32 4x4"
    assert run.main(options) == status
    rows = {row.contender: row for row in report.read_csv(tmp_path / "dry-run.csv") if row.group}
    assert len(rows) == len(ours) + 1
    first = rows[ours[0].name]
    assert first.p50_ms is None
    assert first.note


def test_what_no_time_is_left_for_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "slow_contenders", lambda limit: [gpu_peers.TensorRT(limit)])
    options = [*CPU, "--out", str(tmp_path), "--budget", "0", "--limit", "0"]
    assert run.main([*options, "--only", "4x4"]) == 0
    rows = [row for row in report.read_csv(tmp_path / "dry-run.csv") if row.group]
    assert {row.note for row in rows} == {run.OUT_OF_TIME}
    assert {row.contender for row in rows} >= {"aspp_ext cpu NCHW", "TensorRT"}


def test_a_timed_row_stays_where_the_second_time_is_cut(tmp_path):
    options = run.parse([*CPU, "--out", str(tmp_path), "--budget", "0"])
    console = SimpleNamespace(print=lambda *_: None)
    ours = run.Run(device.Host(), options, console)
    ours.measure_ceilings(["bfloat16"])
    problem = problems.for_a_dry_run(problems.PROBLEMS[0])
    eager = gpu_peers.Eager("NCHW", False)
    ours.one(problem, [eager], 1.0)
    first = ours.rows[problem.key]
    ours.end = 0.0
    ours.one(problem, [eager, gpu_peers.TensorRT(1.0)], 1.0)
    timed, left_out = ours.rows[problem.key]
    assert (timed, left_out.note) == (first[0], run.OUT_OF_TIME)


COUNTERS = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum"
"","","","byte","byte"
"0","7","pyramid<1>","1,000","24"
"1","7","transpose","10","0"
"2","7","pyramid<1>","500","1"
"3","7","at::cuda::spin_kernel(long)","7","7"
"4","7","gather_kernel","80","2"
"5","7","at::cuda::spin_kernel(long)","7","7"
==PROF== Disconnected
"""


def test_dram_bytes_are_read_from_the_counters():
    first, second = counters.parse_counters(COUNTERS)
    assert first == {"pyramid<1>": 1525.0, "transpose": 10.0}
    assert second == {"gather_kernel": 82.0}
    with pytest.raises(ValueError, match=r"no counters .* ERR_NVGPUCTRPERM"):
        counters.parse_counters("==ERROR== ERR_NVGPUCTRPERM")


def test_counted_calls_are_the_marked_ones(tmp_path, monkeypatch):
    """The profiler's own process runs them in order, a mark behind each."""
    profiler = tmp_path / "ncu"
    log = '"$(while [[ $1 != --log-file ]]; do shift; done; echo "$2")"'
    text = COUNTERS.replace("1,000", '"1000"').replace('""', '"')
    (tmp_path / "text").write_text(text)
    profiler.write_text(f'#!/usr/bin/env bash\ncp "{tmp_path}/text" {log}\n')
    profiler.chmod(0o755)
    monkeypatch.setattr(counters.shutil, "which", lambda name: str(profiler))
    named, _ = calls.calls(device.Host(), [problems.for_a_dry_run(problems.PROBLEMS[0])])
    moved = counters.count_traffic(named[:2], 60.0)
    assert list(moved) == named[:2]
    with pytest.raises(ValueError, match="2 of 3 calls were counted"):
        counters.count_traffic(named[:3], 60.0)


def test_traffic_is_compared_with_the_compulsory_bytes():
    large = problems.for_a_dry_run(problems.on_gpu("operator", "large"))
    forward, _, gradient, *_ = calls.calls(device.Host(), [large])[0]
    compulsory = forward.compulsory_bytes
    for share, verdict in ((1.25, "met"), (1.35, "above")):
        moved = {"pyramid": share * compulsory - 8.0, "transpose": 8.0}
        *_, total = kernels.traffic_rows([forward], {forward: moved})
        assert total["note"].startswith(f"{share} times the compulsory bytes")
        assert total["note"].endswith(verdict)
    *_, total = kernels.traffic_rows([gradient], {gradient: {"a": 2 * compulsory}})
    assert total["note"] == "2.00 times the compulsory bytes"


def test_without_a_profiler_nothing_is_counted(monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match=r"Nsight Compute \(ncu\) is not on the path"):
        counters.count_traffic([], 1.0)


def test_a_separable_backward_reads_more_than_a_forward():
    problem = problems.for_a_dry_run(problems.separable("operator", "large"))
    forward, _, backward = calls.calls(device.Host(), [problem])[0]
    pixels, weights = 8 * 9 * 9, 32 * 32 * 4 + 3 * 9 * 32
    assert forward.compulsory_bytes == 2 * (pixels * (32 + 4 * 32) + weights)
    assert backward.compulsory_bytes == 2 * (pixels * (2 * 32 + 4 * 32) + 2 * weights)


def test_a_separable_forward_of_cuda_is_timed_through_memory_too(monkeypatch):
    there = SimpleNamespace(backends=["cuda"])
    problem = problems.for_a_dry_run(problems.separable("operator", "large"))
    monkeypatch.setattr(calls.Ours, "why_not", lambda *_: None)
    named, absent = calls.calls(there, [problem])
    assert not absent
    (stored,) = (call for call in named if call.what == "forward separable NHWC, stored")
    assert stored.name == "cuda-forward-separable-NHWC-stored"
    seen = []
    monkeypatch.setattr(
        calls, "forward", lambda call: lambda: seen.append((call.what, separable_choice.way))
    )
    before = separable_choice.way
    stored.build()()
    assert seen == [("forward separable NHWC", "stored")]
    assert separable_choice.way == before


def test_the_breakdown_adds_up():
    names = iter([["a", "b", "a"], ["a", "b", "a"], ["a", "b", "a"]])
    there = SimpleNamespace(
        synchronize=lambda: None,
        kernels=lambda call: [device.Kernel(n, {"a": 2.0, "b": 4.0}[n]) for n in next(names)],
    )
    a, b = kernels.breakdown(there, lambda: None, lambda: None, 3)
    assert (a["kernel"], a["launches"], a["p50_us"], a["share"]) == ("a", 2, 4.0, 0.5)
    assert (b["kernel"], b["launches"], b["p50_us"], b["share"]) == ("b", 1, 4.0, 0.5)


def test_the_breakdown_names_every_call(tmp_path):
    assert kernels.main([*CPU, "--out", str(tmp_path), "--repeats", "2"]) == 0
    rows = read(tmp_path / "dry-run-kernels.csv")
    assert list(rows[0]) == list(kernels.COLUMNS)
    faces = ["forward NHWC", "forward NCHW", "grad_input NHWC", "grad_weight NHWC"]
    faces += [f"{what} separable NHWC" for what in ("forward", "backward")]
    faces += ["forward separable NCHW"]
    timed = {row["call"] for row in rows if row["implementation"] == "cpu"}
    assert timed == {*faces, *(f"{face}, DRAM" for face in faces)}
    absent = [row for row in rows if row["implementation"] == "triton"]
    assert [row["call"] for row in absent] == ["forward NHWC", "forward separable NHWC"]
    assert all(row["note"] for row in absent)
    assert kernels.main([*CPU, "--once", "cpu-forward-NHWC,cpu-grad_input-NHWC"]) == 0


def test_a_call_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch):
    def broken(call):
        raise RuntimeError("no registers left")

    def some(there, listed):
        good, *_ = calls.calls(there, listed[:1])[0]
        return [replace(good, what="forward broken", make=broken), good], []

    monkeypatch.setattr(kernels, "calls", some)
    assert kernels.main([*CPU, "--out", str(tmp_path), "--repeats", "1"]) == 1
    rows = read(tmp_path / "dry-run-kernels.csv")
    assert rows[0]["note"] == "failed: RuntimeError: no registers left"
    assert any(row["p50_us"] for row in rows)


def test_the_baselines_cover_what_is_asked():
    of = {name: list(cudnn_baselines.cases(name)) for name in cudnn_baselines.SECTIONS}
    assert [(c.rate, c.padded_before) for c in of["rates"]] == [
        (rate, padded) for rate in (1, 6, 12, 18, 24, 36, 60) for padded in (False, True)
    ]
    depthwise = {(c.layout, c.dtype, c.search, c.compiled) for c in of["depthwise"]}
    assert len(depthwise) == len(of["depthwise"]) == 2 * 3 * 2 * 2
    assert len(of["deterministic"]) == 2 * 2 * 2
    assert {c.data for c in of["data"]} == {"random", "zeros"}
    for name, cases in of.items():
        assert [c for group in cudnn_baselines.groups_of(name) for c in group] == cases


def test_a_padded_input_gives_the_same_convolution():
    plain = cudnn_baselines.for_a_dry_run(cudnn_baselines.Case("rates", 4, dtype="float32"))
    results = [
        cudnn_baselines.build(replace(plain, padded_before=padded), "cpu")()
        for padded in (False, True)
    ]
    assert results[0].shape == (2, 8, 9, 9)
    torch.testing.assert_close(*results)


def test_the_baselines_write_a_row_for_every_case(tmp_path):
    options = [*CPU, "--out", str(tmp_path), "--budget", "0"]
    assert cudnn_baselines.main([*options, "--only", "data", "--only", "deterministic"]) == 0
    rows = read(tmp_path / "dry-run-cudnn.csv")
    assert list(rows[0]) == cudnn_baselines.COLUMNS
    assert [row["section"] for row in rows] == ["data"] * 2 + ["deterministic"] * 8
    assert all(float(row["p50_ms"]) > 0 and "conv2d" in row["kernels"] for row in rows)
    assert cudnn_baselines.main([*options, "--limit", "0", "--only", "rates"]) == 0
    rows = read(tmp_path / "dry-run-cudnn.csv")
    assert {row["note"] for row in rows} == {cudnn_baselines.OUT_OF_TIME}


def test_a_case_that_fails_is_named():
    timed = cudnn_baselines.Timed(device.Host(), 0.0)
    good = cudnn_baselines.for_a_dry_run(cudnn_baselines.Case("data", 2, dtype="float32"))
    bad = replace(good, channels=7, groups=2)
    timed.together([good, bad])
    assert timed.results[good].p50_ms > 0
    assert timed.results[bad].note.startswith("failed: RuntimeError")


def test_the_commit_can_be_named(monkeypatch):
    monkeypatch.setenv("ASPP_EXT_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"
    assert machine.hyphenated("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_a_compiled_contender_is_right(fresh_compiler):
    problem = problems.for_a_dry_run(problems.on_gpu("operator", "single", "training"))
    module, x = problem.build()
    got = gpu_peers.Compiled("NHWC", 3600.0, mode=None).build(module, x)()
    expected = peers.eager_call(module, x)()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.1, rtol=0.1)
