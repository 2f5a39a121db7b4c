# SPDX-License-Identifier: BSD-3-Clause
"""scripts/prove.py: order, failures, what is kept from run to run, and parts in a given time."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from scripts import proof_record, prove
from scripts.steps import ROOT, Step

SAYS = """import sys
name, status, counts, *options = sys.argv[1:]
print(name, [o for o in options if "passed=" in o])
for option in options:
    if counts and option.startswith("--counts="):
        open(option.removeprefix("--counts="), "w").write(counts)
sys.exit(int(status))"""


class Suite(Step):
    """One that needs no pytest."""

    is_suite = True


def step(name: str, status: int = 0, counts: str = '{"passed": 1}', kind=Suite, **options) -> Step:
    command = ("-c", SAYS, f"this is {name}", str(status), counts)
    return kind(name, 1, command, **options)


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs steps with options; returns the exit status and what was printed."""
    monkeypatch.setattr(proof_record, "FOLDER", tmp_path)
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    monkeypatch.setattr(proof_record, "sources", lambda: ["a source"])
    monkeypatch.setattr(proof_record, "digest_of_sources", lambda: "sources")

    def run(tests: list[Step], *options: str, proofs: list[Step] | None = None) -> tuple[int, str]:
        monkeypatch.setattr(prove, "test_steps", lambda: tests)
        monkeypatch.setattr(prove, "proof_steps", lambda: proofs or [])
        return prove.main(list(options)), capfd.readouterr().out

    return run


def test_a_failure_does_not_keep_the_next_from_running(run) -> None:
    status, text = run([step("one"), step("two", 3), step("three")])
    assert status == 1
    assert text.index("this is one") < text.index("this is two") < text.index("this is three")
    table = text.rpartition("expected")[2]
    assert [line.split()[-1] for line in table.splitlines() if "two" in line] == ["two.log"]


def test_what_has_passed_is_not_repeated_until_a_source_changes(run, monkeypatch) -> None:
    run([step("one"), step("two", 1)])
    status, text = run([step("one"), step("two")])
    assert status == 0
    assert "this is one" not in text
    assert "this is two" in text
    assert "this is" not in run([step("one"), step("two")])[1]
    assert "this is one" in run([step("one"), step("two")], "--fresh")[1]
    monkeypatch.setattr(proof_record, "digest_of_sources", lambda: "others")
    assert "this is one" in run([step("one")])[1]


def test_an_interrupted_run_goes_on_where_it_stopped(run, monkeypatch) -> None:
    real = prove.run

    def interrupted(step, *rest):
        if step.name == "two":
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(prove, "run", interrupted)
    status, text = run([step("one"), step("two"), step("three")])
    assert status == 130
    assert "not run" in text.rpartition("expected")[2]
    monkeypatch.setattr(prove, "run", real)
    status, text = run([step("one"), step("two"), step("three")])
    assert status == 0
    assert "this is one" not in text
    assert "this is three" in text


def test_a_step_says_why_it_cannot_run(run) -> None:
    status, text = run([step("one", why_not="no such processor"), step("two")])
    assert status == 0
    assert "no such processor" in text
    assert "this is one" not in text


BUILD, USER = step("build", kind=Step), step("user", needs=("build",))


def test_builds_are_repeated_for_whoever_needs_them(run) -> None:
    """Also by the names of others; they are never kept."""
    other = step("other")
    for options in ([], ["--only", "user", "--fresh"]):
        assert "this is build" in run([BUILD, other, USER], *options)[1]
    assert "this is build" not in run([BUILD, other, USER])[1], "nobody is left to need it"
    assert "this is build" not in run([BUILD, other, USER], "--only", "other", "--fresh")[1]


def test_what_needs_a_failed_build_does_not_run(run) -> None:
    status, text = run([step("build", 1, kind=Step), USER, step("other")])
    assert status == 1
    assert "not run: build failed" in text
    assert "this is user" not in text
    assert "this is other" in text


def test_only_and_test_choose_steps(run) -> None:
    tests, proofs = [step("one")], [step("two"), step("three")]
    assert "this is one" not in run(tests, "--only", "three", proofs=proofs)[1]
    for _ in range(2):  # tests are always repeated
        text = run(tests, "--test", proofs=proofs)[1]
        assert "this is one" in text
        assert "this is two" not in text
    assert "this is three" not in run(tests, proofs=proofs)[1], "and take nothing away"
    with pytest.raises(SystemExit):
        run(tests, "--only", "four")
    assert "this is" not in run(tests, "--list", "--fresh", proofs=proofs)[1]


def test_fresh_forgets_the_chosen_steps_alone(run) -> None:
    steps = [step("one"), step("two")]
    run(steps)
    assert "this is one" in run(steps, "--fresh", "--only", "one")[1]
    assert "this is" not in run(steps)[1]


@pytest.mark.parametrize(
    ("counts", "status", "outcome"),
    [
        ({"passed": 7, "xfailed": 1}, 0, "passed"),
        ({"passed": 3, "out of time": 2}, 0, "a part"),
        ({"skipped": 9}, 0, "failed"),
        ({"out of time": 9}, 0, "failed"),
        ({"passed": 6, "failed": 1}, 1, "failed"),
        ({}, 0, "failed"),
        ({}, 5, "failed"),
    ],
)
def test_outcomes(run, tmp_path, counts, status, outcome) -> None:
    """Only a suite that has passed as a whole is kept; one of which nothing ran has failed."""
    code, text = run([step("one", status, json.dumps(counts) if counts else "")])
    assert (code != 0) == (outcome == "failed")
    shown = text.rpartition("expected")[2]
    assert outcome in shown
    assert ", ".join(f"{n} {name}" for name, n in counts.items()) in shown
    assert (outcome == "failed") == ("one.log" in shown)
    kept = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (outcome == "passed") == ("one" in kept)


def test_nothing_chosen_by_hand_is_no_failure_unless_everywhere(run) -> None:
    none, none_either, some = step("none", 5, ""), step("none either", 5, ""), step("some")
    assert run([none, some], "--test", "-k", "x")[0] == 0
    assert run([none, none_either], "--test", "-k", "x")[0] == prove.NOTHING_CHOSEN


def test_what_has_passed_in_a_step_is_left_out_of_its_next_run(run, tmp_path) -> None:
    """Each run gets the same file, unless tests are chosen by hand, until a source changes."""
    file = tmp_path / "some-tests.passed"
    assert f"['--passed={file}']" in run([step("some tests")])[1]
    assert "this is some tests []" in run([step("some tests")], "--fresh", "-k", "one")[1]
    assert run([step("some tests", 5, "")], "--fresh")[0] == 1, "nothing was ever chosen"
    file.with_suffix(".new").write_text("every test\n")  # as a run that was killed leaves it
    assert "1 before" in run([step("some tests")], "--list")[1]
    status, text = run([step("some tests", 5, "")])
    assert status == 0
    assert "1 before" in text.rpartition("expected")[2]
    assert file.read_text() == "every test\n"
    skipped = [step("some tests", 0, '{"skipped": 1}')]
    (tmp_path / "results.json").write_text('{"sources": "sources", "steps": {}}')
    assert run(skipped)[0] == 0, "all that passes has passed before"


def test_a_source_that_changes_meanwhile_takes_the_proof_away(run, tmp_path, monkeypatch) -> None:
    found = iter(["before", "after", "after"])
    monkeypatch.setattr(proof_record, "digest_of_sources", lambda: next(found))
    (tmp_path / "one.passed").write_text("a test\n")
    status, text = run([step("one")])
    assert status == 1
    assert "not kept: a source has changed" in text
    assert not (tmp_path / "one.passed").exists()
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == {}


@pytest.mark.parametrize("text", ["", '{"sources": "sources"', '{"steps": {"one": {}}}', "[]"])
def test_a_damaged_record_is_none(run, tmp_path, text) -> None:
    (tmp_path / "results.json").write_text(text)
    assert "this is one" in run([step("one")])[1]
    assert "this is one" not in run([step("one")])[1]


@pytest.mark.parametrize("options", [["--test"], ["-k", "x"]])
def test_a_failure_takes_away_what_had_passed(run, tmp_path, options) -> None:
    """Of tests that pass and fail by turns the pass is not kept."""
    (tmp_path / "one.new").touch()
    run([step("one")])
    assert run([step("one", 1, '{"failed": 1}')], *options)[0] == 1
    assert not (tmp_path / "one.passed").exists()
    assert "this is one" in run([step("one")])[1]


def test_two_runs_do_not_share_a_record(run, tmp_path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, text = run([step("one")])
    assert status != 0
    assert "another run is going on" in text
    assert "this is one" not in text


# What it has started holds its output, and ends with it where it is in its process group.
HOLDS = """import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
print("waits as", os.getpid(), flush=True)
time.sleep(600)
print("too late")"""
WAITS = f"""import subprocess, sys
try:
    command = [sys.executable, "-c", {HOLDS!r}]
    subprocess.Popen(command, start_new_session=sys.argv[1] == "apart").wait()
except KeyboardInterrupt:
    print("its end", flush=True)
    raise"""
INTERRUPTED = f"""import sys
from pathlib import Path
from scripts import proof_record, prove
from scripts.steps import Step
proof_record.FOLDER = prove.ROOT = Path(sys.argv[1])
one = ("-c", {WAITS!r}, sys.argv[2])
prove.test_steps = lambda: [Step("one", 1, one), Step("two", 1, ("-c", ""))]
prove.proof_steps = lambda: []
prove.take_interrupts()
sys.exit(prove.main(["--only", "one;two"]))"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("child", ["in its group", "apart"])
def test_an_interrupt_ends_what_runs_and_shows_the_table(tmp_path, number, child) -> None:
    """What is out of reach keeps it from its end until there is a second one."""
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path), child]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        holder = next(line for line in lines if line.startswith("waits as"))
        process.send_signal(number)
        assert "its end\n" in lines
        if child == "apart":
            time.sleep(1.5)
            process.send_signal(number)
        text = "".join(lines)
    if child == "apart":
        os.kill(int(holder.split()[-1]), signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGINT
    assert "too late" not in text
    table = text.rpartition("expected")[2]
    assert "interrupted" in table
    assert "not run" in table


def test_an_interrupt_that_make_hands_on_too_is_not_a_second_one(monkeypatch) -> None:
    class Output:
        def __iter__(self) -> NoReturn:
            raise KeyboardInterrupt

    sent: list[signal.Signals] = []
    monkeypatch.setattr(prove, "end", lambda _, number: sent.append(number))
    times = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(prove, "time", SimpleNamespace(monotonic=times.__next__))
    assert prove.follow(SimpleNamespace(stdout=Output()), io.StringIO())
    assert sent == [signal.SIGINT, signal.SIGKILL]
    assert not list(times), "the second one killed"


def test_other_sources_begin_anew_at_once(run, tmp_path, monkeypatch) -> None:
    """Also where the first step of the run does not come to an end."""
    run([step("one")])
    (tmp_path / "two.passed").write_text("a test\n")
    monkeypatch.setattr(proof_record, "digest_of_sources", lambda: "others")
    run([step("one")], "--list")
    assert not (tmp_path / "two.passed").exists()
    monkeypatch.setattr(proof_record, "digest_of_sources", lambda: "sources")
    assert "this is one" in run([step("one")])[1]


@pytest.mark.parametrize(
    ("minutes", "shares"), [(100, [None, None]), (30, [600, 1800]), (0, [20, 20])]
)
def test_shares_of_the_time(minutes, shares) -> None:
    """What is left is divided as the steps' expected minutes are, and each gets a little."""
    short, long = Step("short", 20, ()), Step("long", 40, ())
    assert prove.seconds_for(short, [short, long], minutes) == shares[0]
    assert prove.seconds_for(long, [long], minutes) == shares[1]


def test_nothing_but_the_step_decides_what_is_tested(monkeypatch) -> None:
    names = ("ASPP_EXT_BACKEND", "ASPP_EXT_ISA", "TRITON_INTERPRET", "PYTEST_ADDOPTS",
        "PYTHONOPTIMIZE", "OMP_NUM_THREADS", "ASPP_EXT_LIBRARY_DIR")  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "1")
    found = prove.environment_of(step("one", environment={"ASPP_EXT_ISA": "avx2"}))
    assert found["ASPP_EXT_ISA"] == "avx2"
    assert not set(names) - {"ASPP_EXT_ISA"} & set(found)
    assert "ASPP_EXT_LIBRARY_DIR" not in prove.environment_of(step("build", kind=Step))


def test_sources_are_what_git_has_and_would_add(tmp_path, monkeypatch) -> None:
    for name in os.environ:
        if name.startswith(("GIT_", *proof_record.BUILT_WITH)):  # as a hook of git sets them
            monkeypatch.delenv(name)
    monkeypatch.setattr(proof_record, "ROOT", tmp_path)
    subprocess.check_call(["git", "init", "-q", str(tmp_path)])
    (tmp_path / ".gitignore").write_text("built\ninside\n")
    digests = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.md", "1"), ("built", "1")):
        (tmp_path / name).write_text(text)
        digests.append(proof_record.digest_of_sources())
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.py")).touch()
    digests.append(proof_record.digest_of_sources())
    for name in ("CXXFLAGS", "LDFLAGS", "NVCC_APPEND_FLAGS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "-O0")
        digests.append(proof_record.digest_of_sources())
    assert digests[2] == digests[3]
    assert len(set(digests)) == len(digests) - 1
    for name, value in (("ROOT", tmp_path / "inside"), ("ROOT", tmp_path.parent)):
        (tmp_path / "inside").mkdir(exist_ok=True)
        monkeypatch.setattr(proof_record, name, value)
        assert proof_record.digest_of_sources() != proof_record.digest_of_sources()
    monkeypatch.setattr(proof_record, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    assert proof_record.digest_of_sources() != proof_record.digest_of_sources()


@pytest.mark.parametrize(
    "options", [["--minutes", "0"], ["--minutes", "-1"], ["--minutes", "nan"], ["--only", ""],
                ["--only", "three"]],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(run, options) -> None:
    with pytest.raises(SystemExit):
        run([step("one"), step("three", why_not="no such processor")], *options)
