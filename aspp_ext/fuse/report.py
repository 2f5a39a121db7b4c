# SPDX-License-Identifier: BSD-3-Clause
"""What became of a model's pyramids, as a list and as a table."""

from __future__ import annotations

import io
from typing import Any, NamedTuple, TypedDict

from aspp_ext.modules.head import Head


class FuseEntry(NamedTuple):
    """What became of one module of a model that is, or may be, a pyramid.

    Attributes:
        name: path in the model, "" for the model itself.
        kind: "module:name" of the class it was written as.
        fused: whether it has been fused. Where there is a reason, its own layers run all the same.
        reason: why the fused forward is not, or cannot be, taken; None where it is, or would be.
        recognised: "name", "structure", "siblings" where its forward cannot be read and stays as it
            is, but for its convolutions of one map, or None where it was not.
        what: the parts that are fused.
        left: the parts that stay as they are.
        skipped: of the products with the atrous branches' weights the share that is not computed,
            for maps of 33x33 and 65x65.
        gain: how many times as fast what is fused would be if products with weights were all that
            takes time. Fewer passes over memory, minimal filtering and better kernels are not in
            it: ``python -m benchmarks.run`` measures.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None
    recognised: str | None = None
    what: str = ""
    left: str = ""
    skipped: tuple[float, float] | None = None
    gain: tuple[float, float] | None = None


class FuseReport(list[FuseEntry]):
    """The entries; printed, a table."""

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self.table())
        return text.getvalue()

    def __rich__(self) -> Any:
        return self.table()

    def table(self) -> Any:
        """A ``rich.table.Table`` of the entries."""
        from rich.table import Table

        table = Table(title="Pyramids" if self else "No pyramid was found")
        for column in ("module", "state", "together", "left as it is"):
            table.add_column(column, overflow="fold")
        table.add_column("skipped\ngain", no_wrap=True)
        for e in self:
            shares = [
                " / ".join(form.format(number) for number in pair)
                for form, pair in (("{:.0%}", e.skipped), ("{:.1f}x", e.gain))
                if pair is not None
            ]
            table.add_row(
                *(f"{e.name or '(the model)'}\n{e.kind.rpartition(':')[2]}", _state(e), e.what),
                *(e.reason or e.left, "\n".join(shares)),
            )
        if any(e.gain for e in self):
            table.caption = (
                "In maps of 33x33 / 65x65. skipped: of the products of atrous branches those with "
                "padding. gain: how many times fewer products what is together has by that; an "
                "estimate, nothing was timed"
            )
        return table


def _state(entry: FuseEntry) -> str:
    if entry.reason is not None:
        return "fused, but runs\nits own layers" if entry.fused else "left alone"
    how = {"siblings": "as siblings"}.get(str(entry.recognised), f"by {entry.recognised}")
    return f"{'fused' if entry.fused else 'would be fused'}\n{how}"


def in_words(heads: list[Head]) -> str:
    """What of them is fused."""
    return "; ".join(map(_one, heads))


def _one(head: Head) -> str:
    separable = any(b.depthwise is not None for b in head.branches)
    words = [f"{len(head.branches)} branches{', separable' if separable else ''}{rates_of(head)}"]
    if any(b.stages for b in head.branches):
        words.append("norms and activations")
    if head.join != "none":
        words.append({"cat": "concatenation", "sum": "sum"}[head.join])
    if head.pool is not None:
        words.append("image pooling")
    if head.project is not None:
        kh, kw = head.project.kernel_size
        words.append(f"{kh}x{kw} projection")
    return ", ".join(words)


def rates_of(head: Head) -> str:
    """Of the branches that look around, as `` (rates 2, 3)``."""
    rates = [_shown(b.rate) for b in head.branches if b.conv.kernel_size != (1, 1) or b.depthwise]
    return f" (rates {', '.join(rates)})" if rates else ""


def _shown(rate: tuple[int, int]) -> str:
    return str(rate[0]) if rate[0] == rate[1] else f"{rate[0]}x{rate[1]}"


class Shares(TypedDict):
    """Two attributes of an entry."""

    skipped: tuple[float, float]
    gain: tuple[float, float]


class Work(NamedTuple):
    """Products with weights for one pixel of a map, on average."""

    atrous: float  # of the branches' filters, padding included
    padding: float  # of these the ones with padding, which are not computed
    others: float  # of what mixes channels behind depthwise filters, and of the projection


def work(heads: list[Head], size: int) -> Work:
    """That of all of them together, in maps of size x size."""
    atrous = padding = others = 0.0
    for head in heads:
        for branch in head.branches:
            conv = branch.depthwise or branch.conv
            share = 1.0
            for kernel, rate in zip(conv.kernel_size, branch.rate, strict=True):
                taps = range(-(kernel // 2), kernel // 2 + 1)
                share *= sum(max(0, size - abs(t * rate)) for t in taps) / (kernel * size)
            atrous += conv.weight.numel()
            padding += (1 - share) * conv.weight.numel()
            others += 0 if branch.depthwise is None else branch.conv.weight.numel()
        others += 0 if head.project is None else head.project.weight.numel()
    return Work(atrous, padding, others)


def shares(heads: list[Head]) -> Shares:
    """``skipped`` and ``gain`` of an entry, in maps of 33x33 and of 65x65."""
    small, large = (work(heads, size) for size in (33, 65))
    return {
        "skipped": (small.padding / small.atrous, large.padding / large.atrous),
        "gain": (_gain(small), _gain(large)),
    }


def _gain(work: Work) -> float:
    products = work.atrous + work.others
    return products / (products - work.padding)
