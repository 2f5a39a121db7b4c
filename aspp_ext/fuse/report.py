# SPDX-License-Identifier: BSD-3-Clause
"""What became of a model's pyramids, as a list and as a table."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

from aspp_ext.modules.head import Head


class FuseEntry(NamedTuple):
    """What became of one module of a model that is, or may be, a pyramid.

    Attributes:
        name: path in the model, "" for the model itself.
        kind: "module:name" of the class it was written as.
        fused: whether its forward is the fused one.
        reason: why the fused forward is not, or cannot be, taken; None where it is, or would be.
        recognised: "name", "structure", "siblings" where its forward cannot be read and stays as it
            is, but for its convolutions of one map, or None where it was not.
        what: the parts that are fused.
        left: the parts that stay as they are.
        skipped: of the products with the atrous branches' weights the share that is not computed,
            for maps of 33x33 and 65x65.
    """

    name: str
    kind: str
    fused: bool
    reason: str | None
    recognised: str | None = None
    what: str = ""
    left: str = ""
    skipped: tuple[float, float] | None = None


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

        columns = ("module", "class", "recognised by", "fused", "left as it is", "skipped")
        table = Table(*columns, title="Pyramids" if self else "No pyramid was found")
        for e in self:
            state = "fused" if e.fused else "to be fused"
            fused = e.what or state if e.reason is None else "no"
            left = e.reason or e.left
            share = "" if e.skipped is None else " / ".join(f"{s:.0%}" for s in e.skipped)
            kind = e.kind.rpartition(":")[2]
            table.add_row(e.name or "(the model)", kind, e.recognised or "", fused, left, share)
        if self:
            table.caption = "skipped: products with padding, in maps of 33x33 / 65x65"
        return table


def in_words(heads: list[Head]) -> str:
    """What of them is fused."""
    return "; ".join(map(_one, heads))


def _one(head: Head) -> str:
    separable = any(b.depthwise is not None for b in head.branches)
    words = [f"{len(head.branches)} branches{', separable' if separable else ''}{rates_of(head)}"]
    stages = {type(s).__name__ for b in head.branches for s in b.stages}
    if stages:
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


def skipped(heads: list[Head], size: int) -> float:
    """The share of products with weights that would multiply padding, in maps of that size."""
    live = every = 0.0
    for head in heads:
        for branch in head.branches:
            conv = branch.depthwise or branch.conv
            weights = conv.weight.numel()
            share = 1.0
            for kernel, rate in zip(conv.kernel_size, branch.rate, strict=True):
                taps = range(-(kernel // 2), kernel // 2 + 1)
                share *= sum(max(0, size - abs(t * rate)) for t in taps) / (kernel * size)
            live, every = live + weights * share, every + weights
    return 1 - live / every if every else 0.0


def shares(heads: list[Head]) -> tuple[float, float]:
    """:func:`skipped` of maps of 33x33 and of 65x65."""
    return (skipped(heads, 33), skipped(heads, 65))
