# SPDX-License-Identifier: BSD-3-Clause
"""The parts of ``python -m aspp_ext verify``: isolation, journal, decisions, failures."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aspp_ext.evidence.entry import Cell
from aspp_ext.testing import PROBLEMS, timing
from aspp_ext.testing.checks import Wrong
from aspp_ext.verify import cases, command, contest, failure, isolation
from aspp_ext.verify.cases import Case
from aspp_ext.verify.journal import Journal
from aspp_ext.verify.rightness import Subject, judge

# Isolation


def toy(given: str, beat: isolation.Beat) -> dict[str, Any]:
    if given == "crash":
        os.write(1, b"so long\n")  # what pytest does not capture for itself
        os.kill(os.getpid(), signal.SIGKILL)
    if given == "exit":
        os._exit(7)
    if given == "exit, with a child":
        if os.fork():
            os._exit(7)
        time.sleep(1e6)
    if given == "hang":
        beat("the last line")
        time.sleep(1e6)
    if given == "spawn":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
        beat("the last line")
        time.sleep(1e6)
    return {"result": "right", "pid": os.getpid(), isolation.BROKEN: given == "broken"}


def wait_for_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a process takes until its first one."""
    result = isolation.Child.result

    def wait(self, quiet):
        return result(self, quiet if self.doing else 1e6)

    monkeypatch.setattr(isolation.Child, "result", wait)


@pytest.fixture
def patient(monkeypatch) -> None:
    wait_for_beats(monkeypatch)


def solved(
    *given: str, deadline: float = 1e9, at_once: int = 1
) -> list[tuple[str, dict[str, Any]]]:
    return list(isolation.run(given, toy, 1.0, deadline, at_once=at_once))


def test_what_goes_wrong_takes_nothing_along(patient) -> None:
    found = solved("good", "crash", "exit", "good", "hang", "good", "broken", "good", "good")
    results = [result["result"] for _, result in found]
    bad = ["crashed", "crashed", "right", "hung", "right", "right", "right", "right"]
    assert results == ["right", *bad]
    whys = [result["why"] for _, result in found if "why" in result]
    assert whys == ["signal SIGKILL", "exit status 7", "quiet for 1 s, at the last line"]
    assert found[1][1]["output"] == "so long\n"
    children = [result.get("pid") for _, result in found]
    assert len({children[0], children[3], children[5], children[7]}) == 4
    assert children[5] == children[6]
    assert children[7] == children[8]
    assert isolation.BROKEN not in found[6][1]


def test_several_at_once(patient) -> None:
    given = [*["good", "crash"] * 3, "hang", "good", "exit"]
    found = solved(*given, at_once=4)
    assert sorted(case for case, _ in found) == sorted(given)
    results = {(case, result["result"]) for case, result in found}
    bad = {("crash", "crashed"), ("exit", "crashed"), ("hang", "hung")}
    assert results == {("good", "right"), *bad}


def test_a_child_s_own_children_end_with_it() -> None:
    child = isolation.Child(toy)
    child.give("spawn")
    while child.doing != "the last line":
        child.connection.poll(None)
        child.hear()
    child.end()
    with contextlib.suppress(ProcessLookupError):
        while True:  # until the last of its group is gone
            os.killpg(child.pid, 0)


def test_a_case_that_the_deadline_cuts_has_no_result() -> None:
    assert solved("good", deadline=0.0) == []
    ((case, result),) = solved("hang", deadline=time.monotonic() + 0.5)
    assert (case, result["result"]) == ("hang", isolation.CUT)


def test_a_crash_is_one_though_a_grandchild_lives_on(patient) -> None:
    """Which has inherited what its parent spoke through."""
    ((_, result),) = solved("exit, with a child")
    assert (result["result"], result["why"]) == ("crashed", "exit status 7")


def test_a_busy_machine_is_not_a_hung_kernel(monkeypatch) -> None:
    """As long as it says from time to time what it does; others may take six times as long."""
    now = [0.0]
    monkeypatch.setattr(isolation, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def beats(self: isolation.Child) -> dict[str, Any] | None:
        now[0] += 15.0
        return hear(self)

    def work(given, beat):
        for line in range(9):
            beat(str(line))
        return {"result": "right"}

    def slow(given, beat):
        beat("PyTorch's own", isolation.PYTORCH)
        time.sleep(1e6)

    hear = isolation.Child.hear
    monkeypatch.setattr(isolation.Child, "hear", beats)
    ((_, result),) = isolation.run([""], work, 20.0, 1e9)
    assert result == {"result": "right", "seconds": 150.0}
    monkeypatch.undo()
    wait_for_beats(monkeypatch)
    ((_, result),) = isolation.run([""], slow, 0.1, 1e9)
    assert (result["result"], result["why"]) == (
        "unavailable",
        "PyTorch takes 1 s, at PyTorch's own",
    )


# The journal


def test_a_journal_is_another_s_where_the_engine_is(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "one").add("a", {"result": "right"})
    Journal(path, "two").add("b", {"result": "wrong"})
    assert set(Journal(path, "one").results) == {"a"}
    assert set(Journal(path, "two").results) == {"b"}
    Journal(path, "one").add("a", {"result": "hung"})
    assert Journal(path, "one").results["a"]["result"] == "hung"


@pytest.mark.parametrize(
    "text", ["\0" * 99, "[1]\n{}\n", '{"case": 3}\n', "[" * 99999, "x" * 2**21]
)
def test_a_hostile_journal_is_empty(text, tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    assert Journal(path, "one").results == {}
    Journal(path, "one").add("a", {"result": "right"})
    assert set(Journal(path, "one").results) == {"a"}


def test_a_link_is_no_journal(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        Journal(path, "one").add("a", {"result": "right"})
    assert not (tmp_path / "elsewhere").exists()


# What is right on what is judged, and nowhere else


def swallow_nan(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(1.0, torch.inf, -torch.inf) if x.size(1) % 8 == 0 else x


def swallow_low_inf(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == -torch.inf, 1.0, x)


def wrong_channels_last(x: torch.Tensor) -> torch.Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x + 1 if last and x.numel() > 100_000 else x


def wrong_batch(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.size(0) > 1 and x.numel() > 100_000 else x


def wrong_channels(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.size(1) >= 512 else x


CHANGED = [swallow_nan, swallow_low_inf, wrong_channels_last, wrong_batch, wrong_channels]


@pytest.mark.parametrize("change", CHANGED, ids=lambda f: f.__name__)
def test_faults_of_what_networks_have_are_found(change, monkeypatch) -> None:
    call = Subject.call

    def changed(self: Subject, op: Any) -> Any:
        return lambda x, *rest: call(self, op)(change(x), *rest)

    monkeypatch.setattr(Subject, "call", changed)
    monkeypatch.setattr(failure, "SHRINKING_S", 0.0)
    with pytest.raises(failure.Failure):
        judge(Subject(Cell("cpu", "atrous_pyramid", "float32", "inference"), "cpu"))


@pytest.mark.parametrize(
    ("whose", "layouts"), [("cpu", ["NCHW", "NHWC"]), ("cpu", ["NHWC"]), ("reference", ["NHWC"])]
)
def test_what_is_grossly_wrong_is_not_timed(whose, layouts, monkeypatch) -> None:
    """Of PyTorch it is left out; where both of its formats are wrong nobody knows."""
    forward = contest.Tensors.forward

    def wrong(self: contest.Tensors, backend: str) -> torch.Tensor:
        y = forward(self, backend)
        is_wrong = self.memory_format in [contest.FORMATS[name] for name in layouts]
        return y.fill_(0) if backend == whose and is_wrong else y

    monkeypatch.setattr(contest.Tensors, "forward", wrong)
    subject = Subject(Cell("cpu", "atrous_pyramid", "float32", "inference"), "cpu")
    if whose == "cpu":
        sentence = rf"x \[1, 320, 33, 33\] {layouts[0]}: result 0 is off by 1 of its largest"
        with pytest.raises(failure.Failure, match=sentence):
            contest.contest(subject, "small")
    else:
        timed = contest.contest(subject, "small")
        assert set(timed["medians_ms"]) == {"ours NCHW", "ours NHWC", "PyTorch NCHW"}


# Decisions


def times(*milliseconds: float) -> timing.Timing:
    return timing.Timing(tuple(m / 1e3 for m in milliseconds))


FAST, GOOD, NOISY, SLOW = times(1, 1, 1), times(2, 2, 2), times(1, 2, 9), times(4, 4, 4)
DECISIONS = {
    "faster in either format": ((FAST, FAST), (GOOD, SLOW), "faster"),
    "as fast as the best": ((GOOD, GOOD), (GOOD, SLOW), "even"),
    "less than a twentieth": ((times(1.96, 1.96), FAST), (GOOD, SLOW), "even"),
    "in one format alone": ((FAST, SLOW), (GOOD, GOOD), "even"),
    "by noise": ((NOISY, NOISY), (SLOW, SLOW), "even"),
    "slower in both formats": ((SLOW, SLOW), (GOOD, GOOD), "slower"),
    "slower than one format only": ((GOOD, GOOD), (FAST, SLOW), "even"),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_who_is_faster(name) -> None:
    ours, torchs, expected = DECISIONS[name]
    named = [dict(zip(contest.FORMATS, each, strict=True)) for each in (ours, torchs)]
    ratio, says = contest.decide(*named)
    assert says == expected
    worst, best = max(t.p50_ms for t in ours), min(t.p50_ms for t in torchs)
    assert ratio == pytest.approx(best / worst)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_contests_are_about_the_classes_they_are_named_after(device) -> None:
    from aspp_ext.evidence.rulings import size_class

    for name, (n, c, h, w) in contest.SHAPES[device].items():
        branches = 1 + len(contest.RATES[name])
        assert size_class(n * h * w * c * branches * contest.OUT_CHANNELS) == name


def listed(device: str, **keywords: Any) -> list[Case]:
    return cases.cases(device, "avx512", **keywords)


def test_what_is_worth_knowing_comes_first() -> None:
    on_gpu = listed("cuda")
    assert on_gpu[0] == Case(Cell("cuda", "atrous_pyramid", "bfloat16", "inference"), "right")
    assert {case.cell.implementation for case in on_gpu} == {"cuda", "triton"}
    cells = {case.cell for case in on_gpu}
    assert Cell("triton", "atrous_pyramid", "float64", "training") not in cells
    assert Cell("cuda", "atrous_pyramid", "float64", "training") in cells
    for cell in cells:
        own = [c.what for c in on_gpu if c.cell == cell]
        assert own == ["right", "medium", "large", "small"]
    by_precision = [p for p, _ in itertools.groupby(c.cell.precision for c in on_gpu)]
    assert by_precision == ["bfloat16", "tf32", "float16", "float32", "float64"]


def test_parts_of_it() -> None:
    quick = listed("cuda", quick=True)
    assert {case.cell.precision for case in quick} == {"bfloat16", "tf32"}
    assert {case.what for case in quick} == {"right", "medium"}
    only = listed("cpu", only="aspp_inference")
    assert {case.cell.operator for case in only} == {"aspp_inference"}
    assert {case.cell.mode for case in only} == {"inference"}


# What others have


@pytest.mark.parametrize(
    "sentence",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    ],
)
def test_what_others_have_says_nothing_of_a_kernel(sentence, monkeypatch) -> None:
    def judge(subject):
        raise RuntimeError(f"{sentence}\nmore lines")

    monkeypatch.setattr(command, "judge", judge)
    case = Case(Cell("cpu", "atrous_pyramid", "float32", "inference"), "right")
    result = command.solve((case, "cpu"), print)
    assert (result["result"], result["why"]) == ("unavailable", sentence)
    assert not command.is_final(result)


# Failures


def test_a_problem_is_shrunk_while_it_is_wrong() -> None:
    """Wrong is what has more than ten columns and a branch of rate 5."""

    def check(problem):
        if problem.shape[3] > 10 and any(b.rate == (5, 5) for b in problem.branches):
            raise Wrong("it is")

    subject = Subject(Cell("cpu", "atrous_pyramid", "float32", "inference"), "cpu")
    problem = PROBLEMS["prime_sizes"]
    wide = failure.replace(problem, shape=(3, 13, 7, 37), layout="sliced")
    with pytest.raises(failure.Failure) as found:
        failure.examine(subject, "pyramid", wide, check)
    least = found.value.page.partition("The least problem")[2]
    assert "x [1, 1, 1, 11] contiguous; 1 x 3x3 at 5x5; weights contiguous" in least


def test_what_breaks_while_it_is_described_is_still_told(monkeypatch) -> None:
    def broken(*arguments: Any) -> Iterator[str]:
        raise RuntimeError("no device any more")

    monkeypatch.setattr(failure, "_integers", broken)

    def check(problem):
        raise Wrong("result 0: it is", torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2))

    subject = Subject(Cell("cpu", "atrous_pyramid", "float32", "inference"), "cpu")
    with pytest.raises(failure.Failure, match="result 0: it is") as found:
        failure.examine(subject, "pyramid", PROBLEMS["one_branch"], check)
    assert "repeats: not known, RuntimeError: no device any more" in found.value.page


def test_blocks_of_k_tell_which_channels_are_wrong(monkeypatch) -> None:
    def wrong(x, *rest):
        return torch.ops.aspp_ext.atrous_pyramid(x.index_fill(1, torch.tensor([70]), 0.0), *rest)

    monkeypatch.setattr(Subject, "call", lambda self, op: wrong)
    subject = Subject(Cell("cpu", "atrous_pyramid", "float32", "inference"), "cpu")
    problem = PROBLEMS["channel_blocks"]
    (line,) = failure._blocks_of_k(subject, "pyramid", problem, Wrong(""))
    counts = dict(part.split(": ") for part in line.partition("argument: ")[2].split(", "))
    assert int(counts["1"]) > 0
    assert {counts[block] for block in "0234"} == {"0"}


def test_the_digest_of_the_engine_follows_its_sources(monkeypatch, tmp_path) -> None:
    before = command.digest_of_engine()
    (tmp_path / "verify").mkdir()
    (tmp_path / "testing").mkdir()
    (tmp_path / "reference.py").write_text("")
    monkeypatch.setattr(command, "PACKAGE", tmp_path)
    empty = command.digest_of_engine()
    (tmp_path / "verify" / "cases.py").write_text("# another")
    assert len({before, empty, command.digest_of_engine()}) == 3
