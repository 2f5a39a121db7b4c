# SPDX-License-Identifier: BSD-3-Clause
"""What minimal filtering gains on the CPU, branch by branch: `python -m benchmarks.polyphase`.

Each branch of the dense problems alone, and the four of a pyramid together, run through
`aspp_inference` both ways: tap by tap, and by minimal filtering with weights prepared beforehand.
That is how a module in eval mode calls it; the projection, the same for both, only picks 16
channels of a branch. A branch that costs less directly runs directly both ways, unless
ASPP_EXT_POLYPHASE=always. Results are checked before, calls are timed in interleaved rounds, and
the shares of a call's steps come from `polyphase_times`, which is not timed itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aspp_ext import aspp_inference, reference
from aspp_ext.ops import polyphase_weights
from aspp_ext.ops.polyphase_choice import blocks, policy, polyphase_choices
from aspp_ext.testing import timing
from benchmarks import csv_file, gate, machine, report
from benchmarks.problems import Problem, head
from benchmarks.roofline import live_taps, measure_peak

PICKED = 16  # channels of a branch that are projected: 1/16 of its outputs, 1/128 of its products
WAYS = ("direct", "minimal")
MARKERS = ("<!-- polyphase:begin -->", "<!-- polyphase:end -->")

PROBLEMS = tuple(head("operator", "dense", shape) for shape in ("large", "small", "wide"))
QUICK = (Problem("operator", "dense", 64, 33, 33, (6, 12, 18), out_channels=64),)


@dataclass(frozen=True)
class Row:
    """Some branches of a problem; taps and products are per pixel, times of single calls."""

    date: str
    commit: str
    device: str
    threads: int
    torch: str
    isa: str
    problem: str
    branch: str
    blocks: str
    live_taps: float
    products: float
    matrices: int
    prepared_mb: float
    modelled: float  # cost directly / cost by minimal filtering
    direct_error: float  # against float64, as a multiple of PyTorch's own
    minimal_error: float
    rounds: int | None = None
    direct_p25_ms: float | None = None
    direct_p50_ms: float | None = None
    direct_p75_ms: float | None = None
    minimal_p25_ms: float | None = None
    minimal_p50_ms: float | None = None
    minimal_p75_ms: float | None = None
    ratio: float | None = None
    inputs_share: float | None = None  # of the time of all threads in these branches
    products_share: float | None = None
    outputs_share: float | None = None
    products_gflop_per_s: float | None = None  # 2 per multiply-add that is made, all threads
    peak_gflop_per_s: float | None = None  # of PyTorch's fastest matrix product
    note: str = ""


def as_read(weight: Tensor) -> Tensor:
    """Its memory has stride 1 over the output channels: no call packs it."""
    return weight.detach().permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def picked(y: Tensor) -> Tensor:
    return y[:, :: y.size(1) // PICKED]


class Part:
    """Branches of a pyramid as the head of a module without a pooled branch."""

    def __init__(
        self, name: str, x: Tensor, weights: Sequence[Tensor], rates: Sequence[int]
    ) -> None:
        self.name, self.x, self.rates = name, x, list(rates)
        self.weights = [as_read(w) for w in weights]
        self.prepared = polyphase_weights(self.weights, self.rates, *x.shape[2:])
        kernels = [(w.size(2), w.size(3)) for w in weights]
        outs = [w.size(0) for w in weights]
        self.choices = polyphase_choices(x, kernels, self.flat_rates, outs, prepared=True)
        columns = torch.arange(sum(outs)).view(len(outs), -1)[:, :: outs[0] // PICKED].flatten()
        self.project = F.one_hot(columns, sum(outs)).to(x)
        self.zero = x.new_zeros(sum(outs))

    @property
    def flat_rates(self) -> list[int]:
        return [rate for rate in self.rates for _ in "hw"]

    def call(self, way: str) -> Tensor:
        rest = (self.zero, None, None, self.project, self.zero[: len(self.project)])
        minimal = way == "minimal"
        return aspp_inference(
            *(self.x, [None] * len(self.rates), self.weights, self.rates, *rest),
            polyphase=minimal,
            prepared=self.prepared if minimal else None,
        )

    def live(self, branch: int) -> float:
        h, w = self.x.shape[2:]
        kernel, rate = self.weights[branch].size(2), self.rates[branch]
        return live_taps(h, kernel, rate) * live_taps(w, kernel, rate)

    def products(self, branch: int) -> float:
        """GEMM rows of an image by minimal filtering; 0 of a branch that is computed directly."""
        form = self.choices[branch].form if self.prepared[branch].numel() else None
        return form.row_products * form.column_products if form else 0

    def counts(self) -> dict[str, Any]:
        """The columns that no clock measures."""
        every = range(len(self.rates))
        pixels = self.x.size(2) * self.x.size(3)
        spent = [c.polyphase if self.products(b) else c.direct for b, c in enumerate(self.choices)]
        forms = [c.form for b, c in enumerate(self.choices) if self.products(b)]
        return {
            "branch": self.name,
            "blocks": ", ".join(blocks(form) for form in forms if form is not None),
            "live_taps": sum(map(self.live, every)) / pixels,
            "products": sum(self.products(b) or self.live(b) for b in every) / pixels,
            "matrices": sum(form.matrices for form in forms if form is not None),
            "prepared_mb": sum(p.nbytes for p in self.prepared) / 1e6,
            "modelled": sum(choice.direct for choice in self.choices) / sum(spent),
        }

    def shares(self, calls: int) -> dict[str, float]:
        """Where the threads' time goes in the branches by minimal filtering; medians of calls."""
        times = torch.ops.aspp_ext.polyphase_times
        samples = [times(self.x, self.weights, self.flat_rates, policy()) for _ in range(calls)]
        inputs, products, outputs = torch.stack(samples).median(0).values.nansum(0).tolist()
        if not products:
            return {}
        n, c, *_ = self.x.shape
        multiplied = sum(n * c * w.size(0) * self.products(b) for b, w in enumerate(self.weights))
        total = inputs + products + outputs
        return {
            "inputs_share": inputs / total,
            "products_share": products / total,
            "outputs_share": outputs / total,
            "products_gflop_per_s": 2e-9 * multiplied * torch.get_num_threads() / products,
        }


def parts_of(problem: Problem) -> list[Part]:
    """Each atrous branch alone, then all branches with the 1x1."""
    module, x = problem.build()
    weights = [conv.weight for conv in module.dense]
    alone = zip(weights[1:], problem.rates, strict=True)
    parts = [Part(f"rate {rate}", x, [weight], [rate]) for weight, rate in alone]
    return [*parts, Part("pyramid", x, weights, [1, *problem.rates])]


def multiple(errors: gate.Errors, own: gate.Errors) -> float:
    """How many times as large as PyTorch's own: the worse of the two measures."""
    pairs = ((errors.largest, own.largest), (errors.percentile, own.percentile))
    return max(a / b if b else float(a > 0) for a, b in pairs)


def checked(parts: Sequence[Part]) -> list[tuple[dict[str, float], str]]:
    """Of each part both ways' errors against float64, and what is wrong with one, or nothing."""
    rates, x = parts[-1].rates, parts[-1].x
    truths, baselines = [], []
    for weight, rate in zip(parts[-1].weights, rates, strict=True):
        few = weight[:: weight.size(0) // PICKED].double()
        truths.append(reference.atrous_pyramid(x.double(), [few], [rate], activation="relu"))
        plain = reference.atrous_pyramid(x, [weight.contiguous()], [rate], activation="relu")
        baselines.append(picked(plain))
    found = []
    for part in parts:
        places = range(len(rates)) if len(part.rates) > 1 else [rates.index(part.rates[0])]
        truth, baseline = (torch.cat([ys[b] for b in places], 1) for ys in (truths, baselines))
        own, law = gate.errors(baseline, truth), gate.Gate([truth], [[baseline]], x.dtype)
        errors, wrong = {}, []
        for way in WAYS:
            y = part.call(way)
            errors[f"{way}_error"] = multiple(gate.errors(y, truth), own)
            if (reason := law.why_wrong([y])) is not None:
                wrong.append(f"{way}: {reason}")
        found.append((errors, "; ".join(wrong)))
    return found


def measure(problem: Problem, budget_s: float, least_rounds: int) -> list[Row]:
    """The rows of a problem; those that are wrong have no times and say so in their note."""
    facts = machine.facts()
    common = {name: facts[name] for name in ("date", "commit", "device", "threads", "torch")}
    common |= {"isa": torch.ops.aspp_ext.cpu_isa().removeprefix("isa_"), "problem": problem.name}
    common |= {"peak_gflop_per_s": measure_peak(problem.torch_dtype, 0.2) / 1e9}
    parts = parts_of(problem)
    verdicts = checked(parts)
    calls = {
        (part.name, way): lambda part=part, way=way: part.call(way)
        for part, (_, wrong) in zip(parts, verdicts, strict=True)
        for way in WAYS
        if not wrong
    }
    timed = {}
    if calls:
        timed = timing.interleave(calls, budget_s=budget_s, least_rounds=least_rounds)
    rows = []
    for part, (errors, wrong) in zip(parts, verdicts, strict=True):
        measured: dict[str, Any] = {"note": wrong}
        if not wrong:
            direct, minimal = (timed[part.name, way] for way in WAYS)
            measured = {
                f"{way}_p{p}_ms": times.quantile_ms(p / 100)
                for way, times in zip(WAYS, (direct, minimal), strict=True)
                for p in (25, 50, 75)
            }
            measured |= {"rounds": len(direct.samples), "ratio": direct.p50_ms / minimal.p50_ms}
            measured |= part.shares(least_rounds)
        rows.append(Row(**common, **part.counts(), **errors, **measured))
    return rows


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    first = rows[0]
    peak = max((row.peak_gflop_per_s or 0 for row in rows), default=0)
    heads = ("branch", "live taps", "products", "matrices", "MB", "modelled", "direct ms")
    heads += ("minimal ms", "ratio", "inputs / products / outputs", "GFLOP/s", "error")
    lines = [
        f"float32, {first.device}, {first.threads} threads, {first.isa}, torch {first.torch}; "
        f"{first.date}, commit {first.commit}. PyTorch's fastest matrix product: {peak:.0f} "
        "GFLOP/s.",
        "",
        f"| problem | {' | '.join(heads)} |",
        "|---|---|" + "---:|" * (len(heads) - 1),
    ]
    for row in rows:
        shares = (row.inputs_share, row.products_share, row.outputs_share)
        cells = [
            *(row.problem, row.branch, f"{row.live_taps:.2f}", f"{row.products:.2f}"),
            *(str(row.matrices), f"{row.prepared_mb:.0f}", report.ratio(row.modelled)),
            *(report.number(ms) for ms in (row.direct_p50_ms, row.minimal_p50_ms)),
            f"**{report.ratio(row.ratio)}**",
            " / ".join(report.percent(share) for share in shares),
            report.number(row.products_gflop_per_s),
            row.note or f"{row.direct_error:.2f} / {row.minimal_error:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.polyphase", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small problem, two rounds")
    parser.add_argument("--only", metavar="TEXT", help="problems whose name contains TEXT")
    parser.add_argument("--threads", type=int, help="threads of every call")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of timing a problem")
    parser.add_argument("--out", type=Path, help="folder of the CSV file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    problems = QUICK if options.quick else PROBLEMS
    rows: list[Row] = []
    with torch.no_grad():
        for problem in problems:
            if options.only and options.only not in problem.name:
                continue
            new = measure(
                problem, 0.0 if options.quick else options.budget, 2 if options.quick else 5
            )
            rows += new
            print(table(new), end="\n\n", flush=True)
    if not rows:
        print(f"no problem's name contains {options.only}")
        return 2
    wrong = [row for row in rows if row.note]
    complete = not (options.quick or options.only or wrong)
    usual = machine.ROOT / ("benchmarks/results" if complete else "build/benchmarks")
    path = (options.out or usual) / f"{machine.slug(rows[0].device, rows[0].threads)}-polyphase.csv"
    csv_file.write(path, [field.name for field in fields(Row)], map(vars, rows))
    print(f"wrote {path}")
    if complete and not options.out:
        report.refresh_readme(machine.ROOT / "benchmarks/README.md", table(rows), MARKERS)
    for row in wrong:
        print(f"{row.problem}, {row.branch}: {row.note}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
