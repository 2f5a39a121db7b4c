# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's own machinery: order, gate, work counts, files. Nothing here is a speed."""

from __future__ import annotations

import csv
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from processes import said_by_python

from aspp_ext.testing import timing
from benchmarks import (
    contest,
    gate,
    machine,
    memory,
    modules,
    peers,
    polyphase,
    report,
    roofline,
    run,
)
from benchmarks.problems import PROBLEMS, QUICK, TARGETS, Problem

SMALL = {"channels": 8, "height": 7, "width": 5, "rates": (1, 2, 6), "out_channels": 4}
CEILINGS = roofline.Ceilings({"float32": 2e11, "bfloat16": 4e11}, 5e10)
FACTS = {
    "date": "2026-01-01",
    "commit": "abc",
    "device": "Some CPU",
    "threads": 2,
    "torch": "2.13",
    "onnxruntime": "",
    "openvino": "",
}
SETTINGS = contest.Settings(0.0, 1, 1, None, lambda problem: False)


def small(level="module", head="separable", **options):
    return Problem(level, head, **{**SMALL, **options})


def row(**values):
    fields = {"level": "module", "problem": "p", "dtype": "float32", "mode": "inference"}
    return report.Row(**{**FACTS, **fields, "contender": "c", "group": "ours", **values})


class Planted(peers.Eager):
    """Eager PyTorch whose first result is off by `error` in one element."""

    def __init__(self, error):
        super().__init__("NCHW")
        self.name, self.group, self.error = "planted", "other", error

    def build(self, module, example):
        call = super().build(module, example)

        def planted():
            first, *others = call()
            first = first.clone()
            first.view(-1)[3] += self.error
            return (first, *others)

        return planted


# Timing


def test_every_round_runs_every_contender_once():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abcd"}
    timings = timing.interleave(
        calls, budget_s=9.0, least_rounds=6, most_rounds=6, settle_s=0.0, warmup=2
    )
    assert order[:8] == list("aabbccdd")
    rounds = [order[start : start + 4] for start in range(8, len(order), 4)]
    assert len(rounds) == 6
    assert all(sorted(names) == list("abcd") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "the order must change between rounds"
    assert all(len(timed.samples) == 6 for timed in timings.values())


def test_samples_are_what_the_clock_says():
    ticks = itertools.count()
    timings = timing.interleave(
        {"a": lambda: next(ticks)},
        budget_s=9.0,
        most_rounds=3,
        least_rounds=3,
        settle_s=0.0,
        stopwatch=timing.by_clock(lambda: float(next(ticks))),
    )
    assert timings["a"].samples == (2.0, 2.0, 2.0)


def test_flush_comes_before_every_timed_call():
    events = []
    timing.interleave(
        {"a": lambda: events.append("call")},
        budget_s=0.0,
        least_rounds=2,
        settle_s=0.0,
        flush=lambda: events.append("flush"),
    )
    assert events == ["flush", "call"] * 3


def test_quartiles():
    timed = timing.Timing((0.004, 0.001, 0.003, 0.002, 0.005))
    assert (timed.p25_ms, timed.p50_ms, timed.p75_ms) == pytest.approx((2.0, 3.0, 4.0))
    assert timing.Timing((0.001, 0.002)).p50_ms == pytest.approx(1.5)


@pytest.mark.parametrize(("round_s", "rounds"), [(9.0, 3), (0.3, 5), (0.1, 10), (1e-6, 20)])
def test_rounds_follow_the_budget(round_s, rounds):
    assert timing.rounds_within(1.0, round_s, least=5, most=20) == rounds


def test_nothing_to_time_is_an_error():
    with pytest.raises(ValueError, match="at least one contender"):
        timing.interleave({}, budget_s=1.0)


# The gate


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_planted_wrong_contender_is_refused(mode):
    problem = small(mode=mode, batch=2)
    contenders = [peers.Eager("NCHW"), peers.Eager("NHWC"), Planted(0.01)]
    rows, failures = contest.Contest(problem, contenders, SETTINGS, CEILINGS, FACTS).run(
        lambda *_: None
    )
    by_name = {row.contender: row for row in rows}
    assert by_name["planted"].p50_ms is None
    assert by_name["planted"].note.startswith("wrong: result 0 may be off by")
    assert len(failures) == 1
    assert failures[0].startswith("planted: wrong")
    assert by_name["eager NCHW"].p50_ms > 0
    assert by_name["eager NHWC"].p50_ms > 0


def test_right_contender_passes_the_gate():
    contenders = [peers.Eager("NCHW"), Planted(0.0)]
    rows, failures = contest.Contest(small(), contenders, SETTINGS, CEILINGS, FACTS).run(
        lambda *_: None
    )
    assert not failures
    assert all(row.p50_ms is not None for row in rows)
    assert rows[1].vs_best_pytorch == pytest.approx(rows[0].p50_ms / rows[1].p50_ms)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda y: y[..., :-1], "must have shape"),
        (lambda y: torch.full_like(y, float("nan")), "got inf"),
        (lambda y: y + 1e-4, "may be off by"),
    ],
)
def test_gate_names_what_is_wrong(change, sentence):
    truth = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    checked = gate.Gate([truth], [[truth.float()]], torch.float32)
    assert checked.why_wrong([truth.float()]) is None
    assert sentence in checked.why_wrong([change(truth.float())])
    assert "expected 1 results, got 2" in checked.why_wrong([truth, truth])


def test_missing_contender_is_named_and_no_failure(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    contenders = [peers.Eager("NCHW"), peers.OnnxRuntime(True), peers.OpenVino(True)]
    rows, failures = contest.Contest(small(), contenders, SETTINGS, CEILINGS, FACTS).run(
        lambda *_: None
    )
    notes = {row.contender: row.note for row in rows}
    assert notes["ONNX Runtime"] == "onnxruntime is not installed"
    assert notes["OpenVINO"] == "openvino is not installed"
    assert not failures


# The contenders' modules


@pytest.mark.parametrize("head", ["separable", "dense"])
@pytest.mark.parametrize("level", ["module", "operator"])
def test_aspp_ext_contender_agrees(level, head):
    problem = small(level=level, head=head)
    contenders = [peers.Eager("NCHW"), peers.Ours("NCHW"), peers.Ours("NHWC")]
    rows, failures = contest.Contest(problem, contenders, SETTINGS, CEILINGS, FACTS).run(
        lambda *_: None
    )
    assert not failures
    assert all(row.p50_ms is not None for row in rows)


def test_plain_aspp_has_the_state_dict_of_ours():
    aspp_ext = pytest.importorskip("aspp_ext")
    for separable in (False, True):
        plain = modules.PlainASPP(8, (1, 2, 3), 4, separable, 0.5)
        ours = aspp_ext.ASPP(8, (1, 2, 3), 4, separable=separable)
        assert list(plain.state_dict()) == list(ours.state_dict())


# Work counts against numbers worked out by hand


def test_live_taps():
    assert roofline.live_taps(65, 3, 12) == 53 + 65 + 53
    assert roofline.live_taps(33, 3, 36) == 33
    assert roofline.live_taps(9, 5, 4) == 1 + 5 + 9 + 5 + 1


def test_live_taps_are_the_nonzero_products():
    ones = torch.ones(1, 1, 11, 7)
    hits = F.conv2d(ones, torch.ones(1, 1, 3, 3), padding=4, dilation=4).sum().item()
    assert hits == roofline.live_taps(11, 3, 4) * roofline.live_taps(7, 3, 4)


def test_dense_operator_work():
    problem = small("operator", "dense", height=4, width=3, rates=(2,))
    live = (2 + 4 + 2) * (1 + 3 + 1)
    flops = 2 * 8 * 4 * (12 + live)
    elements = 12 * 8 + (8 * 4 + 9 * 8 * 4) + 12 * 8
    assert roofline.work_of(problem) == roofline.Work(flops, 4 * elements)


def test_separable_operator_work():
    problem = small("operator", "separable", height=4, width=3, rates=(2,), batch=3)
    live = (2 + 4 + 2) * (1 + 3 + 1)
    flops = 3 * (2 * 8 * 4 * 12 + 2 * 8 * live + 2 * 8 * 4 * 12)
    elements = 3 * 12 * 8 + (8 * 4 + 9 * 8 + 8 * 4) + 3 * 12 * 8
    assert roofline.work_of(problem) == roofline.Work(flops, 4 * elements)


def test_module_and_training_work():
    operator = roofline.work_of(small("operator", "dense"))
    module = roofline.work_of(small("module", "dense"))
    head = 35 * 8 + 2 * (8 * 4 + 4 * 4) + 2 * 35 * 16 * 4
    assert module.flops == operator.flops + head
    training = roofline.work_of(small("module", "dense", mode="training"))
    assert training.flops == 3 * module.flops
    half = roofline.work_of(small("module", "dense", dtype="bfloat16"))
    assert half.bytes == module.bytes / 2
    assert roofline.work_of(small(level="model")) is None


def test_roofline_is_the_longer_of_both():
    assert CEILINGS.seconds(roofline.Work(4e11, 5e9), "float32") == pytest.approx(2.0)
    assert CEILINGS.seconds(roofline.Work(1e9, 1e11), "float32") == pytest.approx(2.0)
    timed = row(p50_ms=4000.0, useful_gflop=400.0, compulsory_mb=5000.0)
    timed = contest.with_roofline(timed, CEILINGS)
    assert (timed.gflop_per_s, timed.gb_per_s) == pytest.approx((100.0, 1.25))
    assert timed.roofline_share == pytest.approx(0.5)


def test_ceilings_can_only_rise():
    higher = roofline.Ceilings({"float32": 3e11, "bfloat16": 1e11}, 4e10)
    raised = CEILINGS.raised_to(higher)
    assert raised == roofline.Ceilings({"float32": 3e11, "bfloat16": 4e11}, 5e10)


# Files


def example_rows():
    timed = {"rounds": 7, "p25_ms": 0.9, "p75_ms": 1.125, "useful_gflop": 2.0, "compulsory_mb": 8.0}
    rows = [
        row(level=report.MACHINE, problem="peak float32", gflop_per_s=200.0),
        row(level=report.MACHINE, problem="copy bandwidth", dtype="", gb_per_s=50.0),
    ]
    names = {"aspp_ext NCHW": "ours", "eager NCHW": "pytorch", "ONNX Runtime": "other"}
    for target in TARGETS[:4:2]:
        level, problem, dtype, mode = target.problem.key
        key = {"level": level, "problem": problem, "dtype": dtype, "mode": mode}
        for speed, (name, group) in enumerate(names.items(), 1):
            rows.append(row(**key, contender=name, group=group, p50_ms=1.0 * speed, **timed))
        rows.append(row(**key, contender="OpenVINO", group="other", note='not "installed", alas'))
    rated = [contest.rate(r, [s for s in rows if s.key == r.key]) for r in rows]
    return [contest.with_roofline(r, CEILINGS) for r in rated]


def test_csv_round_trip(tmp_path):
    rows = example_rows()
    report.write_csv(tmp_path / "deep" / "file.csv", rows)
    back = report.read_csv(tmp_path / "deep" / "file.csv")
    assert back == [
        dataclasses.replace(
            r,
            **{k: float(f"{v:.6g}") for k, v in dataclasses.asdict(r).items() if type(v) is float},
        )
        for r in rows
    ]


def test_readme_round_trip(tmp_path):
    path = tmp_path / "README.md"
    before, after = "# Title\n", "\n\nMore words.\n"
    path.write_text(f"{before}{report.BEGIN}\nold\n{report.END}{after}")
    table = report.readme_table(example_rows())
    for _ in range(2):
        assert report.refresh_readme(path, table)
        assert path.read_text() == f"{before}{report.BEGIN}\n{table}\n{report.END}{after}"
    assert "| **1 / —** | 2 / — | — | 3 | — | 2.00x | 3.00x |" in table
    assert "ONNX Runtime missing" in table


def test_readme_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Title\n")
    assert not report.refresh_readme(path, "table")
    assert not report.refresh_readme(tmp_path / "absent.md", "table")
    assert path.read_text() == "# Title\n"
    with pytest.raises(ValueError, match="expected the markers"):
        report.replace_between_markers("# Title\n", "table")


def test_verdicts():
    texts = [verdict.text for verdict in report.verdicts(example_rows())]
    assert texts[:5] == ["short", "met", "met", "met", "not measured"]
    assert len(texts) == len(TARGETS)


def test_memory_is_held_against_the_input():
    (target, *_) = [t for t in TARGETS if t.against == "input"]
    level, problem, dtype, mode = target.problem.key
    key = {"level": level, "problem": problem, "dtype": dtype, "mode": mode}
    assert target.problem.input_bytes == 4 * 2048 * 65 * 65
    for extra, text in ((33.0, "met"), (34.0, "above")):
        both = {"aspp_ext NCHW": extra, "aspp_ext NHWC": 50.0}
        rows = [row(**key, contender=c, peak_extra_mib=mib) for c, mib in both.items()]
        (verdict,) = report.verdicts(rows, [target])
        assert verdict.got == pytest.approx(extra * 2**20 / target.problem.input_bytes)
        assert verdict.text == text
    (verdict,) = report.verdicts([row(**key, contender="aspp_ext NCHW")], [target])
    assert verdict.text == "not measured"


def test_tables_and_plots_are_drawn(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    pytest.importorskip("matplotlib")
    rows = example_rows()
    assert report.target_table(rows).row_count == len(TARGETS)
    assert report.problem_table(rows[2:6]).row_count == 4
    for path in plots.draw_all(rows, tmp_path / "device"):
        assert path.read_bytes().startswith(b"\x89PNG")


# Tables


def test_every_target_is_in_the_default_set():
    assert {target.problem for target in TARGETS} <= set(PROBLEMS)
    assert len({problem.key for problem in PROBLEMS}) == len(PROBLEMS)
    assert len({problem.key for problem in QUICK}) == len(QUICK)


def test_slug():
    assert machine.slug("Some(R) CPU 9000+ @ 2", 4) == "some-r-cpu-9000-2-4t"


def test_memory_is_measured_where_a_target_is_about_it():
    about = {target.problem for target in TARGETS if target.against == "input"}
    measured = {p for p in PROBLEMS if run.measures_memory(p)}
    assert about < measured
    assert {p.head for p in measured - about} == {"separable"}


def test_what_a_module_keeps_is_counted_by_itself(monkeypatch):
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    module, x = small(head="dense").build()
    for contender in (peers.Eager("NHWC"), peers.Ours("NHWC")):
        converted = contender.convert(module)
        with torch.no_grad():
            kept = [contender.keep(converted, x) for _ in range(2)]
        assert kept[0] == kept[1]
        assert (kept[0] > 0) == (contender.group == "ours")


def test_memory_sees_an_allocation():
    if memory.why_not() is not None:
        pytest.skip(memory.why_not())
    program = (
        "import torch; from benchmarks.memory import resident_kib; before = resident_kib('VmRSS');"
        "torch.ones(16 * 2**18); print(resident_kib('VmHWM') - before)"  # 16 MiB, freed at once
    )
    # A process that has freed much takes memory from what it has kept.
    assert int(said_by_python(program)) >= 8 * 1024


# Minimal filtering


def quick_rows(folder):
    assert polyphase.main(["--quick", "--out", str(folder)]) in (0, 1)
    (path,) = folder.glob("*-polyphase.csv")
    return list(csv.DictReader(path.open(newline="")))


def test_minimal_filtering_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    rows = quick_rows(tmp_path)
    assert [row["branch"] for row in rows] == ["rate 6", "rate 12", "rate 18", "pyramid"]
    for row in rows:
        assert float(row["products"]) < float(row["live_taps"])
        assert float(row["prepared_mb"]) > 0
        if not row["note"]:  # right, hence timed
            shares = [float(row[f"{step}_share"]) for step in ("inputs", "products", "outputs")]
            assert sum(shares) == pytest.approx(1.0, abs=1e-4)
            ways = [float(row[f"{way}_p50_ms"]) for way in polyphase.WAYS]
            assert float(row["ratio"]) == pytest.approx(ways[0] / ways[1], rel=1e-4)
    # One live tap is one product of the 1x1 branch, which is never filtered minimally.
    parts = sum(float(row["products"]) for row in rows[:3]) + 1
    assert float(rows[3]["products"]) == pytest.approx(parts, rel=1e-4)


def test_what_is_not_filtered_runs_directly_both_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "0")
    for row in quick_rows(tmp_path):
        assert not row["note"]
        assert row["products"] == row["live_taps"]
        assert float(row["modelled"]) == 1
        assert row["minimal_error"] == row["direct_error"]
        assert row["products_share"] == ""


def test_wrong_minimal_filtering_is_not_timed(monkeypatch):
    call = polyphase.Part.call

    def planted(part, way):
        y = call(part, way)
        return y + 0.01 if (part.name, way) == ("rate 12", "minimal") else y

    monkeypatch.setattr(polyphase.Part, "call", planted)
    with torch.no_grad():
        rows = polyphase.measure(polyphase.QUICK[0], 0.0, 1)
    by_name = {row.branch: row for row in rows}
    assert by_name["rate 12"].note.startswith("minimal: wrong: result 0 may be off by")
    assert by_name["rate 12"].ratio is None
    assert by_name["rate 6"].ratio > 0
    lines = polyphase.table(rows).splitlines()
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert by_name["rate 12"].note in lines[-3]
