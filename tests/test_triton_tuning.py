# SPDX-License-Identifier: BSD-3-Clause
"""Tiles are measured only where that is asked for, once, and what was found is kept."""

from __future__ import annotations

import json
import os

import pytest
import torch

tuning = pytest.importorskip("aspp_ext.triton.tuning", reason="Triton is not installed")
from aspp_ext.triton.configurations import Configuration  # noqa: E402
from aspp_ext.triton.target import Target  # noqa: E402

TARGET = Target(torch.device("cpu"), "sm_90", 132, 232448)
CANDIDATES = [Configuration(128, n, 64, 8, 4) for n in (256, 128, 64)]
PROBLEM = ("forward", torch.bfloat16, 8, 65, 65)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The candidates that were measured; the narrower the faster."""
    seen: list[Configuration] = []

    def milliseconds(launch, candidate):
        seen.append(candidate)
        launch(candidate)
        return float(candidate.n)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_records", None)
    monkeypatch.setenv("ASPP_EXT_TRITON_RECORDS", str(tmp_path / "deep" / "records.json"))
    monkeypatch.delenv("ASPP_EXT_TRITON_TUNE", raising=False)
    return seen


def choose(problem=PROBLEM, target=TARGET, candidates=CANDIDATES) -> Configuration:
    return tuning.choose(target, problem, candidates, lambda candidate: None)


def forget(monkeypatch) -> None:
    """As another process would find it."""
    monkeypatch.setattr(tuning, "_records", None)


def test_nothing_is_measured_unasked(measured, monkeypatch) -> None:
    assert choose() == CANDIDATES[0]
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "read")
    assert choose() == CANDIDATES[0]
    assert measured == []
    assert not tuning.path().exists()


def test_the_fastest_is_kept(measured, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "1")
    assert choose() == CANDIDATES[2]
    assert measured == CANDIDATES
    forget(monkeypatch)
    assert choose() == CANDIDATES[2]
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "read")
    assert choose() == CANDIDATES[2]
    assert measured == CANDIDATES
    monkeypatch.delenv("ASPP_EXT_TRITON_TUNE")
    assert choose() == CANDIDATES[0]


def test_records_are_of_one_problem_on_one_device(measured, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "1")
    choose()
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "read")
    assert choose((*PROBLEM, 1)) == CANDIDATES[0]
    assert choose(target=TARGET._replace(architecture="sm_80")) == CANDIDATES[0]
    monkeypatch.setattr(tuning.triton, "__version__", "0.0")
    assert choose() == CANDIDATES[0]


def test_other_processes_records_stay(measured, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "1")
    choose()
    records = json.loads(tuning.path().read_text()) | {"another": [64, 64, 64, 4, 4]}
    tuning.path().write_text(json.dumps(records))
    choose((*PROBLEM, 2))
    assert len(json.loads(tuning.path().read_text())) == 3
    assert [p.name for p in tuning.path().parent.iterdir()] == ["records.json"]


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2]}', DEEP])
def test_a_file_that_is_no_records_counts_as_empty(text, measured, monkeypatch) -> None:
    tuning.path().parent.mkdir()
    tuning.path().write_text(text)
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "1")
    assert choose() == CANDIDATES[2]
    assert len(json.loads(tuning.path().read_text())) == 1


def test_a_record_that_is_no_candidate_any_more_is_measured_again(measured, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "1")
    choose()
    assert choose(candidates=CANDIDATES[:2]) == CANDIDATES[1]
    assert measured == [*CANDIDATES, *CANDIDATES[:2]]


def test_numbers_may_be_written_otherwise(measured, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "1")
    choose()
    (record,) = json.loads(tuning.path().read_text()).items()
    tuning.path().write_text(json.dumps({record[0]: [float(n) for n in record[1]]}))
    forget(monkeypatch)
    found = choose()
    assert found == CANDIDATES[2]
    assert all(type(n) is int for n in found)


def test_a_pipe_is_not_waited_for(measured, monkeypatch) -> None:
    tuning.path().parent.mkdir()
    os.mkfifo(tuning.path())
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "read")
    assert choose() == CANDIDATES[0]


def test_a_capture_measures_nothing(measured, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "1")
    monkeypatch.setattr(Target, "is_capturing", lambda self: True)
    assert choose() == CANDIDATES[0]
    assert measured == []


def test_an_unknown_word_is_refused(measured, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_TRITON_TUNE", "yes")
    with pytest.raises(ValueError, match="ASPP_EXT_TRITON_TUNE must be 1 or read, got 'yes'"):
        choose()
