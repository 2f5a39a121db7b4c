# SPDX-License-Identifier: BSD-3-Clause
"""Results as rows of a CSV file, as a table in the terminal, as tables in the READMEs.

Run alone it redraws tables and plots from a results file: python -m benchmarks.report FILE.csv
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import csv_file
from benchmarks.problems import DEFAULTS, TARGETS, Target

MARKERS = BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
AGAINST = {
    "pytorch": "PyTorch",
    "other": "ONNX Runtime, OpenVINO",
    "memory": "PyTorch, peak memory (at most)",
    "input": "the input's size, extra memory (at most)",
}
FORMATS = (" NCHW", " NHWC")
MACHINE = "machine"  # the level of the rows that hold the measured ceilings


@dataclass(frozen=True)
class Row:
    """One contender on one problem. Empty fields are None; times are of single calls."""

    date: str
    commit: str
    device: str
    threads: int
    torch: str
    onnxruntime: str
    openvino: str
    level: str
    problem: str
    dtype: str
    mode: str
    contender: str
    group: str
    rounds: int | None = None
    p25_ms: float | None = None
    p50_ms: float | None = None
    p75_ms: float | None = None
    useful_gflop: float | None = None
    gflop_per_s: float | None = None
    compulsory_mb: float | None = None
    gb_per_s: float | None = None
    roofline_share: float | None = None
    vs_best_pytorch: float | None = None
    vs_best_other: float | None = None
    peak_extra_mib: float | None = None
    note: str = ""
    architecture: str = ""
    cuda: str = ""
    cudnn: str = ""
    triton: str = ""
    host_ms: float | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The same four words as `Problem.key`."""
        return (self.level, self.problem, self.dtype, self.mode)

    @property
    def title(self) -> str:
        extra = [word for word in (self.dtype, self.mode) if word not in DEFAULTS]
        return ", ".join([self.problem, *extra])


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    csv_file.write(path, [field.name for field in fields(Row)], map(vars, rows))


def read_csv(path: Path) -> list[Row]:
    def parse(kind: str, text: str) -> object:
        if kind == "str":
            return text
        if text == "":
            return None
        return int(text) if kind.startswith("int") else float(text)

    with path.open(newline="") as file:
        return [
            Row(
                **{
                    field.name: parse(str(field.type), line.get(field.name, ""))
                    for field in fields(Row)
                }
            )
            for line in csv.DictReader(file)
        ]


def by_problem(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """The rows of each problem, in file order, without the machine's ceilings."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.level != MACHINE:
            groups.setdefault(row.key, []).append(row)
    return groups


def best(rows: Iterable[Row], group: str) -> Row | None:
    """The fastest timed row of a group, or None."""
    timed = [row for row in rows if row.group == group and row.p50_ms is not None]
    return min(timed, key=lambda row: row.p50_ms or 0.0) if timed else None


def without_format(contender: str) -> str:
    """A contender's name without the memory format that ends it."""
    return contender[:-5] if contender.endswith(FORMATS) else contender


def of_contender(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of one contender, in whichever memory format."""
    return [row for row in rows if without_format(row.contender) == name]


def number(value: float | None, pattern: str = "{:.3g}") -> str:
    if value is None:
        return "—"
    return f"{value:.0f}" if value >= 100 and pattern == "{:.3g}" else pattern.format(value)


def ratio(value: float | None) -> str:
    return number(value, "{:.2f}x")


def percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, "{:.0f} %")


def problem_table(rows: Sequence[Row]) -> Table:
    """One problem's contenders for the terminal; a contender without a time shows its reason."""
    table = Table(title=f"{rows[0].level}: {rows[0].title}", title_justify="left")
    table.add_column("contender")
    on_a_device = any(row.host_ms is not None for row in rows)
    unit, scale = ("TFLOP/s", 1e3) if on_a_device else ("GFLOP/s", 1.0)
    heads = ("p50 ms", "p25", "p75", unit, "roofline", "vs PyTorch", "vs others", "peak MiB")
    for text in [*heads, *["host ms"] * on_a_device]:
        table.add_column(text, justify="right")
    table.add_column("note")
    for row in rows:
        style = "bold green" if row.group == "ours" else ""
        times = [number(row.p50_ms), number(row.p25_ms), number(row.p75_ms)]
        speed = row.gflop_per_s and row.gflop_per_s / scale
        shares = [number(speed), percent(row.roofline_share)]
        ratios = [ratio(row.vs_best_pytorch), ratio(row.vs_best_other)]
        peak = number(row.peak_mib or row.peak_extra_mib, "{:.0f}")
        cells = [*times, *shares, *ratios, peak, *[number(row.host_ms)] * on_a_device]
        table.add_row(row.contender, *cells, escape(row.note), style=style)
    return table


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; `got` is None where a side was not timed."""

    target: Target
    got: float | None

    @property
    def text(self) -> str:
        if self.got is None:
            return "not measured"
        if self.target.against in ("memory", "input"):
            return "met" if self.got <= self.target.ratio else "above"
        return "met" if self.got >= self.target.ratio else "short"


def least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value), default=None)


def measured(target: Target, rows: Sequence[Row]) -> float | None:
    """The ratio that a target is about, from the rows of its problem."""
    own = of_contender(rows, target.contender)
    if target.against == "memory":
        peak = least(row.peak_mib for row in own)
        pytorch = least(row.peak_mib for row in rows if row.group == "pytorch")
        return peak / pytorch if peak and pytorch else None
    if target.against == "input":
        extra = least(row.peak_extra_mib for row in own)
        return extra and extra * 2**20 / target.problem.input_bytes
    ours = best(own, "ours")
    if ours is None or target.against in ("pytorch", "other"):
        return ours and (
            ours.vs_best_pytorch if target.against == "pytorch" else ours.vs_best_other
        )
    named = [row for row in rows if row.contender.startswith(target.against)]
    rival = best(named, "pytorch")
    return rival and rival.p50_ms / ours.p50_ms


def verdicts(rows: Iterable[Row], targets: Iterable[Target] = TARGETS) -> list[Verdict]:
    """Every target with the ratio of its contender's faster format to the best of the rest."""
    groups = by_problem(rows)
    return [
        Verdict(target, measured(target, groups.get(target.problem.key, []))) for target in targets
    ]


def target_table(rows: Iterable[Row], targets: Iterable[Target] = TARGETS) -> Table:
    table = Table(title="Speed to reach (for information)", title_justify="left")
    table.add_column("problem")
    table.add_column("contender")
    table.add_column("against the best of")
    for text in ("target", "got"):
        table.add_column(text, justify="right")
    table.add_column("")
    styles = {"met": "green", "short": "red", "above": "red", "not measured": "yellow"}
    for verdict in verdicts(rows, targets):
        target = verdict.target
        against = AGAINST.get(target.against, target.against)
        words = [target.problem.title, target.contender, against]
        ratios = [ratio(target.ratio), ratio(verdict.got)]
        table.add_row(*words, *ratios, f"[{styles[verdict.text]}]{verdict.text}")
    return table


def conditions(row: Row) -> str:
    """Where, when and with what a run was made, in one line."""
    if row.architecture:
        return (
            f"{row.device} ({row.architecture}), torch {row.torch}, CUDA {row.cuda}, "
            f"cuDNN {row.cudnn}, Triton {row.triton}; {row.date}, commit {row.commit}"
        )
    others = [("ONNX Runtime", row.onnxruntime), ("OpenVINO", row.openvino)]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in others)
    return (
        f"{row.device}, {row.threads} threads, torch {row.torch}, {versions}; "
        f"{row.date}, commit {row.commit}"
    )


def readme_table(rows: Sequence[Row]) -> str:
    """The Markdown summary: one line a problem, medians in milliseconds."""
    pairs = ("aspp_ext", "eager", "compile")
    singles = ("ONNX Runtime", "OpenVINO")
    lines = [
        "Medians in ms, NCHW / NHWC input; batch 1, float32 and inference unless said. `compile` "
        "is `torch.compile` with frozen weights, — was not run. The last two columns: how many "
        "times as fast as the best of PyTorch and of the other runtimes that did run. "
        f"{conditions(rows[0])}.",
        "",
        "| | aspp_ext | eager | compile | ONNX Runtime | OpenVINO | vs PyTorch | vs others |",
        "|---|" + "---:|" * 7,
    ]
    for (level, *_), group in by_problem(rows).items():
        times = {row.contender: number(row.p50_ms) for row in group}
        cells = [
            " / ".join(times.get(f"{name} {layout}", "—") for layout in ("NCHW", "NHWC"))
            for name in pairs
        ]
        cells = ["—" if set(cell) <= set("— /") else cell for cell in cells]
        ours = best(group, "ours")
        cells += [times.get(name, "—") for name in singles]
        cells += [ratio(ours and ours.vs_best_pytorch), ratio(ours and ours.vs_best_other)]
        lines.append(f"| {level}: {group[0].title} | **{cells[0]}** | {' | '.join(cells[1:])} |")
    return "\n".join(lines)


def targets_markdown(rows: Sequence[Row]) -> str:
    """The targets as Markdown, for the page that explains the figures."""
    lines = [
        f"{conditions(rows[0])}.",
        "",
        "| module | against the best of | target | got | |",
        "|---|---|---:|---:|---|",
    ]
    for verdict in verdicts(rows):
        problem, target = verdict.target.problem, verdict.target
        extra = [word for word in (problem.dtype, problem.mode) if word not in DEFAULTS]
        name = ", ".join([problem.name, *extra])
        cells = [
            name,
            AGAINST[target.against],
            ratio(target.ratio),
            ratio(verdict.got),
            verdict.text,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_between_markers(text: str, table: str, markers: tuple[str, str] = MARKERS) -> str:
    """`text` with what stands between the markers replaced by `table`.

    Raises:
        ValueError: when the text has no such pair of markers.
    """
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"expected the markers {' and '.join(markers)}, got a text without them")
    return f"{before}{begin}\n{table}\n{end}{after}"


def refresh_readme(path: Path, table: str, markers: tuple[str, str] = MARKERS) -> bool:
    """Rewrites the table in a README; False where there is no such file or no markers in it."""
    if not path.is_file():
        return False
    text = path.read_text()
    if any(marker not in text for marker in markers):
        return False
    path.write_text(replace_between_markers(text, table, markers))
    return True


def main(arguments: Sequence[str]) -> None:
    from benchmarks.plots import draw_all

    console = Console()
    for name in arguments:
        rows = read_csv(Path(name))
        for group in by_problem(rows).values():
            console.print(problem_table(group))
        console.print(target_table(rows))
        for path in draw_all(rows, Path(name).with_suffix("")):
            console.print(f"drew {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
