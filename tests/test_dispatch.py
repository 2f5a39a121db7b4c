# SPDX-License-Identifier: BSD-3-Clause
"""Who runs a call on CUDA, seen without a GPU: fake tensors, a pretended device and record."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import aspp_ext
from aspp_ext import _cuda, _native, dispatch, verified
from aspp_ext.__main__ import describe_implementations, describe_verified
from aspp_ext.dispatch import Problem, select

ROOT = Path(__file__).resolve().parents[1]
RESULT = verified.Result("benchmarks/results/a-correctness.csv", "abc1234", "0" * 16)
COLUMNS = ["check", "result", "detail", "date"]
COLUMNS += ["torch", "cuda", "triton", "device", "architecture", "commit"]


def pretend(monkeypatch, major: int, minor: int) -> None:
    """That every device has this compute capability."""
    monkeypatch.setattr(_cuda, "capability", lambda device: (major, minor))


@pytest.fixture
def pretended(monkeypatch):
    """A CUDA device of compute capability 9.0 and a loaded library, as far as Python can see."""
    monkeypatch.delenv("ASPP_EXT_BACKEND", raising=False)
    monkeypatch.setattr(_native, "cuda_missing", None)
    monkeypatch.setattr(_cuda, "has_device", lambda: True)
    pretend(monkeypatch, 9, 0)
    for key in list(verified.VERIFIED):
        monkeypatch.delitem(verified.VERIFIED, key)
    return monkeypatch


@pytest.fixture
def device(pretended):
    """The same with tensors on it."""
    with FakeTensorMode():
        yield pretended


@pytest.fixture
def proven(device):
    device.setitem(verified.VERIFIED, ("cuda", "sm_90"), RESULT)
    return device


def on_cuda(*shape: int, **keywords) -> torch.Tensor:
    return torch.empty(shape, device="cuda", **keywords)


def problem(op: str = "atrous_pyramid", shape=(2, 8, 9, 9), branches: int = 1) -> Problem:
    return Problem(op, on_cuda(*shape), (on_cuda(8, shape[1], 3, 3),) * branches)


def reasons(p: Problem) -> dict[str, str | None]:
    return {i.name: i.reason(p) for i in dispatch.IMPLEMENTATIONS[p.op]}


OPS = ["atrous_pyramid", "aspp_inference"]
UNPROVEN = (
    "no committed result verifies the CUDA kernels on sm_90 yet; backend='cuda' or "
    "ASPP_EXT_BACKEND=cuda runs them anyway"
)


@pytest.mark.parametrize("op", OPS)
def test_unproven_kernels_are_passed_by_but_can_be_named(op, device) -> None:
    assert reasons(problem(op))["cuda"] == UNPROVEN
    assert select(problem(op)).name == "reference"
    assert select(problem(op), "cuda").name == "cuda"
    device.setenv("ASPP_EXT_BACKEND", "cuda")
    assert select(problem(op)).name == "cuda"


@pytest.mark.parametrize("op", OPS)
def test_a_committed_result_makes_them_the_default(op, proven) -> None:
    assert reasons(problem(op))["cuda"] is None
    assert select(problem(op)).name == "cuda"
    assert select(problem(op), "reference").name == "reference"
    pretend(proven, 8, 9)
    assert "on sm_89 yet" in str(reasons(problem(op))["cuda"])
    assert select(problem(op)).name == "reference"


REFUSED = {
    "library": ("libaspp_cuda.so was not built", {}),
    "device": ("it runs on CUDA devices but x is on cpu", {}),
    "branches": ("branches go up to 64, got 65", {"branches": 65}),
    "pixels": ("pixels of the batch go up to 2147483647, got 2147483648",
        {"shape": (2**11, 3, 2**10, 2**10)}),
    "no device": ("there is no CUDA device to ask for its compute capability", {}),
    "capability": ("it needs compute capability 8.0, the device has 7.5", {}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("op", OPS)
def test_what_they_cannot_run_is_refused_in_words(op, why, proven) -> None:
    sentence, changed = REFUSED[why]
    call = problem(op, **changed)
    if why == "library":
        proven.setattr(_native, "cuda_missing", sentence)
    if why == "no device":
        proven.setattr(_cuda, "has_device", lambda: False)
    if why == "capability":
        pretend(proven, 7, 5)
    if why == "device":
        call = Problem(op, torch.empty(1, 2, 3, 4), (torch.empty(1, 2, 3, 3),))
    assert reasons(call)["cuda"] == sentence
    assert select(call).name == ("cpu" if why == "device" else "reference")
    with pytest.raises(RuntimeError) as refusal:
        select(call, "cuda")
    assert str(refusal.value) == f"{op}: backend 'cuda' cannot run this: {sentence}"


def test_the_limits_are_inclusive(proven) -> None:
    assert reasons(problem(branches=64))["cuda"] is None
    assert reasons(problem(shape=(1, 1, 1, 2**31 - 1)))["cuda"] is None


def test_separable_branches_stay_with_the_reference(proven) -> None:
    x, d, p = on_cuda(1, 8, 9, 9), on_cuda(8, 1, 3, 3), on_cuda(4, 8, 1, 1)
    for call in (
        Problem("atrous_separable_pyramid", x, (p,), (d,)),
        Problem("aspp_inference", x, (p, p), (d,)),
    ):
        assert "no CUDA kernels for separable branches" in str(reasons(call)["cuda"])
        assert select(call).name == "reference"
    y = aspp_ext.atrous_separable_conv2d(x, d, p, 2)
    assert (y.shape, y.device.type) == ((1, 4, 9, 9), "cuda")


class Calls(TorchDispatchMode):
    """Arguments of the operators of ours that run, with those that have their default left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aspp_ext":
            assert function._schema.name == "aspp_ext::atrous_pyramid"
            self.seen.append(args)
        return function(*args, **(kwargs or {}))


# Copies of fake CUDA tensors need a PyTorch with CUDA, hence tensors that are read in place.
LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pyramid_runs_as_itself(dtype, proven) -> None:
    x, w, shift = (on_cuda(*s, dtype=dtype) for s in ((2, 8, 9, 9), (4, 8, 3, 3), (4,)))
    with Calls() as calls:
        y = aspp_ext.atrous_pyramid(x, [w], [2], shift=shift, activation="relu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 9, 9), dtype, "cuda")
    tf32 = [True] if dtype == torch.float32 else []  # PyTorch's default for convolutions
    assert [list(c[3:]) for c in calls.seen] == [[None, shift, True, *tf32]]


def test_the_head_runs_as_two_pyramids(proven) -> None:
    x, w = on_cuda(2, 8, 9, 9, **LAST), on_cuda(4, 8, 3, 3, **LAST)
    rest = (on_cuda(4), None, None, on_cuda(5, 4), on_cuda(5))
    with Calls() as calls:
        y = aspp_ext.aspp_inference(x, [None], [w], [2], *rest)
    assert y.shape == (2, 5, 9, 9)
    assert y.is_contiguous(**LAST)
    assert len(calls.seen) == 2
    assert [w.shape for c in calls.seen for w in c[1]] == [(4, 8, 3, 3), (5, 4, 1, 1)]
    assert all(t.is_contiguous(**LAST) for c in calls.seen for t in (c[0], *c[1]))


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(on_cuda(4, 8, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return aspp_ext.atrous_pyramid(x, [self.weight], [2], activation="relu")


@pytest.mark.parametrize("strict", [True, False])
def test_the_choice_is_traced(strict, pretended, fresh_compiler) -> None:
    """For any size: the limits of the kernels do not become limits of the program."""
    pretended.setitem(verified.VERIFIED, ("cuda", "sm_90"), RESULT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = Layer(), on_cuda(2, 8, 9, 10)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,), strict=strict)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["aspp_ext.atrous_pyramid.default"]
    assert calls[0].args[2:] == ([2, 2], None, None, True, True)


LOADED = [
    (None, "13.0", "this PyTorch was built without CUDA"),
    ("12.8", "13.0", "libaspp_cuda.so is for CUDA 13.0 but this PyTorch has CUDA 12.8"),
    ("13.2", None, "libaspp_cuda.so was not built (see `python -m aspp_ext`)"),
]


@pytest.mark.parametrize(("torchs", "ours", "sentence"), LOADED)
def test_why_the_library_is_missing(torchs, ours, sentence, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ASPP_EXT_LIBRARY_DIR", str(tmp_path))
    (tmp_path / "_build_info.json").write_text(json.dumps({"cuda": ours}))
    monkeypatch.setattr(torch.version, "cuda", torchs)
    assert _native._load_cuda() == sentence


def test_explain_says_which_device_and_why(device, capsys) -> None:
    x, w = on_cuda(1, 8, 9, 9), on_cuda(8, 8, 3, 3)
    assert f"cuda       not unasked: {UNPROVEN}" in aspp_ext.explain(x, [w], [2])
    device.setenv("ASPP_EXT_BACKEND", "cuda")
    text = aspp_ext.explain(x, [w], [2])
    assert "runs this (sm_90, in TF32, not verified, but asked for by name)" in text
    device.setitem(verified.VERIFIED, ("cuda", "sm_90"), RESULT)
    text = aspp_ext.explain(x, [w], [2])
    assert f"runs this (sm_90, in TF32, verified by {RESULT.path})" in text


def test_the_report_lists_it(device) -> None:
    rows = dict(describe_implementations("cuda"))
    assert rows["atrous_pyramid: cuda"] == UNPROVEN
    assert rows["atrous_pyramid: reference"] == "can run"
    assert dict(describe_verified()) == {"cuda": "on no architecture yet: the reference runs there"}
    device.setitem(verified.VERIFIED, ("cuda", "sm_90"), RESULT)
    assert dict(describe_implementations("cuda"))["aspp_inference: cuda"] == "can run"
    (row,) = describe_verified()
    assert row == ("cuda on sm_90", f"{RESULT.path}, commit {RESULT.commit}")


def digest_of_sources(root: Path = ROOT) -> str:
    """Of all that decides what runs on the device: kernels, bindings and planner."""
    digest = hashlib.sha256()
    for folder in ("csrc/cuda", "csrc/cuda/kernels", "csrc/cuda/ptx", "csrc/plan"):
        for path in sorted((root / folder).iterdir()):
            if path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def why_no_proof(result: verified.Result, architecture: str, root: Path = ROOT) -> str | None:
    """What a record's file lacks, or None."""
    if not re.fullmatch(r"benchmarks/results/[a-z0-9-]+-correctness\.csv", result.path):
        return "is not benchmarks/results/<device>-correctness.csv"
    if not (root / result.path).exists():
        return "does not exist"
    with (root / result.path).open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != COLUMNS:
        return f"has the columns {reader.fieldnames}"
    if not rows:
        return "has no checks"
    for row in rows:
        if row["result"] != "passed":
            return f"has {row['check']}: {row['result']}"
        if (row["architecture"], row["commit"]) != (architecture, result.commit):
            return f"has {row['check']} on {row['architecture']} at {row['commit']}"
    return None


def test_every_record_is_a_committed_file_in_which_all_passed() -> None:
    for (implementation, architecture), result in verified.VERIFIED.items():
        assert implementation == "cuda"
        assert why_no_proof(result, architecture) is None, result.path
        # Kernels that have changed since were not verified: run the checks again or drop the line.
        assert result.sources == digest_of_sources(), result.path
        if (ROOT / ".git").exists():
            git = ["git", "-C", str(ROOT), "ls-files", "--error-unmatch", result.path]
            assert subprocess.run(git, capture_output=True).returncode == 0, result.path


def test_digest_follows_every_source(tmp_path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = digest_of_sources(tmp_path)
    assert before == digest_of_sources()
    for name in ("cuda/kernels/loaders.cuh", "cuda/ptx/mma.cuh", "cuda/params.h", "plan/units.cpp"):
        path = tmp_path / "csrc" / name
        path.write_bytes(path.read_bytes() + b" ")
        assert digest_of_sources(tmp_path) != before, name
        before = digest_of_sources(tmp_path)


GOOD = dict.fromkeys(COLUMNS, "") | {"check": "forward", "result": "passed"}
GOOD |= {"architecture": "sm_90", "commit": "abc1234"}
WRONG = {
    "none": ([GOOD], None),
    "failed": ([GOOD, GOOD | {"check": "gradients", "result": "failed"}], "has gradients: failed"),
    "skipped": ([GOOD | {"result": "skipped"}], "has forward: skipped"),
    "device": ([GOOD | {"architecture": "sm_80"}], "has forward on sm_80 at abc1234"),
    "commit": ([GOOD | {"commit": "abc1234-dirty"}], "has forward on sm_90 at abc1234-dirty"),
    "empty": ([], "has no checks"),
    "columns": ([{"check": "forward", "result": "passed"}], "has the columns ['check', 'result']"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_record_is_found(name, tmp_path) -> None:
    rows, expected = WRONG[name]
    assert why_no_proof(RESULT, "sm_90", tmp_path) == "does not exist"
    path = tmp_path / RESULT.path
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert why_no_proof(RESULT, "sm_90", tmp_path) == expected
    elsewhere = RESULT._replace(path="results.csv")
    assert str(why_no_proof(elsewhere, "sm_90", tmp_path)).startswith("is not")
