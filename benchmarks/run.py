# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark: `python -m benchmarks.run`, or `make bench`.

Builds every contender of every problem, refuses to time one whose results are wrong, times the
others in interleaved rounds, and writes a CSV file, plots and the READMEs' tables. Exits with 1
when a result was refused or aspp_ext could not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)  # run as a file: its folder hides the package of the same name

from aspp_ext.testing import timing  # noqa: E402
from benchmarks import machine, peers, report  # noqa: E402
from benchmarks.contest import Contest, Settings, with_roofline  # noqa: E402
from benchmarks.problems import DEFAULTS, PROBLEMS, QUICK, Problem  # noqa: E402
from benchmarks.roofline import Ceilings, measure_ceilings  # noqa: E402

OUT_OF_TIME = "left out, the time limit is spent"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="three small problems, a minute")
    length.add_argument("--full", action="store_true", help="every peer everywhere, more rounds")
    parser.add_argument("--only", metavar="TEXT", help="problems whose title contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the problems and stop")
    parser.add_argument("--threads", type=int, help="threads of every contender")
    parser.add_argument("--flush", action="store_true", help="empty the caches before each call")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="leave out what would end later"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="timing of one problem")
    parser.add_argument("--out", type=Path, help="folder of the CSV file and the plots")
    parser.add_argument("--no-readme", action="store_true", help="leave the READMEs alone")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Problem]:
    problems = QUICK if options.quick else PROBLEMS
    return [p for p in problems if not options.only or options.only in p.title]


def settings_of(options: argparse.Namespace) -> Settings:
    budget = options.budget or (2.0 if options.quick else 40.0 if options.full else 6.0)
    return Settings(
        budget_s=budget,
        least_rounds=3 if options.quick else 5,
        most_rounds=100 if options.full else 40,
        flush=timing.cache_flusher() if options.flush else None,
        measure_memory=lambda p: options.full or measures_memory(p),
    )


def measures_memory(problem: Problem) -> bool:
    """By default: where the kernels are made to need little of it."""
    if problem.separable:
        return problem.level == "operator"
    return problem.level == "module" and (problem.dtype, problem.mode) == DEFAULTS


def machine_rows(facts: dict[str, str | int], ceilings: Ceilings) -> list[report.Row]:
    """The measured ceilings as rows, so that a results file can be redrawn on its own."""
    common = {**facts, "level": report.MACHINE, "mode": "", "contender": "", "group": ""}
    rows = [
        report.Row(**common, problem=f"peak {dtype}", dtype=dtype, gflop_per_s=flops / 1e9)
        for dtype, flops in ceilings.flops.items()
    ]
    copy = {"problem": "copy bandwidth", "dtype": "", "gb_per_s": ceilings.bandwidth / 1e9}
    return [*rows, report.Row(**common, **copy)]


def expected_seconds(durations: Sequence[float]) -> float:
    """How long the next problem may take: a quarter more than the last ones did on average."""
    last = durations[-3:]
    return 1.25 * sum(last) / len(last) if last else 0.0


def run_all(
    problems: Sequence[Problem],
    settings: Settings,
    contenders: Sequence[peers.Contender],
    limit_s: float,
    console: Console,
) -> tuple[list[report.Row], list[str]]:
    """Runs the problems one after the other; returns the rows and what went wrong."""
    start = time.perf_counter()
    facts = machine.facts()
    ceilings = measure_ceilings(problem.dtype for problem in problems)
    peaks = ", ".join(f"{name} {flops / 1e9:.0f}" for name, flops in ceilings.flops.items())
    console.print(
        f"{facts['device']}, {facts['threads']} threads: matrix product GFLOP/s {peaks}; "
        f"copy {ceilings.bandwidth / 1e9:.1f} GB/s"
    )
    rows: list[report.Row] = []
    failures: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("problems", total=len(problems))
        step = progress.add_task("", total=None)
        durations: list[float] = []
        for place, problem in enumerate(problems, 1):
            began = time.perf_counter()
            if not console.is_terminal:  # no moving bar there
                console.print(f"[dim]{place}/{len(problems)} {problem.title}")

            def on_step(what: str, done: int | None = None, total: int | None = None) -> None:
                progress.update(step, description=what, completed=done or 0, total=total)

            # A ceiling measured while something else ran is too low: try again, keep the higher.
            ceilings = ceilings.raised_to(measure_ceilings(ceilings.flops, budget_s=0.1))
            contest = Contest(problem, contenders, settings, ceilings, facts)
            progress.advance(whole)
            if began - start + expected_seconds(durations) > limit_s:
                rows += contest.left_out(OUT_OF_TIME)
                console.print(f"[yellow]{OUT_OF_TIME}: {problem.title}")
                continue
            new, wrong = contest.run(on_step)
            rows += new
            failures += [f"{problem.title}: {text}" for text in wrong]
            durations.append(time.perf_counter() - began)
            console.print(report.problem_table(new))
            console.print(f"[dim]took {durations[-1]:.0f} s\n")
    rows = [with_roofline(row, ceilings) for row in rows]
    return [*machine_rows(facts, ceilings), *rows], failures


def publish(rows: Sequence[report.Row], folder: Path, readmes: bool, console: Console) -> None:
    """Writes the CSV file and the plots, and refreshes the tables of the READMEs."""
    first = rows[0]
    path = folder / f"{machine.slug(first.device, first.threads)}.csv"
    report.write_csv(path, rows)
    console.print(f"wrote {path}")
    try:
        from benchmarks.plots import draw_all

        for picture in draw_all(rows, path.with_suffix("")):
            console.print(f"drew {picture}")
    except ImportError as error:
        console.print(f"[yellow]no plots: {error}")
    if readmes:
        tables = {"README.md": report.readme_table, "benchmarks/README.md": report.targets_markdown}
        for name, table in tables.items():
            if report.refresh_readme(ROOT / name, table(rows)):
                console.print(f"refreshed {name}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    problems = chosen(options)
    if options.list or not problems:
        for problem in PROBLEMS:
            console.print(problem.title)
        return 0 if options.list else 2
    if options.threads:
        torch.set_num_threads(options.threads)

    start = time.perf_counter()
    limit = options.limit or (float("inf") if options.full else 590.0)
    contenders = peers.contenders(everywhere=options.full)
    rows, failures = run_all(problems, settings_of(options), contenders, limit, console)
    cut = any(row.note == OUT_OF_TIME for row in rows)
    complete = not (options.only or options.quick or failures or cut)
    folder = options.out or ROOT / ("benchmarks/results" if complete else "build/benchmarks")
    publish(rows, folder, complete and not options.no_readme, console)
    console.print(report.target_table(rows))
    console.print(f"all of it took {time.perf_counter() - start:.0f} s")
    for failure in failures:
        console.print(f"[red]{escape(failure)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
