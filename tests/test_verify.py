# SPDX-License-Identifier: BSD-3-Clause
"""``python -m aspp_ext verify``: what it says of kernels that are right, and of planted faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import on_cpu, on_emulated, on_interpreted
from processes import isa
from table import INTERPRETED

from aspp_ext import _native
from aspp_ext.evidence import entry, store
from aspp_ext.evidence.entry import Cell
from aspp_ext.testing import PROBLEMS
from aspp_ext.verify import command, isolation, report
from aspp_ext.verify.rightness import Subject, judge

PLANTED = Path(__file__).with_name("planted_verify.py")
FOREVER = ("--budget", "100000")
"""A budget says how long a machine may work, not how quick it is."""


class Ran:
    """A run of the command, and what it has left."""

    def __init__(self, folder: Path, *command: str | Path, **environment: str) -> None:
        self.table = folder / "table.json"
        self.store = folder / "store"
        self.done = subprocess.run(
            [sys.executable, *map(str, command), *FOREVER, "--json", str(self.table)],
            env={**os.environ, store.VARIABLE: str(self.store), **environment},
            capture_output=True,
            text=True,
        )
        self.text = self.done.stdout

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.table.read_text())["verdicts"]

    @property
    def entry(self) -> entry.Entry | None:
        (path,) = self.store.glob("*.json")
        return store.read_entry(path)

    @property
    def page(self) -> str:
        (path,) = self.store.glob("failures/*/*.txt")
        assert str(path) in self.text
        return path.read_text()


def planted(folder: Path, fault: str) -> Ran:
    """On the device that is there unasked, which is the CPU."""
    return Ran(folder, PLANTED, fault, "verify", CUDA_VISIBLE_DEVICES="")


# Faults


def test_a_wrong_kernel_is_found_and_described(tmp_path) -> None:
    ran = planted(tmp_path, "wrong")
    assert ran.done.returncode == 1
    (row,) = ran.rows
    assert (row["result"], row["speeds"]) == ("wrong", {})
    assert row["why"] == "pyramid, aspp: result 0: 1 of 36992 numbers differ"
    assert not any(row["runs"].values())
    page = ran.page
    assert "pyramid: x [2, 16, 17, 17] contiguous; 16 x 1x1 at 1x1, 16 x 3x3 at 3x3" in page
    assert "  (1, 3, 16, 16): " in page
    assert "between [1, 1] x [3, 3] x [16, 16] x [16, 16]" in page
    assert "in tiles of 128 pixels: 4: 1" in page
    assert "five repeats agree, as with a wrong address or mask" in page
    assert "plan of forward with tiles of 128x128x32: " in page
    least = page.partition("The least problem")[2]
    assert "pyramid: x [1, 1, 1, 1] contiguous; 4 x" in least
    assert "(0, 3, 0, 0): " in least
    assert len(page) < 10_000


def test_a_race_is_told_from_an_address(tmp_path) -> None:
    assert "five repeats differ, as in a race" in planted(tmp_path, "different").page


def test_a_crash_is_named_with_where_it_was(tmp_path) -> None:
    ran = planted(tmp_path, "crashing")
    assert ran.done.returncode == 1
    (row,) = ran.rows
    assert (row["result"], row["why"]) == ("crashed", "signal SIGSEGV, at pyramid, aspp")
    assert "in crashing" in ran.page


def test_an_error_is_named(tmp_path) -> None:
    ran = planted(tmp_path, "refusing")
    (row,) = ran.rows
    sentence = "RuntimeError: an illegal memory access was encountered"
    assert (row["result"], row["why"]) == ("crashed", sentence)
    assert "Traceback" in ran.page


def test_a_kernel_that_hangs_is_left(tmp_path) -> None:
    ran = planted(tmp_path, "hanging")
    assert ran.done.returncode == 1
    (row,) = ran.rows
    assert (row["result"], row["why"]) == ("hung", "quiet for 1 s, at pyramid, aspp")
    assert "in hanging" in ran.page


def test_a_slow_kernel_is_right_and_does_not_run(tmp_path) -> None:
    ran = planted(tmp_path, "slow")
    assert ran.done.returncode == 0, ran.text + ran.done.stderr
    (row,) = ran.rows
    assert row["result"] == "right"
    assert row["speeds"]["small"]["says"] == "slower"
    assert row["runs"]["small"] is False
    found = ran.entry
    assert found is not None
    (verdict,) = found.verdicts.values()
    assert verdict.speeds["small"] == (0.5, "slower")


# Kernels


@pytest.mark.prove
@on_cpu
def test_the_cpu_s_kernels_are_right(tmp_path) -> None:
    """Each instruction set; and another run has nothing left to do."""
    arguments = ("-m", "aspp_ext", "verify", "--device", "cpu", "--quick")
    ran = Ran(tmp_path, *arguments)
    assert ran.done.returncode == 0, ran.text + ran.done.stderr
    results = {row["result"] for row in ran.rows}
    assert results <= {"right", "unavailable"}
    known = here()
    ours = [row for row in ran.rows if row["implementation"].partition(" ")[2] in known]
    assert {row["result"] for row in ours} == {"right"}
    assert any("medium" in row["speeds"] for row in ours)  # not where PyTorch takes too long
    assert {row["mode"] for row in ours} == {"inference", "training"}
    lines = next(ran.store.glob("*.jsonl")).read_text()
    again = Ran(tmp_path, *arguments)
    assert next(ran.store.glob("*.jsonl")).read_text() == lines
    assert again.rows == ran.rows


@pytest.mark.prove
@on_emulated
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("operator", ["atrous_pyramid", "atrous_separable_pyramid"])
def test_cuda_s_kernels_are_right_under_emulation(operator, mode) -> None:
    assert judge(Subject(Cell("cpu", operator, "float32", mode), "cpu")) < 4


@pytest.mark.prove
@on_interpreted
def test_triton_s_kernels_are_right_under_the_interpreter() -> None:
    assert judge(Subject(Cell("triton", "atrous_pyramid", "float32", "inference"), "cpu")) < 4


@pytest.mark.kernels("emulated", "interpreted")
def test_what_is_no_device_of_the_user_s_is_not_kept(tmp_path) -> None:
    arguments = ["verify", "--device", "cpu", "--quick", "--only", "atrous_pyramid"]
    place = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-m", "aspp_ext", *arguments, "--budget", "1e-3"],
        env={**os.environ, store.VARIABLE: str(place)},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    names = {row[0] for row in rows if "atrous_pyramid" in row}
    assert names == ({"cpu", "triton"} if INTERPRETED else {"cpu"})
    assert not place.exists()


def test_a_cell_is_judged_by_all_that_it_has_to_satisfy() -> None:
    seen, ours = [], []

    def beat(doing: str = "", patience: int = 1) -> None:
        (seen if doing else ours).append(doing or patience)

    cell = Cell("cpu", "aspp_inference", "float64", "inference")
    assert judge(Subject(cell, "cpu", beat)) == 0.0
    assert ours[0] == isolation.COMPILING
    assert set(ours[2::2]) == {1}
    assert set(ours[1::2]) == {isolation.PYTORCH}
    problems = {line.partition(", ")[2] for line in seen}
    assert {name for name in PROBLEMS if name.startswith(("x_", "in_place_"))} <= problems
    assert "real 320 channels, 33x33" in problems
    assert {line.partition(", ")[0] for line in seen} == {
        "head",
        "head_separable",
        "head_without_pool",
        "head_no_projection",
        "head_linear",
    }


def here() -> set[str]:
    """Instruction sets of this machine; "" is what it picks."""
    names = {name.removeprefix("isa_") for name in _native.read_build_info()["isas"]}
    return {"", *(name for name in names if isa(name) == name)}


SAYS_WHAT_RUNS = """
import sys
from aspp_ext import _native
from aspp_ext.ops import separable_choice
from aspp_ext.verify import command

def judge(subject):
    with open(sys.argv[1], "a") as log:
        print(subject.cell.implementation, _native.picked_isa(), separable_choice.way, file=log)
    return 1.0

command.judge = judge
command.contest = lambda subject, size: {"result": "timed", "ratio": 2.0, "says": "faster"}
sys.exit(command.main(sys.argv[2:]))
"""


@on_cpu
def test_each_instruction_set_is_the_one_that_runs(tmp_path) -> None:
    """Whatever our variables were on import."""
    log = tmp_path / "log"
    variables = {"ASPP_EXT_ISA": "baseline", "ASPP_EXT_SEPARABLE": "no such"}
    ran = Ran(
        tmp_path, "-c", SAYS_WHAT_RUNS, log, "verify", "--device", "cpu", "--quick", **variables
    )
    assert ran.done.returncode == 0, ran.text + ran.done.stderr
    ran_as = {line.rstrip() for line in log.read_text().splitlines()}
    best = isa("")
    expected = {f"cpu {best}", *(f"cpu {n} {n}" for n in here() - {"", best})}
    assert ran_as == expected
    lacking = {row["implementation"] for row in ran.rows if row["result"] == "unavailable"}
    assert not {name.partition(" ")[2] for name in lacking} & here()


# What is known already

KILLED = """
import sys, time
from aspp_ext.verify import command, isolation

def judge(subject):
    with open(sys.argv[1], "a") as log:
        log.write(subject.cell.title + "\\n")
    if sys.argv[2] == "slowly":
        time.sleep(0.2)
    return 1.0

command.judge = judge
command.contest = lambda subject, size: {"result": "timed", "ratio": 2.0, "says": "faster"}
sys.exit(command.main(sys.argv[3:]))
"""


def test_a_run_that_is_killed_loses_no_finished_case(tmp_path) -> None:
    log, place = tmp_path / "log", tmp_path / "store"
    arguments = [sys.executable, "-c", KILLED, str(log)]
    rest = ["verify", "--device", "cpu", *FOREVER, "--json", str(tmp_path / "table.json")]
    environment = {**os.environ, store.VARIABLE: str(place)}
    killed = subprocess.Popen([*arguments, "slowly", *rest], env=environment)
    while not list(place.glob("*.jsonl")) or len(finished(place)) < 7:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    before = finished(place)
    journal = next(place.glob("*.jsonl"))
    with journal.open("a") as file:
        file.write('{"case": "cut off in the midd')
    asked = log.read_text().splitlines()
    subprocess.run([*arguments, "fast", *rest], env=environment, check=True, capture_output=True)
    assert finished(place)[: len(before)] == before
    right = [name.removesuffix(": right") for name in before if name.endswith(": right")]
    later = log.read_text().splitlines()[len(asked) :]
    assert not set(right) & set(later)
    table = json.loads((tmp_path / "table.json").read_text())
    known = [row for row in table["verdicts"] if row["result"] == "right"]
    assert {row["result"] for row in table["verdicts"]} <= {"right", "unavailable"}
    titles = [", ".join(row[name] for name in Cell._fields) for row in known]
    assert set(titles) <= {*right, *later}
    assert len(right + later) == len({*right, *later})


def finished(place: Path) -> list[str]:
    found = []
    for line in next(place.glob("*.jsonl")).read_text().splitlines():
        try:
            found.append(json.loads(line)["case"])
        except ValueError:
            continue
    return found


def test_a_run_that_is_ended_keeps_what_it_knows(tmp_path) -> None:
    """By Ctrl-C, or by what ends jobs."""
    log, place = tmp_path / "log", tmp_path / "store"
    arguments = [sys.executable, "-c", KILLED, str(log), "slowly", "verify", "--device", "cpu"]
    environment = {**os.environ, store.VARIABLE: str(place)}
    ended = subprocess.Popen([*arguments, *FOREVER], env=environment, stdout=subprocess.DEVNULL)
    while not list(place.glob("*.jsonl")) or len(finished(place)) < 3:
        assert ended.poll() is None
        time.sleep(0.01)
    ended.terminate()
    assert ended.wait() == 130
    (path,) = place.glob("*.json")
    found = store.read_entry(path)
    assert found is not None
    assert len(found.verdicts) >= 3


# The command line


def test_a_reader_that_goes_away_costs_no_file(tmp_path) -> None:
    table = tmp_path / "table.json"
    command = [sys.executable, "-m", "aspp_ext", "verify", "--device", "cpu", "--budget", "1e-3"]
    run = subprocess.Popen([*command, "--json", str(table)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    run.stdout.close()
    run.wait()
    assert json.loads(table.read_text())["verdicts"]


REFUSED = {
    ("verify", "--only", "conv"): "argument --only: invalid choice: 'conv'",
    ("verify", "--budget", "0"): "argument --budget: must be above 0 seconds, got 0",
    ("verify", "--budget", "nan"): "argument --budget: must be above 0 seconds, got nan",
    ("verify", "--budget", "soon"): "argument --budget: must be above 0 seconds, got soon",
    ("verfy",): "argument command: invalid choice: 'verfy'",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_bad_arguments_are_refused_in_a_sentence(arguments, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.parse(arguments)
    assert REFUSED[arguments] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("device", ["tpu", "meta", "cpu:x"])
def test_a_device_that_is_none_is_refused_in_a_sentence(device) -> None:
    sentence = command.describe(device, print)["error"]
    assert sentence.startswith(f"--device must be cuda, cuda:N or cpu, got {device}")
    assert len(sentence.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_missed() -> None:
    arguments = [sys.executable, "-m", "aspp_ext", "verify", "--device", "cuda"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    sentence = "aspp_ext verify: --device cuda needs a GPU, and PyTorch sees none"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, sentence)


def test_the_table_has_what_was_not_reached(tmp_path) -> None:
    table = tmp_path / "table.json"
    arguments = ["verify", "--device", "cpu", "--budget", "1e-3", "--json", str(table)]
    done = subprocess.run(
        [sys.executable, "-m", "aspp_ext", *arguments, "--export", str(tmp_path / "entry.json")],
        env={**os.environ, store.VARIABLE: "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(table.read_text())["verdicts"]
    assert {row["result"] for row in rows} == {"not reached"}
    lines = done.stdout.splitlines()
    assert lines[0].split() == report.TITLES
    assert len([line for line in lines if "not reached" in line]) == len(rows)
    found = store.read_entry(tmp_path / "entry.json")
    assert found is not None
    assert found.verdicts == {}
