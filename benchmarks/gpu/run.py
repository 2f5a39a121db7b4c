# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark on a GPU: `python -m benchmarks.gpu.run --out FOLDER`.

Every problem is first timed among the contenders that are ready at once. What time is left goes to
those that compile first, problem by problem, all contenders once more beside them. The results file
is rewritten after every problem, so that a run cut short leaves what it measured.

Exits with 3 when a result was refused as wrong, a contender of aspp_ext failed, or none of those
could run a problem. One that cannot run stays in the table with its reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks import machine, peers, report
from benchmarks.contest import Contest, Settings, with_roofline
from benchmarks.gpu import problems as table
from benchmarks.gpu.ceilings import measure_ceilings, products_in
from benchmarks.gpu.device import Host, device_named
from benchmarks.gpu.peers import contenders, slow_contenders
from benchmarks.problems import Problem, Target
from benchmarks.roofline import Ceilings
from benchmarks.run import OUT_OF_TIME, machine_rows

WRONG = 3
Key = tuple[str, str, str, str]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--only", metavar="TEXT", help="problems whose title contains TEXT")
    parser.add_argument("--list", action="store_true", help="print the problems and stop")
    parser.add_argument("--warm", action="store_true", help="leave the L2 as the last call left it")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds in all")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing a problem")
    parser.add_argument(
        "--compile-limit", type=float, default=60.0, help="seconds a compiling contender may take"
    )
    return parser.parse_args(arguments)


def own_bytes(problem: Problem) -> int:
    """What a call finds in memory: input, parameters and buffers."""
    module, x = replace(problem, device="meta").build()
    tensors = [x, *module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_mib(device: Host, problem: Problem, call: peers.Call) -> tuple[float, float]:
    extra = device.peak_bytes(call)
    return extra / 2**20, (extra + own_bytes(problem)) / 2**20


def settings_of(device: Host, options: argparse.Namespace) -> Settings:
    return Settings(
        budget_s=options.budget,
        least_rounds=10,
        most_rounds=100,
        flush=None if options.warm else device.flusher(),
        measure_memory=lambda problem: device.kind == "cuda",
        stopwatch=device.stopwatch,
        settle_s=0.0,
        peak_mib=lambda problem, call: peak_mib(device, problem, call),
    )


class Run:
    """The rows so far, and how to make more of them."""

    def __init__(self, device: Host, options: argparse.Namespace, console: Console) -> None:
        self.device, self.console = device, console
        self.settings = settings_of(device, options)
        self.compile_limit = options.compile_limit
        self.end = time.perf_counter() + options.limit
        self.facts = device.facts()
        self.path = options.out / f"{machine.hyphenated(self.facts['device'])}.csv"
        self.ceilings = Ceilings({}, 1.0)
        self.rows: dict[Key, list[report.Row]] = {}
        self.failures: list[str] = []

    def measure_ceilings(self, dtypes: Sequence[str]) -> None:
        self.ceilings = measure_ceilings(self.device, dtypes)
        peaks = ", ".join(f"{k} {v / 1e12:.3g}" for k, v in self.ceilings.flops.items())
        where = report.conditions(machine_rows(self.facts, self.ceilings)[0])
        copy = f"{self.ceilings.bandwidth / 1e9:.4g} GB/s"
        self.console.print(f"{where}: matrix product TFLOP/s {peaks}; copy {copy}")

    def all_rows(self) -> list[report.Row]:
        rows = [with_roofline(row, self.ceilings) for group in self.rows.values() for row in group]
        return [*machine_rows(self.facts, self.ceilings), *rows]

    def one(self, problem: Problem, compete: Sequence[peers.Contender], least_s: float) -> None:
        """Times a problem, or names it as left out where fewer than `least_s` seconds are left."""
        contest = Contest(problem, compete, self.settings, self.ceilings, self.facts)
        if time.perf_counter() + least_s > self.end:
            self.console.print(f"[yellow]{OUT_OF_TIME}: {problem.title}")
            timed = {row.contender: row for row in self.rows.get(problem.key, [])}
            fresh = contest.left_out(OUT_OF_TIME)
            self.rows[problem.key] = [timed.get(row.contender, row) for row in fresh]
            return
        began = time.perf_counter()
        torch.backends.cudnn.benchmark = False  # no search for the float64 oracle
        with products_in(problem.dtype):
            rows, wrong = contest.run(lambda *_: None)
        self.device.release()
        if problem.key not in self.rows or any(row.p50_ms is not None for row in rows):
            self.rows[problem.key] = rows
        self.failures += [f"{problem.title}: {text}" for text in wrong]
        report.write_csv(self.path, self.all_rows())
        self.console.print(report.problem_table(rows))
        self.console.print(f"[dim]took {time.perf_counter() - began:.0f} s\n")


def finish(run: Run, targets: Sequence[Target]) -> None:
    """The results file, its plots, and what was reached of the targets."""
    rows = run.all_rows()
    report.write_csv(run.path, rows)
    try:
        from benchmarks.plots import draw_all

        for picture in draw_all(rows, run.path.with_suffix("")):
            run.console.print(f"drew {picture}")
    except ImportError as error:
        run.console.print(f"[yellow]no plots: {error}")
    run.console.print(report.target_table(rows, targets))
    for failure in run.failures:
        run.console.print(f"[red]{escape(failure)}")
    texts = [verdict.text for verdict in report.verdicts(rows, targets)]
    counts = ", ".join(f"{texts.count(text)} {text}" for text in dict.fromkeys(texts))
    run.console.print(f"targets: {counts}; {len(run.failures)} refused; wrote {run.path}")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    problems, targets = list(table.PROBLEMS), list(table.TARGETS)
    if options.device == "cpu":
        problems = [table.for_a_dry_run(p) for p in problems]
        stand_in = f"aspp_ext {Host.backends[0]}"
        targets = [
            replace(t, problem=table.for_a_dry_run(t.problem), contender=stand_in) for t in targets
        ]
    problems = [p for p in problems if not options.only or options.only in p.title]
    if options.list or not problems:
        print("\n".join(problem.title for problem in table.PROBLEMS))
        return 0 if options.list else 2

    device = device_named(options.device)
    run = Run(device, options, Console(width=None if sys.stdout.isatty() else 160))
    run.measure_ceilings([problem.dtype for problem in problems])
    quick = contenders(device)
    for problem in problems:
        run.one(problem, quick, 5.0)
    slow = slow_contenders(options.compile_limit)
    for problem in problems:
        run.one(problem, [*quick, *slow], 1.2 * options.compile_limit)
    finish(run, targets)
    return WRONG if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
