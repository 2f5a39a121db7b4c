# SPDX-License-Identifier: BSD-3-Clause
"""What cuDNN does with atrous convolutions: `python -m benchmarks.cudnn_baselines --out FOLDER`.

* rates: one dense 3x3 convolution at a fixed shape and growing rate, beside the same products on an
  input padded beforehand. Equal times mean that padding is multiplied, not skipped.
* data: random values against zeros, which need less power.
* depthwise: memory formats x dtypes x cuDNN's search on and off x eager and compiled.
* deterministic: what torch.backends.cudnn.deterministic costs a dilated convolution.

Nothing of aspp_ext runs here. What does not fit the time limit is left out, by name.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aspp_ext.testing import timing
from benchmarks import csv_file, machine
from benchmarks.gpu.ceilings import products_in, torch_dtype
from benchmarks.gpu.device import Host, device_named
from benchmarks.gpu.peers import time_limit
from benchmarks.peers import FORMATS
from benchmarks.roofline import live_taps

RATES = (1, 6, 12, 18, 24, 36, 60)
SECTIONS = ("rates", "data", "deterministic", "depthwise")
OUT_OF_TIME = "left out, the time limit is spent"
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One way to run one 3x3 convolution."""

    section: str
    rate: int
    channels: int = 2048
    out_channels: int = 256
    side: int = 65
    batch: int = 8
    groups: int = 1
    layout: str = "NHWC"
    dtype: str = "bfloat16"
    step: str = "forward"  # "forward" | "training": forward, both gradients
    padded_before: bool = False  # the zeros are in the input, padding = 0
    search: bool = True  # cudnn.benchmark
    deterministic: bool = False
    compiled: bool = False
    data: str = "random"  # "random" | "zeros"

    @property
    def useful_gflop(self) -> float:
        live = live_taps(self.side, 3, self.rate) ** 2
        products = self.batch * self.channels * self.out_channels / self.groups * live
        return 2e-9 * products * (3 if self.step == "training" else 1)


@dataclass(frozen=True)
class Result:
    """A case's time, or why it has none."""

    rounds: int | None = None
    p25_ms: float | None = None
    p50_ms: float | None = None
    p75_ms: float | None = None
    kernels: str = ""
    note: str = ""


def cases(section: str) -> Iterator[Case]:
    if section == "rates":
        for rate, padded in itertools.product(RATES, (False, True)):
            yield Case(section, rate, padded_before=padded)
    elif section == "data":
        yield from (Case(section, 12, data=data) for data in ("random", "zeros"))
    elif section == "deterministic":
        for layout, step, flag in itertools.product(
            ("NHWC", "NCHW"), ("forward", "training"), (False, True)
        ):
            yield Case(section, 12, layout=layout, step=step, search=False, deterministic=flag)
    else:
        depthwise = Case(section, 12, out_channels=2048, groups=2048)
        for compiled, dtype, layout, search in itertools.product(
            (False, True),
            ("bfloat16", "float16", "float32"),
            ("NHWC", "NCHW"),
            (False, True),
        ):
            yield replace(depthwise, compiled=compiled, layout=layout, dtype=dtype, search=search)


def for_a_dry_run(case: Case) -> Case:
    channels = 8 if case.groups > 1 else 4
    return replace(
        case, channels=channels, out_channels=8, side=9, batch=2, groups=min(case.groups, 8)
    )


def tensors(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Input and weight, normal values (or zeros) in the case's dtype and memory format."""
    torch.manual_seed(0)
    size = (case.batch, case.channels, case.side, case.side)
    make = torch.randn if case.data == "random" else torch.zeros
    x = make(size, device=device)
    weight = make((case.out_channels, case.channels // case.groups, 3, 3), device=device)
    if case.padded_before:
        x = F.pad(x, [case.rate] * 4)
    last = {"memory_format": FORMATS[case.layout]}
    dtype = torch_dtype(case.dtype)
    return x.to(dtype).contiguous(**last), weight.to(dtype).contiguous(**last)


def convolution(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    padding = 0 if case.padded_before else case.rate

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=padding, dilation=case.rate, groups=case.groups)

    return torch.compile(convolve) if case.compiled else convolve


def build(case: Case, device: str) -> Call:
    x, weight = tensors(case, device)
    convolve = convolution(case)

    def forward() -> Any:
        torch.backends.cudnn.benchmark = case.search
        torch.backends.cudnn.deterministic = case.deterministic
        with torch.no_grad():
            return convolve(x, weight)

    if case.step == "forward":
        return forward
    inputs = [tensor.requires_grad_() for tensor in (x, weight)]
    grad = torch.randn_like(forward())

    def training() -> Any:
        torch.backends.cudnn.benchmark = case.search
        torch.backends.cudnn.deterministic = case.deterministic
        return torch.autograd.grad(convolve(x, weight), inputs, grad)

    return training


def kernel_names(device: Host, call: Call) -> str:
    """The kernels of one call in the order of their start, each with its microseconds."""
    launched = [(k.name, k.microseconds) for k in device.kernels(call)]
    return " + ".join(f"{name[:120]} ({duration:.0f} us)" for name, duration in launched)


class Timed:
    """The results, case by case."""

    def __init__(self, device: Host, budget_s: float) -> None:
        self.device, self.budget_s = device, budget_s
        self.flush = device.flusher()
        self.results: dict[Case, Result] = {}

    def together(self, group: Sequence[Case]) -> None:
        """Times cases in interleaved rounds."""
        torch._dynamo.reset()  # it stops compiling one function after eight variants
        calls: dict[str, Call] = {}
        for place, case in enumerate(group):
            try:
                with time_limit(30.0):
                    call = build(case, self.device.kind)
                    call()
                calls[str(place)] = call
            except Exception as error:  # named in the table; the other cases still run
                text = " ".join(str(error).split())[:160]
                self.results[case] = Result(note=f"failed: {type(error).__name__}: {text}")
        if not calls:
            return
        timings = timing.interleave(
            calls,
            budget_s=self.budget_s * len(calls),
            settle_s=0.0,
            flush=self.flush,
            stopwatch=self.device.stopwatch,
        )
        for place, timed in timings.items():
            quartiles = {f"p{p}_ms": timed.quantile_ms(p / 100) for p in (25, 50, 75)}
            names = kernel_names(self.device, calls[place])
            case = group[int(place)]
            self.results[case] = Result(len(timed.samples), kernels=names, **quartiles)


def groups_of(section: str) -> Iterator[list[Case]]:
    """The cases that are compared with each other, which are timed in interleaved rounds."""
    if section == "rates":
        yield list(cases(section))
        return
    for _, group in itertools.groupby(cases(section), lambda c: (c.compiled, c.step, c.dtype)):
        yield list(group)


def row_of(case: Case, result: Result, facts: dict[str, Any]) -> dict[str, Any]:
    speed = {"useful_gflop": case.useful_gflop, "gflop_per_s": ""}
    if result.p50_ms:
        speed["gflop_per_s"] = 1e3 * case.useful_gflop / result.p50_ms
    return facts | asdict(case) | asdict(result) | speed


COLUMNS = [
    *("date", "commit", "device", "architecture", "torch", "cuda", "cudnn", "triton"),
    *(field.name for field in fields(Case)),
    *("rounds", "p25_ms", "p50_ms", "p75_ms", "useful_gflop", "gflop_per_s", "kernels", "note"),
]


def draw_rates(results: dict[Case, Result], path: Path, caption: str) -> None:
    """Time against the rate, with and without the zeros in the input, and what live taps need."""
    found = {c: r for c, r in results.items() if c.section == "rates" and r.p50_ms}
    if not found:
        return
    from benchmarks.plots import GRID, MUTED, pyplot

    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for padded, colour, label in (
        (False, "#3a6698", "padding = rate"),
        (True, "#d9480f", "input padded before, padding = 0"),
    ):
        line = {c.rate: r.p50_ms for c, r in found.items() if c.padded_before == padded}
        axes.plot(list(line), list(line.values()), "o-", color=colour, label=label)
    first, result = next(iter(found.items()))
    ideal = {c.rate: result.p50_ms * c.useful_gflop / first.useful_gflop for c in found}
    axes.plot(list(ideal), list(ideal.values()), "--", color=MUTED, label="share of live taps")
    axes.set_xlabel("atrous rate")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0.0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.legend(frameon=False)
    axes.set_title(f"One dense 3x3 convolution, {caption}", fontsize=9, loc="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(case: Case, result: Result) -> str:
    words = [case.layout, case.dtype, f"rate {case.rate}", case.step, case.data]
    flags = ("padded_before", "search", "deterministic", "compiled")
    words += [flag for flag in flags if getattr(case, flag)]
    took = f"{result.p50_ms:9.4f} ms" if result.p50_ms else f"{'—':>12}"
    return f"{case.section:13} {took}  {' '.join(words)}  {result.note or result.kernels[:70]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.cudnn_baselines", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds of timing a case")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="some sections")
    options = parser.parse_args(arguments)
    end = time.perf_counter() + options.limit
    device = device_named(options.device)
    facts = device.facts()
    stem = options.out / f"{machine.hyphenated(facts['device'])}-cudnn"
    timed = Timed(device, options.budget)
    for section in options.only or SECTIONS:
        for group in groups_of(section):
            group = [for_a_dry_run(c) for c in group] if options.device == "cpu" else group
            if time.perf_counter() > end:
                timed.results |= {case: Result(note=OUT_OF_TIME) for case in group}
            else:
                with products_in("float32"):
                    timed.together(group)
                device.release()
            rows = [row_of(case, result, facts) for case, result in timed.results.items()]
            csv_file.write(stem.with_suffix(".csv"), COLUMNS, rows)
            print("\n".join(show(case, timed.results[case]) for case in group), flush=True)
    try:
        draw_rates(timed.results, stem.with_suffix(".png"), facts["device"])
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"wrote {stem.with_suffix('.csv')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
