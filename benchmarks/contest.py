# SPDX-License-Identifier: BSD-3-Clause
"""One problem from start to end: build the contenders, check their results, time and rate them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aspp_ext.testing import timing
from benchmarks import memory, models, peers
from benchmarks.gate import Gate, Results, factor_of, oracle
from benchmarks.problems import Problem
from benchmarks.report import Row, best
from benchmarks.roofline import Ceilings, Work, work_of

OnStep = Callable[..., None]


@dataclass(frozen=True)
class Settings:
    """How long to time and what else to measure."""

    budget_s: float
    least_rounds: int
    most_rounds: int
    flush: Callable[[], object] | None
    measure_memory: Callable[[Problem], bool]
    stopwatch: timing.Stopwatch = timing.BY_WALL_CLOCK
    settle_s: float = 0.01
    # (MiB above what was there, MiB with input and parameters) of a call; the CPU's way if None
    peak_mib: Callable[[Problem, peers.Call], tuple[float, float]] | None = None


def one_line(error: Exception) -> str:
    """An error's type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def with_roofline(row: Row, ceilings: Ceilings) -> Row:
    """The row with its speed and the share of the roofline that it reaches."""
    if row.p50_ms is None or row.useful_gflop is None or row.compulsory_mb is None:
        return row
    seconds = row.p50_ms / 1e3
    work = Work(1e9 * row.useful_gflop, 1e6 * row.compulsory_mb)
    return replace(
        row,
        gflop_per_s=row.useful_gflop / seconds,
        gb_per_s=row.compulsory_mb / 1e3 / seconds,
        roofline_share=ceilings.seconds(work, row.dtype) / seconds,
    )


def rate(row: Row, rows: Sequence[Row]) -> Row:
    """The row with its speed relative to the best of PyTorch and to the best of the others."""
    if row.p50_ms is None:
        return row
    pytorch, other = best(rows, "pytorch"), best(rows, "other")
    return replace(
        row,
        vs_best_pytorch=pytorch and pytorch.p50_ms / row.p50_ms,
        vs_best_other=other and other.p50_ms / row.p50_ms,
    )


class Contest:
    """All contenders on one problem."""

    def __init__(
        self,
        problem: Problem,
        contenders: Sequence[peers.Contender],
        settings: Settings,
        ceilings: Ceilings,
        facts: dict[str, Any],
    ) -> None:
        self.problem = problem
        self.contenders = contenders
        self.settings = settings
        self.ceilings = ceilings
        self.facts = facts
        self.notes: dict[str, str] = {}
        self.failures: list[str] = []

    def left_out(self, reason: str) -> list[Row]:
        """A row per contender without a time, so that what was not measured is named."""
        self.notes = {contender.name: reason for contender in self.contenders}
        return [self.row(contender, None) for contender in self.contenders]

    def run(self, on_step: OnStep) -> tuple[list[Row], list[str]]:
        """Returns one row per contender, timed or with the reason why not, and the failures."""
        peers.forget_compiled()
        missing = models.why_not(self.problem.model) if self.problem.model else None
        if missing:
            return self.left_out(missing), []
        try:
            calls = self.checked_calls(on_step)
        except Exception as error:  # the other problems still run, and the exit status tells
            reason = f"could not be built: {one_line(error)}"
            return self.left_out(reason), [reason]
        timings = {}
        if calls:
            timings = timing.interleave(
                calls,
                budget_s=self.settings.budget_s,
                least_rounds=self.settings.least_rounds,
                most_rounds=self.settings.most_rounds,
                settle_s=self.settings.settle_s,
                flush=self.settings.flush,
                stopwatch=self.settings.stopwatch,
                on_round=lambda done, total: on_step(f"timing {self.problem.title}", done, total),
            )
        if self.problem.model:
            on_step(f"the head's share of {self.problem.title}")
            self.note_heads(*self.problem.build(), names=set(calls))
        rows = [self.row(contender, timings.get(contender.name)) for contender in self.contenders]
        rows = [with_roofline(rate(row, rows), self.ceilings) for row in rows]
        if self.settings.measure_memory(self.problem) and not self.problem.model:
            pairs = zip(rows, self.contenders, strict=True)
            rows = [self.with_memory(*pair, calls, on_step) for pair in pairs]
        return rows, self.failures

    def checked_calls(self, on_step: OnStep) -> dict[str, peers.Call]:
        """Builds every contender that can run and keeps those whose results are right."""
        problem = self.problem
        on_step(f"float64 oracle of {problem.title}")
        module, example = problem.build()
        truth = oracle(module, example)
        calls: dict[str, peers.Call] = {}
        results: dict[str, Results] = {}
        absent: list[str] = []
        for contender in self.contenders:
            ours = contender.group == "ours"
            reason = contender.why_not(problem)
            if reason is not None and ours:
                absent.append(f"{contender.name}: {reason}")
            if reason is None:
                on_step(f"building {contender.name} for {problem.title}")
                try:
                    calls[contender.name] = contender.build(module, example)
                    results[contender.name] = calls[contender.name]()
                except Exception as error:  # a broken contender is named, the others still run
                    calls.pop(contender.name, None)
                    reason = f"failed: {one_line(error)}"
                    if ours:
                        self.failures.append(f"{contender.name}: {reason}")
            if reason is not None:
                self.notes[contender.name] = reason
        # One implementation may lack a problem; that none of them can run it is a failure.
        if len(absent) == sum(contender.group == "ours" for contender in self.contenders):
            self.failures += absent

        baselines = [values for name, values in results.items() if name.startswith("eager")]
        gate = Gate(truth, baselines, example.dtype, factor_of(problem))
        for name in list(calls):
            reason = gate.why_wrong(results[name])
            if reason is not None:
                self.notes[name] = reason
                self.failures.append(f"{name}: {reason}")
                del calls[name]
            elif problem.model:
                same = models.agreement(results[name][0], truth[0])
                self.notes[name] = f"{100 * same:.3f} % of the pixels predicted as in float64"
        return calls

    def note_heads(self, module: models.Logits, example: torch.Tensor, names: set[str]) -> None:
        """Says how much of a whole model's time its head takes, where that can be seen."""
        for contender in self.contenders:
            if contender.name in names and isinstance(contender, peers.Eager):
                x = example.to(memory_format=peers.FORMATS[contender.layout])
                share = models.head_share(contender.convert(module), x)
                self.notes[contender.name] += f"; the head takes {100 * share:.0f} %"

    def row(self, contender: peers.Contender, timed: timing.Timing | None) -> Row:
        problem = self.problem
        row = Row(
            **self.facts,
            level=problem.level,
            problem=problem.name,
            dtype=problem.dtype,
            mode=problem.mode,
            contender=contender.name,
            group=contender.group,
            note=self.notes.get(contender.name, ""),
        )
        work = work_of(problem)
        if work is not None:
            row = replace(row, useful_gflop=work.flops / 1e9, compulsory_mb=work.bytes / 1e6)
        if timed is None:
            return row
        return replace(
            row,
            rounds=len(timed.samples),
            p25_ms=timed.p25_ms,
            p50_ms=timed.p50_ms,
            p75_ms=timed.p75_ms,
            host_ms=timed.host_ms if self.problem.device != "cpu" else None,
        )

    def with_memory(
        self, row: Row, contender: peers.Contender, calls: dict[str, peers.Call], on_step: OnStep
    ) -> Row:
        if row.p50_ms is None:
            return row
        on_step(f"peak memory of {contender.name}")
        if self.settings.peak_mib is not None:
            if not isinstance(contender, peers.Eager):
                return row  # a CUDA graph's memory was taken before
            extra, peak = self.settings.peak_mib(self.problem, calls[contender.name])
            return replace(row, peak_extra_mib=extra, peak_mib=peak)
        found = memory.measure(self.problem, contender, int(self.facts["threads"]))
        if found is None:
            return row
        return replace(row, peak_extra_mib=found.extra, kept_mib=found.kept)
