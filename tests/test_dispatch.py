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
from pretending import LAST, RESULT, Calls, on_cuda, pretend, pretend_a_gpu, problem, reasons
from torch._subclasses.fake_tensor import FakeTensorMode

import aspp_ext
from aspp_ext import _gpu, _native, verified
from aspp_ext.__main__ import describe_implementations, describe_verified
from aspp_ext.dispatch import Problem, select

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["implementation", "check", "result", "detail", "date"]
COLUMNS += ["torch", "cuda", "triton", "device", "architecture", "commit"]


@pytest.fixture
def pretended(monkeypatch):
    pretend_a_gpu(monkeypatch)
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


OPS = ["atrous_pyramid", "atrous_separable_pyramid", "aspp_inference"]
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
        proven.setattr(_gpu, "has_device", lambda: False)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pyramid_runs_as_itself(dtype, proven) -> None:
    x, w, shift = (on_cuda(*s, dtype=dtype) for s in ((2, 8, 9, 9), (4, 8, 3, 3), (4,)))
    with Calls() as calls:
        y = aspp_ext.atrous_pyramid(x, [w], [2], shift=shift, activation="relu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 9, 9), dtype, "cuda")
    tf32 = [True] if dtype == torch.float32 else []  # PyTorch's default for convolutions
    ((name, arguments),) = calls
    assert name == "atrous_pyramid"
    assert arguments[3:] == (None, shift, True, *tf32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_separable_pyramid_runs_as_itself(dtype, proven) -> None:
    sizes = ((2, 8, 9, 9), (8, 1, 3, 3), (4, 8, 1, 1), (4,))
    x, d, p, shift = (on_cuda(*s, dtype=dtype) for s in sizes)
    with Calls() as calls:
        y = aspp_ext.atrous_separable_conv2d(x, d, p, 2, shift=shift, activation="relu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 9, 9), dtype, "cuda")
    tf32 = [True] if dtype == torch.float32 else []
    ((name, arguments),) = calls
    assert name == "atrous_separable_pyramid"
    assert arguments[6:] == (False, None, shift, True, *tf32)


def test_a_head_with_branches_of_either_kind_runs_as_pyramids(proven) -> None:
    x, d = on_cuda(2, 8, 9, 9, **LAST), on_cuda(8, 1, 3, 3)
    p, w = on_cuda(4, 8, 1, 1, **LAST), on_cuda(4, 8, 3, 3, **LAST)
    separable, dense = "atrous_separable_pyramid", "atrous_pyramid"
    for depthwise, weights, names in (
        ([None, d], [p, p], [separable, dense]),
        ([None, d], [w, p], [dense, separable, dense]),
    ):
        rest = (on_cuda(8), None, None, on_cuda(5, 8), on_cuda(5))
        with Calls() as calls:
            y = aspp_ext.aspp_inference(x, depthwise, weights, [1, 2], *rest)
        assert (y.shape, calls.names) == ((2, 5, 9, 9), names)


def test_the_head_runs_as_two_pyramids(proven) -> None:
    x, w = on_cuda(2, 8, 9, 9, **LAST), on_cuda(4, 8, 3, 3, **LAST)
    rest = (on_cuda(4), None, None, on_cuda(5, 4), on_cuda(5))
    with Calls() as calls:
        y = aspp_ext.aspp_inference(x, [None], [w], [2], *rest)
    assert y.shape == (2, 5, 9, 9)
    assert y.is_contiguous(**LAST)
    assert calls.names == ["atrous_pyramid"] * 2
    assert [w.shape for _, c in calls for w in c[1]] == [(4, 8, 3, 3), (5, 4, 1, 1)]
    assert all(t.is_contiguous(**LAST) for _, c in calls for t in (c[0], *c[1]))


class Layer(torch.nn.Module):
    def __init__(self, separable: bool) -> None:
        super().__init__()
        self.depthwise = torch.nn.Parameter(on_cuda(8, 1, 3, 3)) if separable else None
        self.weight = torch.nn.Parameter(on_cuda(4, 8, *((1, 1) if separable else (3, 3))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.depthwise is None:
            return aspp_ext.atrous_pyramid(x, [self.weight], [2], activation="relu")
        step = aspp_ext.atrous_separable_conv2d
        return step(x, self.depthwise, self.weight, 2, activation="relu")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("separable", [True, False])
def test_the_choice_is_traced(separable, strict, pretended, fresh_compiler) -> None:
    """For any size: the limits of the kernels do not become limits of the program."""
    pretended.setitem(verified.VERIFIED, ("cuda", "sm_90"), RESULT)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = Layer(separable), on_cuda(2, 8, 9, 10)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,), strict=strict)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    name = "atrous_separable_pyramid" if separable else "atrous_pyramid"
    ours = [node for node in calls if "aspp_ext" in str(node.target)]
    assert [str(node.target) for node in ours] == [f"aspp_ext.{name}.default"]
    assert ours[0].args[-4:] == (None, None, True, True)


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


def test_explain_says_how_a_separable_forward_is_computed(device) -> None:
    """Where CUDA could run it."""
    x, d, p = on_cuda(1, 8, 9, 9), on_cuda(8, 1, 3, 3), on_cuda(4, 8, 1, 1)

    def said(x, d, p) -> list[str]:
        text = aspp_ext.explain(x, [p], [2], depthwise_weights=None if d is None else [d])
        return [line for line in text.splitlines() if line.startswith("  cuda    ")][1:]

    (line,) = said(x, d, p)
    assert line.startswith("  cuda    fused, ")
    (line,) = said(*(t.double() for t in (x, d, p)))
    assert line.startswith("  cuda    through memory: float64 ")
    assert not said(x, None, p)
    device.setattr(_native, "cuda_missing", "libaspp_cuda.so was not built")
    assert not said(x, d, p)


def test_the_report_lists_it(device) -> None:
    rows = dict(describe_implementations("cuda"))
    assert rows["atrous_pyramid: cuda"] == UNPROVEN
    assert rows["atrous_pyramid: reference"] == "can run"
    nowhere = "on no architecture yet: it runs where it is asked for by name"
    assert dict(describe_verified()) == {"cuda": nowhere, "triton": nowhere}
    device.setitem(verified.VERIFIED, ("cuda", "sm_90"), RESULT)
    assert dict(describe_implementations("cuda"))["aspp_inference: cuda"] == "can run"
    result = f"{RESULT.path}, commit {RESULT.commit}"
    assert dict(describe_verified()) == {"cuda on sm_90": result, "triton": nowhere}


DECIDING = {
    "cuda": ("csrc/cuda", "csrc/cuda/kernels", "csrc/cuda/ptx", "csrc/plan"),
    "triton": ("aspp_ext/triton", "csrc/plan", "csrc/plan_bindings.cpp"),
}


def digest_of_sources(implementation: str, root: Path = ROOT) -> str:
    """Of all that decides what runs on the device: kernels, bindings and planner."""
    digest = hashlib.sha256()
    for name in DECIDING[implementation]:
        place = root / name
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if path.is_file():
                digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def why_no_proof(
    result: verified.Result, implementation: str, architecture: str, root: Path = ROOT
) -> str | None:
    """What a record's file lacks, or None. Another implementation may have failed in the same."""
    if not re.fullmatch(r"benchmarks/results/[a-z0-9-]+-correctness\.csv", result.path):
        return "is not benchmarks/results/<device>-correctness.csv"
    if not (root / result.path).exists():
        return "does not exist"
    with (root / result.path).open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != COLUMNS:
        return f"has the columns {reader.fieldnames}"
    rows = [row for row in rows if row["implementation"] == implementation]
    if (checks := [row["check"] for row in rows]) != list(verified.PROOFS[implementation]):
        return f"has the checks {checks} of {implementation}"
    for row in rows:
        if row["result"] != "passed":
            return f"has {row['check']}: {row['result']}"
        if (row["architecture"], row["commit"]) != (architecture, result.commit):
            return f"has {row['check']} on {row['architecture']} at {row['commit']}"
    return None


def test_every_record_is_a_committed_file_in_which_all_passed() -> None:
    for (implementation, architecture), result in verified.VERIFIED.items():
        assert implementation in DECIDING
        assert why_no_proof(result, implementation, architecture) is None, result.path
        # Kernels that have changed since were not verified: run the checks again or drop the line.
        assert result.sources == digest_of_sources(implementation), result.path
        if (ROOT / ".git").exists():
            git = ["git", "-C", str(ROOT), "ls-files", "--error-unmatch", result.path]
            assert subprocess.run(git, capture_output=True).returncode == 0, result.path


CUDA_SOURCES = ("kernels/loaders.cuh", "ptx/mma.cuh", "params.h")
SOURCES = {
    "cuda": (*(f"csrc/cuda/{name}" for name in CUDA_SOURCES), "csrc/plan/units.cpp"),
    "triton": ("aspp_ext/triton/operators.py", "csrc/plan/units.cpp", "csrc/plan_bindings.cpp"),
}


@pytest.mark.parametrize("implementation", SOURCES)
def test_digest_follows_every_source(implementation, tmp_path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("csrc", "aspp_ext/triton"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    before = digest_of_sources(implementation, tmp_path)
    assert before == digest_of_sources(implementation)
    for name in SOURCES[implementation]:
        path = tmp_path / name
        path.write_bytes(path.read_bytes() + b" ")
        assert digest_of_sources(implementation, tmp_path) != before, name
        before = digest_of_sources(implementation, tmp_path)


def proofs(implementation: str, **changed: str) -> list[dict[str, str]]:
    """Its rows of a file in which all passed, or the last one with something else."""
    common = dict.fromkeys(COLUMNS, "") | {"implementation": implementation, "result": "passed"}
    common |= {"architecture": "sm_90", "commit": "abc1234"}
    rows = [common | {"check": check} for check in verified.PROOFS[implementation]]
    return [*rows[:-1], rows[-1] | changed]


CUDA, TRITON = proofs("cuda"), proofs("triton")
FAILED = proofs("triton", result="failed")
LAST_CHECK = TRITON[-1]["check"]
RECORDS = {
    "both": ([*CUDA, *TRITON], None),
    "alone": (TRITON, None),
    "the other failed": ([*proofs("cuda", result="failed"), *TRITON], None),
    "failed": ([*CUDA, *FAILED], f"has {LAST_CHECK}: failed"),
    "skipped": (proofs("triton", result="skipped"), f"has {LAST_CHECK}: skipped"),
    "device": (proofs("triton", architecture="sm_80"), f"has {LAST_CHECK} on sm_80 at abc1234"),
    "commit": (proofs("triton", commit="abc1234-dirty"),
        f"has {LAST_CHECK} on sm_90 at abc1234-dirty"),
    "one less": ([*CUDA, *TRITON[1:]],
        f"has the checks {[row['check'] for row in TRITON[1:]]} of triton"),
    "the other's alone": (CUDA, "has the checks [] of triton"),
    "empty": ([], "has the checks [] of triton"),
    "columns": ([{"check": "build", "result": "passed"}], "has the columns ['check', 'result']"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record_is_found(name, tmp_path) -> None:
    rows, expected = RECORDS[name]
    record = (RESULT, "triton", "sm_90", tmp_path)
    assert why_no_proof(*record) == "does not exist"
    path = tmp_path / RESULT.path
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert why_no_proof(*record) == expected
    elsewhere = RESULT._replace(path="results.csv")
    assert str(why_no_proof(elsewhere, *record[1:])).startswith("is not")


def test_every_implementation_with_kernels_of_its_own_has_proofs() -> None:
    assert set(verified.PROOFS) == set(DECIDING) == set(SOURCES)
