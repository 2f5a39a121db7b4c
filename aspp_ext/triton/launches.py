# SPDX-License-Identifier: BSD-3-Clause
"""Launches of the dense kernels: which tile, which work list, which arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import operands, tuning, work
from .configurations import Configuration, gather_candidates, weight_candidates
from .grad_weight_kernels import finish_grad_weight_kernel, grad_weight_kernel
from .operands import Rows
from .pyramid_kernels import finish_gather_kernel, gather_kernel
from .statistics_kernels import combine_kernel
from .target import Target, on_device, target_of
from .work import GROUP, Branch, Shape, Work

if TYPE_CHECKING:
    from .._plan import Pass

FINISH_COLUMNS = 32
"""Columns of a program that adds up slices."""

TILES_AT_A_TIME = 16
"""Of a program that combines statistics."""


class Epilogue(NamedTuple):
    """``relu(sums * scale + shift)``: scale ``[channels]``, shift ``[channels]`` or one row of it
    per sample; None for none."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    relu: bool = False

    @property
    def is_per_sample(self) -> bool:
        return self.shift is not None and self.shift.dim() == 2

    def vectors(self, stand_in: Tensor) -> list[Tensor]:
        """Scale and shift; ``stand_in``, which is never read, where there is none."""
        return [stand_in if v is None else v.contiguous() for v in (self.scale, self.shift)]

    def numbers(self) -> dict[str, int]:
        """The kernels' arguments."""
        pitch = self.shift.size(1) if self.is_per_sample and self.shift is not None else 0
        given = {"has_scale": self.scale is not None, "has_shift": self.shift is not None}
        given["relu"] = self.relu
        return {"shift_pitch": pitch, **{name: int(value) for name, value in given.items()}}


PLAIN = Epilogue()


class Statistics(NamedTuple):
    """Of the tiles of an output: means and sums of squared differences ``[tiles, n]``."""

    found: Work
    means: Tensor
    squares: Tensor

    def combined(self, channels: int) -> tuple[Tensor, Tensor]:
        """The same of the channels, ``[channels]`` each."""
        # Results of an operator must not share memory.
        mean, square = (self.means.new_empty(channels) for _ in range(2))
        with on_device(self.means.device):
            combine_kernel[(self.found.group_count,)](
                self.found.groups, self.found.tile_rows, self.means, self.squares, mean, square,
                N=self.means.size(1), W=GROUP, T=TILES_AT_A_TIME,
            )  # fmt: skip
        return mean, square


def precision(dtype: torch.dtype, tf32: bool) -> str:
    """How ``tl.dot`` multiplies float32; narrower types have no choice."""
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


_compiled: set[tuple[object, ...]] = set()


def finish(
    kernel: Any, target: Target, found: Work, across: int, *arguments: Any, **fixed: Any
) -> None:
    """Launches what adds up slices, ``across`` programs for each tile that has some.

    Without any it is compiled all the same, once, so that the first shape that needs it finds it.
    """
    if found.cut_count:
        kernel[(found.cut_count, across)](*arguments, **fixed)
        return
    dtypes = tuple(a.dtype for a in arguments if isinstance(a, Tensor))
    constants = tuple((name, value) for name, value in fixed.items() if name.isupper())
    key = (kernel, target, dtypes, constants)
    if key not in _compiled and not target.is_interpreter:
        kernel.warmup(*arguments, grid=(1, across), **fixed)
    _compiled.add(key)


def partials_of(found: Work, chosen: Configuration, like: Tensor) -> Tensor:
    """Memory for the sums of all slices."""
    size = max(found.partials * chosen.m * chosen.n, 1)
    return torch.empty(size, dtype=torch.float32, device=like.device)


def gather(
    pass_: Pass,
    a: Rows,
    weights: Sequence[Tensor],
    out: Rows,
    shape: Shape,
    branches: Sequence[Branch],
    tf32: bool,
    epilogue: Epilogue = PLAIN,
    statistics: bool = False,
) -> Statistics:
    """Forward or the gradient of the input, from ``a`` to ``out``.

    Args:
        pass_: "forward" or "grad_input".
        weights: per branch ``[O, taps, C up to a whole chunk]``.
        statistics: whether to make them; without, the result's tensors hold nothing.
    """
    like = a.data
    target, products = target_of(like.device), precision(like.dtype, tf32)
    chunk = operands.chunk(like.dtype)
    columns = shape.in_channels if pass_ == "grad_input" else max(b.rows for b in branches)
    vectors = epilogue.vectors(out.data)
    numbers = {"height": shape.height, "width": shape.width, "out_chunks": out.chunks}
    numbers |= epilogue.numbers()

    def launch(chosen: Configuration) -> Statistics:
        found = work.find(target, pass_, shape, chosen.tile, branches)
        partials = partials_of(found, chosen, like)
        means = squares = partials
        if statistics:
            size = (2, found.tiles, chosen.n)
            means, squares = torch.empty(size, dtype=torch.float32, device=like.device)
        fixed: dict[str, int] = {"STATISTICS": statistics, "PER_SAMPLE": epilogue.is_per_sample}
        fixed |= {"M": chosen.m, "N": chosen.n, "CHUNK": chunk}
        with on_device(like.device):
            gather_kernel[(found.unit_count,)](
                found.units, found.regions, found.runs, found.branches, like, tuple(weights),
                out.data, *vectors, partials, means, squares, **numbers, a_chunks=a.chunks,
                b_chunks=weights[0].size(2) // chunk, GRAD_INPUT=pass_ == "grad_input",
                BRANCHES=len(weights), K=chosen.k, PRECISION=products,
                **fixed, **chosen.options(target),
            )  # fmt: skip
            width = min(FINISH_COLUMNS, chosen.n)
            finish(
                finish_gather_kernel, target, found, chosen.n // width,
                found.units, found.cut, found.regions, found.branches, out.data, *vectors,
                partials, means, squares, **numbers, W=width, **fixed,
            )  # fmt: skip
        return Statistics(found, means, squares)

    per_sample = epilogue.is_per_sample
    candidates = gather_candidates(target, pass_, like.dtype, products, columns, per_sample)
    problem = (pass_, like.dtype, products, per_sample, statistics, *shape)
    return launch(tuning.choose(target, problem, candidates, launch))


def grad_weight(
    grad: Rows,
    x: Rows,
    outs: Sequence[Tensor],
    shape: Shape,
    branches: Sequence[Branch],
    tf32: bool,
) -> None:
    """The gradient of the weights, from ``grad`` and ``x`` to ``outs``, per branch
    ``[O, taps, C up to a whole chunk]``."""
    like = x.data
    target, products = target_of(like.device), precision(like.dtype, tf32)
    numbers = {"channel_chunks": outs[0].size(2) // operands.chunk(like.dtype)}

    def launch(chosen: Configuration) -> None:
        found = work.find(target, "grad_weight", shape, chosen.tile, branches)
        partials = partials_of(found, chosen, like)
        fixed = {"BRANCHES": len(outs), "M": chosen.m, "N": chosen.n}
        fixed["CHUNK"] = operands.chunk(like.dtype)
        with on_device(like.device):
            grad_weight_kernel[(found.unit_count,)](
                found.units, found.regions, found.runs, found.branches, grad.data, x.data,
                tuple(outs), partials, batch=shape.batch, height=shape.height, width=shape.width,
                a_chunks=grad.chunks, b_chunks=x.chunks, K=chosen.k, PRECISION=products,
                **numbers, **fixed, **chosen.options(target),
            )  # fmt: skip
            width = min(FINISH_COLUMNS, chosen.n)
            finish(
                finish_grad_weight_kernel, target, found, chosen.n // width,
                found.units, found.cut, found.regions, found.runs, found.branches,
                tuple(outs), partials, W=width, **numbers, **fixed,
            )  # fmt: skip

    candidates = weight_candidates(target, like.dtype, products, shape.in_channels)
    problem = ("grad_weight", like.dtype, products, *shape)
    launch(tuning.choose(target, problem, candidates, launch))
