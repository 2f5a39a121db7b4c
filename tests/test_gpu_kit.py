# SPDX-License-Identifier: BSD-3-Clause
"""scripts/gpu_check.sh, what it calls, and dry runs of the GPU's benchmarks."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import setuptools
import torch

from aspp_ext.evidence import entry
from scripts import build_for_gpu, compare_instructions

ROOT = Path(__file__).resolve().parents[1]
CHECK, INSTRUCTIONS = ROOT / "scripts/gpu_check.sh", ROOT / "scripts/check_instructions.sh"


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
    path.chmod(0o755)
    return path


def check(
    out: Path, *options: str, python: str | Path = sys.executable, path: Path | None = None
) -> tuple[int, str]:
    """Runs it; programs in the folder ``path`` are found first."""
    environment = {**os.environ, "PYTHON": str(python)}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    argv = ["bash", str(CHECK), *options, str(out)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def pretended(tmp_path: Path, verify: str, loads: str = "true", builds: str = "true") -> Path:
    """A Python that runs these lines for what the script asks of it, on a machine with a GPU, and
    writes down what that was."""
    for program in ("nvidia-smi", "nvcc"):
        script(tmp_path / program, f"echo a pretended {program}")
    return script(
        tmp_path / "python",
        f'echo "$*" >>"{tmp_path}/asked"',
        'case "$*" in',
        f"  *_native*) {loads} ;;",
        f"  *build_for_gpu*) {builds} ;;",
        f"  *verify*) {verify} ;;",
        "esac",
    )


@pytest.mark.parametrize("path", [CHECK, INSTRUCTIONS], ids=lambda p: p.name)
def test_the_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.read_text().splitlines()[1] == "# SPDX-License-Identifier: BSD-3-Clause"
    assert max(map(len, path.read_text().splitlines())) <= 100


def test_a_dry_run(tmp_path):
    """However far it comes in its time."""
    options = ["--device", "cpu", "--quick", "--only", "aspp_inference", "--budget", "2"]
    status, text = check(tmp_path, *options)
    assert status == 0, text
    assert f"torch {torch.__version__}" in text
    assert (tmp_path / "gpu_check.log").read_text() in text
    table = json.loads((tmp_path / "verify.json").read_text())
    assert table["device"] == "cpu"
    assert {row["operator"] for row in table["verdicts"]} == {"aspp_inference"}
    written = entry.parse((tmp_path / "entry.json").read_text())
    assert written.environment.device == table["environment"]["device"]


def test_what_verify_is_asked(tmp_path):
    python = pretended(tmp_path, "true")
    out = tmp_path / "out"
    status, text = check(out, "--budget", "20", "--again", python=python, path=tmp_path)
    assert status == 0, text
    assert "a pretended nvidia-smi" in text
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-1] == (
        "-m aspp_ext verify --device cuda --budget 300 --budget 20 --again "
        f"--json {out}/verify.json --export {out}/entry.json"
    )
    assert not any("build_for_gpu" in line for line in asked), "what loads is not built again"


@pytest.mark.parametrize(
    ("verify", "loads", "builds", "expected"),
    [
        ("exit 0", "true", "exit 7", 0),
        ("exit 1", "true", "true", 1),
        ("exit 2", "false", "exit 7", 2),
        ("exit 0", "false", "exit 7", 1),
        ("exit 0", "false", "true", 1),  # built, and it does not load
    ],
)
def test_the_status_is_that_of_verify_and_of_the_build(verify, loads, builds, expected, tmp_path):
    python = pretended(tmp_path, verify, loads, builds)
    status, text = check(tmp_path / "out", python=python, path=tmp_path)
    assert status == expected, text
    assert "verify" in (tmp_path / "asked").read_text(), "Triton's kernels need no build"


def test_a_library_that_does_not_load_is_built(tmp_path):
    loads, builds = f'[[ -e "{tmp_path}/built" ]]', f'touch "{tmp_path}/built"'
    python = pretended(tmp_path, "true", loads, builds)
    status, text = check(tmp_path / "out", python=python, path=tmp_path)
    assert status == 0, text
    assert (tmp_path / "built").exists()


def test_pages_of_failures_come_back_in_one_file(tmp_path):
    """And go with the store that the next run goes on from."""
    failures = "$ASPP_EXT_VERIFIED/failures/a-gpu"
    lines = f'mkdir -p "{failures}"; echo journal >"$ASPP_EXT_VERIFIED/a-gpu.jsonl"'
    lines += f'; for page in one two; do echo "$page" >"{failures}/$page.txt"; done; exit 1'
    python, out = pretended(tmp_path, lines), tmp_path / "out"
    status, text = check(out, python=python, path=tmp_path)
    assert status == 1
    assert f"their pages are in {out}/failures.txt" in text
    assert (out / "failures.txt").read_text() == "one\ntwo\n"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"gpu_check.log", "failures.txt", "verified/a-gpu.jsonl"}
    check(out, python=pretended(tmp_path, "true"), path=tmp_path)
    assert (out / "failures.txt").read_text() == "one\ntwo\n", "known failures keep their pages"


def test_an_unknown_option_is_answered_with_those_there_are(tmp_path):
    status, text = check(tmp_path / "out", "--fast")
    assert status == 2
    assert "scripts/gpu_check.sh [--instructions] [OPTION...] [OUT]" in text
    assert not (tmp_path / "out").exists()


def test_the_build_does_with_what_torch_brings(monkeypatch):
    """Without pybind11, with an old setuptools: setup.py sees neither."""
    seen = {}

    def run_path(path: str, run_name: str) -> None:
        import pybind11

        headers = Path(pybind11.get_include(), "pybind11/pybind11.h")
        configured = setuptools.Distribution.parse_config_files(None, ["pyproject.toml"])
        seen.update(path=path, headers=headers.exists(), configured=configured)

    monkeypatch.setattr(runpy, "run_path", run_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setuptools, "__version__", "68.1.2")
    distribution = setuptools.Distribution  # which gets its own back
    monkeypatch.setattr(distribution, "parse_config_files", distribution.parse_config_files)
    for name in ("ASPP_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setitem(sys.modules, "pybind11", None)
    build_for_gpu.main()
    assert seen == {"path": "setup.py", "headers": True, "configured": None}
    assert sys.argv == ["setup.py", "-q", "build_ext", "--inplace"]
    assert (os.environ["ASPP_EXT_CUDA"], os.environ["TORCH_CUDA_ARCH_LIST"]) == ("1", "9.0")


ONE = "operator: separable 32->32 4x4 1/2/3, bfloat16"
BENCHMARKS = {
    "benchmarks.gpu.run": (["--only", ONE, "--budget", "0.02"], "", "-speedup.png -roofline.png"),
    "benchmarks.gpu.kernels": (["--limit", "30"], "-kernels", ""),
    # A limit that could be reached would leave out what the picture is made of.
    "benchmarks.cudnn_baselines": (["--limit", "3600", "--budget", "0.01"], "-cudnn", "-cudnn.png"),
}


@pytest.mark.prove
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_a_dry_run(name, tmp_path):
    options, stem, pictures = BENCHMARKS[name]
    argv = [sys.executable, "-m", name, "--device", "cpu", "--out", str(tmp_path), *options]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {f"dry-run{end}" for end in (f"{stem}.csv", *pictures.split())}
    assert {path.name for path in tmp_path.iterdir()} == files


# Instructions


def test_the_emulated_instructions_do_not_depend_on_the_order(tmp_path):
    twin, printed = programs.ready("instructions"), []
    for seed in "01":
        ran = programs.run(twin, ASPP_EMULATE_SEED=seed)
        assert ran.returncode == 0, ran.stderr
        printed.append(tmp_path / seed)
        printed[-1].write_text(ran.stdout)
    assert compare_instructions.main(list(map(str, printed))) == 0
    families = {name.partition(".")[0] for name in compare_instructions.read(printed[0])}
    assert families >= {"mma_bf16", "mma_f16", "mma_tf32", "ldmatrix", "cp_async", "shuffle"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_instructions_are_compared_before(device, tmp_path):
    """Compilers take time: in their place the program is copied to where they have to write it."""
    copy = f'cp "{programs.ready("instructions")}" "${{!#}}"'
    python = script(
        tmp_path / "python",
        'case "$*" in',
        f'  *compare_instructions.py*) exec {sys.executable} "$@" ;;',
        "  *verify*) echo verifies ;;",
        "esac",
    )
    for compiler in ("g++", "nvcc"):
        script(tmp_path / compiler, f'[[ "$*" != *instructions.cu* ]] || {copy}')
    options = ["--instructions", "--device", device]
    status, text = check(tmp_path / "out", *options, python=python, path=tmp_path)
    assert status == 0, text
    assert " cases agree\nverifies\n" in text
    script(tmp_path / "g++", "echo broken; exit 1")
    status, text = check(tmp_path / "out", *options, python=python, path=tmp_path)
    assert status == 1
    assert "broken\nverifies\n" in text


@pytest.mark.parametrize(
    ("agreement", "got", "right"),
    [
        ("exact", "3f800000", True),
        ("exact", "3f800001", False),
        ("near:1e-4", "3f800001", True),
        ("near:1e-4", "3f810000", False),
        ("near:1e-4", "7fc00000", False),
        ("note", "00000000", True),
    ],
)
def test_instructions_agree_as_they_have_to(agreement, got, right):
    emulated = (agreement, ["3f800000"])
    assert compare_instructions.difference((agreement, [got]), emulated)[0] is right
    assert not compare_instructions.difference(None, emulated)[0]
    assert not compare_instructions.difference((agreement, []), emulated)[0]
