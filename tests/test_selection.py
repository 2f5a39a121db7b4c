# SPDX-License-Identifier: BSD-3-Clause
"""Which tests a process takes, by their markers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gpu_cases
import pytest
import selection

from aspp_ext.testing import PROBLEMS
from scripts import steps

kernels, prove, quick = pytest.mark.kernels, pytest.mark.prove, pytest.mark.quick
settings = pytest.mark.settings


def item(*marks, of_file=(), of_parameters=(), tier=None, setting=None, **params):
    """``marks`` are a test's own, from the closest on, as pytest gives them."""
    own, file = ([m.mark if isinstance(m, pytest.MarkDecorator) else m for m in given]
                 for given in ((*marks, *of_parameters), of_file))  # fmt: skip
    parameters = own[len(marks) :]
    nodes = [*(("test", mark) for mark in own), *(("file", mark) for mark in file)]
    return SimpleNamespace(
        nodeid="test",
        iter_markers=lambda name=None: (m for _, m in nodes if name in (None, m.name)),
        iter_markers_with_node=lambda name: (each for each in nodes if each[1].name == name),
        callspec=SimpleNamespace(params=params, marks=parameters),
        config=SimpleNamespace(option=SimpleNamespace(tier=tier, setting=setting)),
    )


BOTH, EMULATED = kernels("cpu", "emulated"), kernels("emulated")


@pytest.mark.parametrize(
    ("of_file", "of_test", "of_parameters", "chosen_on"),
    [
        ([], [], [], ["cpu"]),
        ([EMULATED], [], [], ["emulated"]),
        ([EMULATED], [BOTH], [], ["cpu", "emulated"]),  # a test goes before its file
        # A parameter leaves fewer.
        ([BOTH], [], [kernels("emulated", "interpreted")], ["emulated"]),
        ([EMULATED], [], [BOTH], ["emulated"]),
        ([], [], [BOTH], ["cpu"]),
        ([EMULATED], [BOTH], [kernels("cpu", "interpreted"), BOTH], ["cpu"]),
    ],
)
def test_kernels(of_file, of_test, of_parameters, chosen_on, monkeypatch) -> None:
    found = []
    test = item(*of_test, of_file=of_file, of_parameters=of_parameters)
    for name in selection.ALL_KERNELS:
        monkeypatch.setattr(selection, "KERNELS", name)
        found += [name] if selection.is_chosen(test) else []
    assert found == chosen_on


def on_few(size):
    return size < 3


@pytest.mark.parametrize(
    ("marks", "left"),
    [
        ([], []),
        ([prove], ["cpu 1", "cpu 5", "interpreted 1", "interpreted 5"]),
        ([prove("interpreted")], ["interpreted 1", "interpreted 5"]),
        ([quick(when=on_few)], ["cpu 5", "interpreted 5"]),
        ([quick("interpreted", when=on_few)], ["interpreted 5"]),
        ([quick, prove], []),
        ([prove, quick], ["cpu 1", "cpu 5", "interpreted 1", "interpreted 5"]),
        ([quick("cpu", when=on_few), prove], ["cpu 5", "interpreted 1", "interpreted 5"]),
    ],
)
def test_tiers(marks, left, monkeypatch) -> None:
    """What is left to `make prove`, and that it has everything that `make test` has not."""
    found = []
    for name in ("cpu", "interpreted"):
        monkeypatch.setattr(selection, "KERNELS", name)
        for size in (1, 5):
            tiers = [
                selection.is_chosen(item(*marks, kernels(name), tier=tier, size=size))
                for tier in ("test", "prove")
            ]
            assert sum(tiers) == 1
            assert selection.is_chosen(item(*marks, kernels(name), size=size))
            found += [f"{name} {size}"] if tiers[1] else []
    assert found == left


def test_settings() -> None:
    assert not selection.is_chosen(item(setting="isa"))
    assert not selection.is_chosen(item(settings("threads"), setting="isa"))
    assert selection.is_chosen(item(settings("threads"), settings("isa"), prove, setting="isa"))


@pytest.mark.parametrize(
    ("marks", "sentence"),
    [
        ([kernels("emulate")], r"kernels takes .*'emulated'.*, got \['emulate'\]"),
        ([prove("isa")], r"prove takes .*, got \['isa'\]"),
        ([settings("threads", "isas")], r"settings takes .*, got \['isas'\]"),
        ([settings()], "settings takes .*, got none"),
        ([quick(when=lambda size, sizes: True)], r"takes .*\['size'\], got \['sizes'\]"),
        ([quick(if_=on_few)], r"quick takes when=, got \['if_'\]"),
        ([kernels("cpu"), kernels("emulated")], "leave no kernels to run on"),
        ([kernels("emulated"), pytest.mark.gpu], "in the CPU's process alone"),
    ],
)
def test_what_would_never_run_is_refused(marks, sentence) -> None:
    with pytest.raises(pytest.Collector.CollectError, match=f"^test: .*{sentence}"):
        selection.check([item(), item(*marks, size=3)])
    right = [kernels("cpu", "emulated"), kernels("emulated"), settings("isa"), quick(when=on_few)]
    selection.check([item(*right, size=3)])


def test_a_test_of_tritons_kernels_is_known_by_its_parameters() -> None:
    by_cuda, by_triton = gpu_cases.BY_CUDA, gpu_cases.BY_TRITON
    run = next(run for run in gpu_cases.RUNS if run.by is by_triton)
    assert selection.is_of_triton(item(by=by_triton))
    assert selection.is_of_triton(item(run=run, problem=PROBLEMS["aspp"]))
    assert not selection.is_of_triton(item(by=by_cuda, name="triton"))
    assert not selection.is_of_triton(SimpleNamespace())


def test_steps_cover_every_kind() -> None:
    """Each kernels' tests in both tiers, and each setting."""
    plan = [*steps.test_steps(), *steps.proof_steps()]
    ran = {(step.environment.get("ASPP_EXT_LIBRARY_DIR"), option)
           for step in plan for option in step.command if step.is_suite}  # fmt: skip
    for folder in (None, steps.EMULATED):
        assert {(folder, "--tier=test"), (folder, "--tier=prove")} <= ran
    interpreted = [step for step in plan if step.environment.get("TRITON_INTERPRET") == "1"]
    assert {step.command[-1] for step in interpreted} == {"--tier=test", "--tier=prove"}
    assert {f"--setting={name}" for name in selection.SETTINGS} <= {option for _, option in ran}
    names = [step.name for step in plan]
    assert len(set(names)) == len(names)
    for step in plan:  # behind what it needs: the library, and what else it reads
        assert all(names.index(needed) < names.index(step.name) for needed in step.needs)
        assert not step.is_suite or "build" in step.needs
        folder = step.environment.get("ASPP_EXT_LIBRARY_DIR")
        if step.is_suite and folder:
            built = plan[names.index(step.needs[-1])]
            assert built.environment["ASPP_EXT_LIBRARY_DIR"] == folder


def test_what_has_passed_is_written_down_and_left_out(tmp_path) -> None:
    """If its teardown has passed, too."""
    file = tmp_path / "some.passed"
    writer = selection.Passed(file)
    for name, when, passed in (
        *[("a.py::one", when, True) for when in ("setup", "call", "teardown")],
        *[("a.py::two", when, when != "call") for when in ("setup", "call", "teardown")],
        *[("a.py::three", when, when != "teardown") for when in ("setup", "call", "teardown")],
        *[("a.py::skipped", when, when != "setup") for when in ("setup", "teardown")],
    ):
        writer.pytest_runtest_logreport(SimpleNamespace(nodeid=name, when=when, passed=passed))
    assert not file.exists()
    assert file.with_suffix(".new").read_text() == "a.py::one\n"


def test_what_no_time_is_left_for_is_counted_apart(request, monkeypatch, tmp_path) -> None:
    """The first test is in time, whatever was before it."""
    clock = SimpleNamespace(monotonic=iter([10.0, 12.0, 12.5]).__next__)
    monkeypatch.setattr(selection, "time", clock)
    option = SimpleNamespace(seconds=2)
    late = SimpleNamespace(config=SimpleNamespace(option=option, stash={}))
    reports = []
    calls = [lambda: selection.skip_when_out_of_time(late)] * 3
    for call in (*calls, lambda: pytest.skip("no GPU")):
        said = pytest.CallInfo.from_call(call, "setup")
        reports.append(pytest.TestReport.from_item_and_call(request.node, said))
    statuses = [selection.status_of_late(report) for report in reports]
    assert statuses == [None, None, (selection.LATE, "", ""), None]
    reporter = SimpleNamespace(
        stats={selection.LATE: reports[2:3], "passed": [1, 2], "deselected": [3]},
        config=SimpleNamespace(option=SimpleNamespace(counts=tmp_path / "counts")),
    )
    selection.write_counts(reporter)
    assert json.loads((tmp_path / "counts").read_text()) == {"passed": 2, steps.LATE: 1}
