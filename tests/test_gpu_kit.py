# SPDX-License-Identifier: BSD-3-Clause
"""scripts/gpu_check.sh, its steps and what they call, as far as that needs no GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from itertools import takewhile
from pathlib import Path

import programs
import pytest
import torch

from aspp_ext.verified import PROOFS as NEEDED
from scripts import compare_instructions, exercise_kernels, kernel_calls, record_correctness

ROOT = Path(__file__).resolve().parents[1]
CHECK, STEPS = ROOT / "scripts/gpu_check.sh", ROOT / "scripts/gpu_steps.sh"
PROOFS = [*NEEDED["cuda"], *(proof for proof in NEEDED["triton"] if proof not in NEEDED["cuda"])]
ROWS = [(name, proof) for name, proofs in NEEDED.items() for proof in proofs]
COLUMNS = ["implementation", "check", "result", "detail", "date"]
COLUMNS += ["torch", "cuda", "triton", "device", "architecture", "commit"]


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines]) + "\n")
    path.chmod(0o755)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# The scripts


@pytest.mark.parametrize("path", [CHECK, STEPS], ids=lambda p: p.name)
def test_the_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.read_text().splitlines()[1] == "# SPDX-License-Identifier: BSD-3-Clause"
    assert max(map(len, path.read_text().splitlines())) <= 100


def check(
    out: Path, *options: str, python: str | Path = sys.executable, hangs: str = "no step"
) -> tuple[int, str]:
    """A dry run in which no step's limit is too short for this machine, and one may seem to hang:
    in the place of ``timeout --kill-after=SECONDS SECONDS COMMAND...`` is a program of ours."""
    with tempfile.TemporaryDirectory() as folder:
        hang = f'case "$*" in *"gpu_steps.sh {hangs}") exit 124 ;; esac'
        script(Path(folder, "timeout"), hang, "shift 2", 'exec "$@"')
        done = subprocess.run(
            ["bash", str(CHECK), "--dry-run", "--limit", "100000", *options, str(out)],
            env={**os.environ, "PYTHON": str(python), "PATH": f"{folder}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
        )
    return done.returncode, done.stdout + done.stderr


def summary(text: str) -> dict[str, tuple[str, str]]:
    """step -> (result, detail) from the table that ends the output."""
    lines, found = text.partition("detail\n")[2].splitlines(), {}
    for line in takewhile(lambda line: not line.startswith(("every proof", "FAILED")), lines):
        words = line[:34].split()
        found[words[0]] = (" ".join(words[1:-1]), line[34:].strip())
    return found


@pytest.mark.prove
def test_a_dry_run_walks_through_every_step(tmp_path):
    status, text = check(tmp_path)
    assert status == 0, text
    steps = summary(text)
    assert list(steps) == ["environment", *PROOFS, "benchmark", "kernels", "cudnn"]
    assert {result for result, _ in steps.values()} == {"passed"}, text
    files = sorted(path.name for path in tmp_path.iterdir())
    stem = "dry-run"
    assert files == sorted(
        [f"{stem}{end}" for end in (".csv", "-kernels.csv", "-cudnn.csv", "-correctness.csv")]
        + [f"{stem}{end}" for end in ("-speedup.png", "-roofline.png", "-cudnn.png")]
        + ["gpu_check.log"]
    )
    rows = read(tmp_path / "dry-run-correctness.csv")
    assert [(row["implementation"], row["check"]) for row in rows] == ROWS
    assert {row["result"] for row in rows} == {"passed"}
    assert "cuda: every proof passed\ntriton: every proof passed\n" in text
    assert {(row["device"], row["architecture"]) for row in rows} == {("dry run", "none")}


def test_nothing_that_triton_compiled_is_left(tmp_path):
    """It goes where the run keeps its own files, whatever the environment says."""
    python = script(
        tmp_path / "python",
        f'[[ "$*" == *exercise_kernels* ]] || exec {sys.executable} "$@"',
        'echo "$TRITON_CACHE_DIR ${TRITON_INTERPRET:-unset} ${ASPP_EXT_TRITON_TUNE:-unset}"'
        f' >> "{tmp_path}/seen"',
    )
    for name, value in (("TRITON_INTERPRET", "1"), ("ASPP_EXT_TRITON_TUNE", "read")):
        os.environ[name] = value
    try:
        check(tmp_path / "out", "--only", "memcheck,racecheck", python=python)
    finally:
        del os.environ["TRITON_INTERPRET"], os.environ["ASPP_EXT_TRITON_TUNE"]
    seen = (tmp_path / "seen").read_text().splitlines()
    first, second = (line.rsplit(maxsplit=2) for line in seen)
    assert second == first, "the steps of a run share it"
    folder, *states = first
    assert states == ["unset", "unset"]
    assert not Path(folder).parent.exists()


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path):
    python = script(
        tmp_path / "python",
        'case "$*" in',
        "  *exercise_kernels*) echo broken; exit 7 ;;",
        "  *benchmarks.gpu.run*) echo refused; exit 3 ;;",
        "  *cudnn_baselines*) echo measured ;;",
        f'  *) exec {sys.executable} "$@" ;;',
        "esac",
    )
    wanted = "memcheck,benchmark,kernels,cudnn"
    status, text = check(tmp_path / "out", "--only", wanted, python=python, hangs="kernels")
    steps = summary(text)
    assert steps["memcheck"] == ("failed", "broken")
    assert steps["benchmark"] == ("failed", "refused")
    assert steps["kernels"][0] == "failed"
    assert steps["kernels"][1].startswith("stopped after")
    assert steps["cudnn"][0] == "passed"
    assert status == 1
    written = read(tmp_path / "out/dry-run-correctness.csv")
    rows = {row["check"]: row for row in written}
    assert list(rows["build"]) == COLUMNS
    assert [(row["implementation"], row["check"]) for row in written] == ROWS
    assert (rows["memcheck"]["result"], rows["memcheck"]["detail"]) == ("failed", "broken")
    assert rows["build"]["result"] == "failed", "a proof that was not asked for is none"


@pytest.mark.prove  # it takes the whole limit
def test_a_step_that_hangs_is_stopped(tmp_path):
    """By the real ``timeout``."""
    python = script(
        tmp_path / "python",
        f'case "$*" in *gpu.kernels*) sleep 36000 ;; *) exec {sys.executable} "$@" ;; esac',
    )
    argv = ["bash", str(CHECK), "--dry-run", "--only", "kernels", "--limit", "60", str(tmp_path)]
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    result, detail = summary(done.stdout)["kernels"]
    assert result == "failed"
    assert detail.startswith("stopped after")


def test_a_step_for_which_no_time_is_left_is_not_run(tmp_path):
    _, text = check(tmp_path, "--only", "cudnn", "--limit", "1")
    assert summary(text) == {"cudnn": ("not run", "no time was left for it")}


@pytest.mark.parametrize(("code", "status"), [(3, 1), (1, 0)])
def test_a_measurement_fails_the_run_only_where_it_refused_a_result(code, status, tmp_path):
    python = script(
        tmp_path / "python",
        f'case "$*" in *gpu.run*) exit {code} ;; *) exec {sys.executable} "$@" ;; esac',
    )
    assert check(tmp_path / "out", "--only", "benchmark", python=python)[0] == status


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--only", "nothing"], "there is no step nothing"),
        (["--limit", "soon"], "--limit must be seconds but is soon"),
        (["--fast"], "unknown option --fast"),
        (["--only"], "--only needs a value"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    done = subprocess.run(["bash", str(CHECK), *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr


def step(name: str, tmp_path: Path, **programs: list[str]) -> int:
    """Runs one step as on a GPU, with programs of our own on the path."""
    for program, lines in programs.items():
        script(tmp_path / program.replace("_", "-"), *lines)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": "fake-python",
        **{"DEVICE": "cuda", "LIMIT": "60", "OUT": str(tmp_path), "WORK": str(tmp_path)},
    }
    done = subprocess.run(["bash", str(STEPS), name], cwd=ROOT, env=environment)
    return done.returncode


CLEAN = "========= ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([f"echo '{CLEAN}'"], 0),
        (["echo '========= ERROR SUMMARY: 4 errors'", "exit 9"], 9),
        ([f"echo '{CLEAN}'", "exit 1"], 1),  # the program under the tool failed
        (["echo Device not supported"], 1),
    ],
)
def test_a_sanitizer_passes_only_with_its_summary(lines, status, tmp_path):
    assert step("memcheck", tmp_path, compute_sanitizer=lines) == status


@pytest.mark.parametrize(
    ("closing", "code", "status"),
    [
        ("1734 passed, 3 skipped in 41.20s", 0, 0),
        ("1 failed, 1733 passed in 41.20s", 1, 1),
        ("1734 skipped in 4.20s", 0, 1),
        ("no tests ran in 0.01s", 5, 1),
    ],
)
def test_the_tests_pass_only_where_some_ran(closing, code, status, tmp_path):
    lines = ['[[ "$*" == *pytest* ]] || exit 1', f"echo '{closing}'", f"exit {code}"]
    assert step("tests", tmp_path, fake_python=lines) == status
    assert step("triton", tmp_path, fake_python=lines) == status


STEPS_TABLE = (
    "build\tpassed\t3\tbuilt for 9.0",
    "memcheck\tnot run\t0\tno time",
    *(f"{proof}\tpassed\t1\tfine" for proof in NEEDED["triton"] if proof != "build"),
)


def test_the_record_has_a_row_for_every_proof(tmp_path, monkeypatch, capsys):
    """One implementation's proofs may be whole where another's are not."""
    monkeypatch.setenv("ASPP_EXT_COMMIT", "abc1234")
    table = tmp_path / "steps.tsv"
    table.write_text("\n".join(STEPS_TABLE) + "\n")
    assert record_correctness.main([str(table), str(tmp_path), "--device", "cpu"]) == 0
    rows = read(tmp_path / "dry-run-correctness.csv")
    assert list(rows[0]) == COLUMNS
    assert [(row["implementation"], row["check"]) for row in rows] == ROWS
    of_cuda = {
        r["check"]: (r["result"], r["detail"]) for r in rows if r["implementation"] == "cuda"
    }
    assert of_cuda["build"] == ("passed", "built for 9.0")
    assert of_cuda["memcheck"] == ("failed", "not run: no time")
    assert of_cuda["tests"] == ("failed", "not run: it was not asked for")
    assert {row["result"] for row in rows if row["implementation"] == "triton"} == {"passed"}
    assert {row["commit"] for row in rows} == {"abc1234"}
    path = tmp_path / "dry-run-correctness.csv"
    written = path.read_text()
    table.write_text("environment\tpassed\t3\tfine\nbenchmark\tpassed\t9\tfine\n")
    said = capsys.readouterr().out
    assert record_correctness.main([str(table), str(tmp_path), "--device", "cpu"]) == 0
    assert path.read_text() == written, "measurements alone leave what an earlier run has proven"
    assert "cuda: no proof by instructions, tests, memcheck" in said
    assert "triton: every proof passed" in said


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


def test_kernels_are_found_by_their_stubs():
    symbols = (
        "00d6 t _ZL48__device_stub__ZN1a1kINS_1CILNS_1PE0ELi3EEEEEvPiPi\n"
        "0286 b _ZGVZL48__device_stub__ZN1a1kINS_1CILNS_1PE1ELi3EEEEEvPiPiE5__tmp\n"
        "0418 t _ZN1aL24__wrapper__device_stub_kINS_1CILNS_1PE1ELi3EEEEEvRPi\n"
    )
    names = {f"_ZN1a1kINS_1CILNS_1PE{place}ELi3EEEEEvPi" for place in (0, 1)}
    assert exercise_kernels.kernels_of(symbols) == names


def test_the_calls_for_the_sanitizers_are_right(capsys):
    assert exercise_kernels.main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("100 of 100 calls agree\n")


def test_without_the_interpreter_the_calls_say_so(capsys):
    options = ["--device", "cpu", "--implementation", "triton"]
    assert exercise_kernels.main(options) == 1
    assert capsys.readouterr().out.strip()


def test_a_wrong_call_is_named():
    ones = torch.ones(2, 3, dtype=torch.float64)
    call = kernel_calls.Call("", list, [ones, ones], rounded=(1,))
    for first, second, text in (
        (torch.ones(2, 3), torch.full((2, 3), 1.000001), None),
        (torch.zeros(2, 3), torch.ones(2, 3), "result 0: 6 of 6 elements differ"),
        (torch.ones(2, 3), torch.full((2, 3), 1.1), "result 1: 6 of 6 elements differ"),
        (torch.full((2, 3), torch.nan), torch.ones(2, 3), "result 0: 6 of 6 elements differ"),
        (torch.ones(3), torch.ones(2, 3), "result 0: expected [2, 3], got [3]"),
    ):
        assert kernel_calls.difference([first, second], call, torch.float32) == text
    text = kernel_calls.difference([], call, torch.float32)
    assert text == "expected 2 results, got 0"
