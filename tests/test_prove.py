# SPDX-License-Identifier: BSD-3-Clause
"""scripts/prove.py: order, failures, what is kept from run to run, and parts in a given time."""

from __future__ import annotations

import json

import pytest

from scripts import prove
from scripts.steps import Step

SAYS = "import sys; print(sys.argv[1]); sys.exit(int(sys.argv[2]))"


def step(name: str, status: int = 0, minutes: float = 1, **options) -> Step:
    return Step(name, minutes, ("-c", SAYS, f"this is {name}", str(status)), **options)


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs steps with options; returns the exit status and what was printed."""
    monkeypatch.setattr(prove, "FOLDER", tmp_path)
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    monkeypatch.setattr(prove, "digest_of_sources", lambda: "sources")

    def run(steps: list[Step], *options: str) -> tuple[int, str]:
        monkeypatch.setattr(prove, "plan", lambda: steps)
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
    monkeypatch.setattr(prove, "digest_of_sources", lambda: "others")
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
    status, text = run([step("one", 1, why_not="no such processor"), step("two")])
    assert status == 0
    assert "no such processor" in text
    assert "this is one" not in text


def test_only_and_test_choose_steps(run) -> None:
    steps = [step("one"), step("two", is_test=True), step("three")]
    assert "this is one" not in run(steps, "--only", "three")[1]
    for _ in range(2):  # tests are always repeated
        text = run(steps, "--test")[1]
        assert "this is two" in text
        assert "this is one" not in text
    assert "this is three" not in run(steps)[1], "and take nothing away from what is kept"
    with pytest.raises(SystemExit):
        run(steps, "--only", "four")
    assert "this is" not in run(steps, "--list")[1]


def test_tests_that_were_cut_are_a_part_and_not_kept(run, tmp_path) -> None:
    says = "print('3 passed, 2 skipped in 1.0s'); print('2 tests: no time was left')"
    cut = Step("cut", 60, ("-c", says))
    status, text = run([cut])
    assert status == 0
    assert "a part" in text
    assert "3 passed, 2 skipped" in text
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == {}


def test_what_has_passed_in_a_step_is_left_out_of_its_next_run(run, tmp_path, monkeypatch) -> None:
    """Each run gets the same file, unless tests are chosen by hand, until a source changes."""
    monkeypatch.setattr(Step, "is_pytest", property(lambda self: True))
    notes = "import sys; print('given', [a for a in sys.argv if 'passed' in a])"
    tests = Step("some tests", 1, ("-c", notes))
    (tmp_path / "some-tests.passed").write_text("a test\n")
    assert f"given ['--passed={tmp_path / 'some-tests.passed'}']" in run([tests], "--fresh")[1]
    assert not (tmp_path / "some-tests.passed").exists(), "other sources, or from the beginning"
    assert "given []" in run([tests], "--fresh", "-k", "one")[1]
    nothing_left = Step("some tests", 1, ("-c", "import sys; sys.exit(5)"))
    assert run([nothing_left], "--fresh")[0] == 1, "nothing was ever chosen"
    run([tests], "--fresh")
    record = tmp_path / "results.json"
    record.write_text(record.read_text().replace("some tests", "others"))
    (tmp_path / "some-tests.passed").write_text("every test\n")
    assert run([nothing_left])[0] == 0


@pytest.mark.parametrize(("minutes", "shares"), [(100, [None, None]), (30, [600, 1800])])
def test_shares_of_the_time(minutes, shares) -> None:
    """What is left is divided as the steps' expected minutes are."""
    steps = [step("short", minutes=20), step("long", minutes=40)]
    assert prove.share_of(steps[0], steps, minutes) == shares[0]
    assert prove.share_of(steps[1], steps[1:], minutes) == shares[1]


def test_sources_are_what_git_has_and_would_add(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(prove, "ROOT", tmp_path)
    prove.subprocess.check_call(["git", "init", "-q", str(tmp_path)])
    (tmp_path / ".gitignore").write_text("built\n")
    digests = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "1"), ("built", "1"), ("a.md", "1")):
        (tmp_path / name).write_text(text)
        digests.append(prove.digest_of_sources())
    assert len(set(digests)) == 3
    assert digests[2] == digests[3] == digests[4]
