# SPDX-License-Identifier: BSD-3-Clause
"""The depthwise-separable pyramid's operators (csrc/library.cpp), of arguments that have been
checked.

Forward is one launch. Its gradients are those of its parts: what is between the convolutions and
its gradient make one trip through memory, branch after branch, because the products' loops could
not recompute them as fast as they need them. The gradients of the 1x1s are the dense operators'.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import pairs
from ..ops.formats import empty_image
from . import operands, tuning, work
from .configurations import Configuration
from .depthwise_kernels import (
    add_tiles_kernel,
    depthwise_kernel,
    finish_grad_input_kernel,
    grad_depthwise_kernel,
    grad_input_kernel,
    pack_kernel,
)
from .launches import FINISH_COLUMNS, Epilogue, finish, partials_of, precision
from .operands import Rows
from .pyramid import atrous_pyramid_grad_input, atrous_pyramid_grad_weight
from .pyramid_kernels import finish_gather_kernel
from .separable_configurations import (
    GRAD_DEPTHWISE,
    TILES_AT_A_TIME,
    depthwise_configuration,
    separable_candidates,
    sums_at_a_time,
)
from .separable_kernels import separable_kernel
from .target import Target, on_device, target_of
from .work import Branch, Shape, Work

BLOCK = 64
"""As in ``taps.py``: rows of packed weights are a multiple of so many channels."""

TAPS_AT_A_TIME = 16
"""Of a program that packs weights."""

MOST_SUMS = 2**26
"""Elements of the sums of tiles that a gradient of depthwise weights makes at a time."""

POINTWISE = [1, 1]
"""The kernel and the rates of a 1x1."""


class Part(NamedTuple):
    """A branch: depthwise weights or none, what is between or nothing."""

    depthwise: Tensor
    scale: Tensor
    shift: Tensor
    rate: tuple[int, int]

    @property
    def is_plain(self) -> bool:
        return self.depthwise.numel() == 0

    @property
    def has_between(self) -> bool:
        return self.scale.numel() > 0

    @property
    def kernel(self) -> tuple[int, int]:
        return (1, 1) if self.is_plain else (self.depthwise.size(2), self.depthwise.size(3))

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


class Packed(NamedTuple):
    """Weights of all branches as the kernels read them, in float32."""

    depthwise: Tensor  # [taps of all branches, blocks * BLOCK]
    affine: Tensor  # [branches, 2, blocks * BLOCK]
    rows: list[int]  # where branches begin in depthwise
    blocks: int


def _parts(
    x: Tensor,
    depthwise: Sequence[Tensor],
    rates: list[int],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
) -> list[Part]:
    nothing = [x.new_empty((0,))] * len(depthwise)
    listed = zip(depthwise, scale or nothing, shift or nothing, pairs(rates), strict=True)
    return [Part(*part) for part in listed]


def _rows(parts: Sequence[Part]) -> list[int]:
    """Where the parts' taps begin among those of all, and where they end."""
    return list(itertools.accumulate((part.taps for part in parts), initial=0))


def _record(part: Part, row: int) -> Branch:
    """What the kernels read of a branch: of a left operand, here the first row of its packed
    weights, whether something is between, and its taps, 0 for a plain branch."""
    taps = 0 if part.is_plain else part.taps
    return Branch(a_first=row, a_extent=int(part.has_between), taps=taps)


def _packed(parts: Sequence[Part], x: Tensor, records: Tensor) -> Packed:
    """Packs what ``records`` on the device, one per branch, describe."""
    channels, rows = x.size(1), _rows(parts)
    blocks = -(-channels // BLOCK)
    operands.check_limit(max(part.taps for part in parts) * blocks * BLOCK, "weight")
    depthwise = torch.empty(rows[-1], blocks * BLOCK, dtype=torch.float32, device=x.device)
    affine = torch.empty(len(parts), 2, blocks * BLOCK, dtype=torch.float32, device=x.device)
    fields = zip(*((p.depthwise, p.scale, p.shift) for p in parts), strict=True)
    given = [t.contiguous() if t.numel() else x for field in fields for t in field]
    with on_device(x.device):
        pack_kernel[(len(parts), blocks)](
            records, tuple(given), depthwise, affine, channels, blocks, BRANCHES=len(parts),
            T=TAPS_AT_A_TIME, W=BLOCK,
        )  # fmt: skip
    return Packed(depthwise, affine, rows, blocks)


def _shape(x: Tensor, channels: int, parts: Sequence[Part], widths: Sequence[int]) -> Shape:
    n, _, h, w = x.shape
    branches = zip(parts, widths, strict=True)
    return Shape(n, h, w, channels, tuple((p.kernel, p.rate, width) for p, width in branches))


def atrous_separable_pyramid(
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    rates: list[int],
    between_scale: Sequence[Tensor],
    between_shift: Sequence[Tensor],
    between_relu: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    tf32: bool = False,
) -> Tensor:
    """``[N, sum O, H, W]``."""
    widths, channels = [p.size(0) for p in pointwise], x.size(1)
    sources = [x, *pointwise]
    parts = _parts(x, depthwise, rates, between_scale, between_shift)
    shape = _shape(x, channels, parts, widths)
    if shape.pixels == 0:
        return empty_image(x, sum(widths), sources)
    source = operands.image(x)
    weights = [operands.weight(p) for p in pointwise]
    out, firsts = operands.out_rows(x, shape.pixels, widths)
    branches = [
        _record(part, row)._replace(
            out_first=first,
            out_extent=operands.chunks(width, x.dtype),
            rows=width,
            vector=sum(widths[:b]),
        )
        for b, (part, row, first, width) in enumerate(
            zip(parts, _rows(parts)[:-1], firsts, widths, strict=True)
        )
    ]
    epilogue = Epilogue(scale, shift, relu)
    target, products = target_of(x.device), precision(x.dtype, tf32)
    chunk = operands.chunk(x.dtype)
    numbers = {"height": shape.height, "width": shape.width, "out_chunks": out.chunks}
    numbers |= epilogue.numbers()

    def launch(chosen: Configuration) -> None:
        found = work.find(target, "separable", shape, chosen.tile, branches)
        packed = _packed(parts, x, found.branches)
        partials = partials_of(found, chosen, x)
        vectors = epilogue.vectors(out.data)
        fixed: dict[str, int] = {"PER_SAMPLE": epilogue.is_per_sample}
        fixed |= {"M": chosen.m, "N": chosen.n, "CHUNK": chunk}
        with on_device(x.device):
            separable_kernel[(found.unit_count,)](
                found.units, found.regions, found.runs, found.branches, source.data,
                tuple(weights), packed.depthwise, packed.affine, out.data, *vectors, partials,
                **numbers, x_chunks=source.chunks, weight_chunks=weights[0].size(2) // chunk,
                blocks=packed.blocks, between_relu=int(between_relu), BRANCHES=len(parts),
                K=chosen.k, TAPS=chosen.stages, PRECISION=products,
                **fixed, num_warps=chosen.warps, num_stages=1,
            )  # fmt: skip
            width = min(FINISH_COLUMNS, chosen.n)
            finish(
                finish_gather_kernel, target, found, chosen.n // width,
                found.units, found.cut, found.regions, found.branches, out.data, *vectors,
                partials, partials, partials, **numbers, STATISTICS=False, W=width, **fixed,
            )  # fmt: skip

    per_sample = epilogue.is_per_sample
    candidates = separable_candidates(target, x.dtype, products, max(widths), per_sample)
    problem = ("separable", x.dtype, products, per_sample, *shape)
    launch(tuning.choose(target, problem, candidates, launch))
    return operands.to_image(out, firsts, widths, x, sources)


def _channels_last(t: Tensor) -> Tensor:
    """t, or what the dense operators read in place of it without a copy of their own."""
    rows = operands.image(t)
    return t if rows.data is t else rows.data.permute(0, 3, 1, 2)[:, : t.size(1)]


class _Backward:
    """The gradients of one call: what its branches have in common, and the launches."""

    def __init__(self, x: Tensor, parts: Sequence[Part], relu: bool) -> None:
        self.x, self.parts, self.relu = x, parts, relu
        self.channels = x.size(1)
        self.image = _channels_last(x)
        self.rows = operands.image(self.image)
        self.target: Target = target_of(x.device)
        records = [_record(p, row) for p, row in zip(parts, _rows(parts)[:-1], strict=True)]
        self.shape = _shape(x, self.channels, parts, [1] * len(parts))
        self.chosen = depthwise_configuration(x.dtype)
        tile = self.chosen.tile
        self.joint = work.find(self.target, "grad_input", self.shape, tile, records)
        self.packed = _packed(parts, x, self.joint.branches)
        self.chunk = operands.chunk(x.dtype)
        self.numbers = {"height": self.shape.height, "width": self.shape.width}
        self.numbers |= {"chunks": operands.chunks(self.channels, x.dtype)}
        self.numbers |= {"blocks": self.packed.blocks}

    def _alone(self, part: Part, pixels: int) -> Work:
        """The tiles of pixels of one branch; all its channels are one tile."""
        shape = _shape(self.x, 1, [part], [self.channels])
        tile = work.Tile(pixels, self.channels, 1)
        return work.find(self.target, "separable", shape, tile, [Branch()])

    def _add_tiles(self, sums: Tensor, out: Tensor, rows: int, steps: tuple[int, int]) -> None:
        """Adds up ``[tiles, rows, ...]`` to out, whose channels and rows are so far apart."""
        blocks, width = self.packed.blocks, sums_at_a_time(self.target)
        with on_device(out.device):
            add_tiles_kernel[(-(-rows * blocks * BLOCK // width),)](
                sums, out, sums.size(0), sums.stride(0) // BLOCK, rows, blocks, self.channels,
                *steps, N=BLOCK, T=TILES_AT_A_TIME, W=width,
            )  # fmt: skip

    def between(
        self, b: int, grad: Rows | None, forward: bool, of_vectors: Sequence[Tensor]
    ) -> Tensor:
        """What branch b's 1x1 reads ``[N, C, H, W]``, if ``forward``. With ``grad``, its gradient,
        which becomes that of the depthwise result, those of scale and shift, ``of_vectors``."""
        part, n, h, w = self.parts[b], *self.x.shape[:1], *self.x.shape[2:]
        chosen = self.chosen
        found = self._alone(part, chosen.m)
        e = self.rows
        if forward:
            e, _ = operands.out_rows(self.x, self.shape.pixels, [self.channels])
        sums = self.packed.affine
        if grad is not None:
            size = (found.tiles, 2, self.packed.blocks * BLOCK)
            sums = torch.empty(size, dtype=torch.float32, device=self.x.device)
        given = self.rows if grad is None else grad
        with on_device(self.x.device):
            depthwise_kernel[(found.unit_count, self.packed.blocks)](
                found.units, found.regions, found.runs, self.rows.data, given.data, e.data,
                given.data, self.packed.depthwise[self.packed.rows[b] :], self.packed.affine[b],
                sums, **self.numbers, x_chunks=self.rows.chunks, grad_chunks=given.chunks,
                relu=int(self.relu and part.has_between), FORWARD=forward,
                GRADIENT=grad is not None, M=chosen.m, N=chosen.n, TAPS=chosen.stages,
                CHUNK=self.chunk, num_warps=chosen.warps, num_stages=1,
            )  # fmt: skip
        for i, of_vector in enumerate(of_vectors):
            self._add_tiles(sums[:, i], of_vector, 1, (1, 0))
        if not forward:
            return self.image
        return e.data.view(n, h, w, -1).permute(0, 3, 1, 2)[:, : self.channels]

    def depthwise(self, b: int, grad: Rows, out: Tensor) -> None:
        """The gradient ``[C, 1, kh, kw]``; grad is that of the depthwise result."""
        part = self.parts[b]
        found = self._alone(part, GRAD_DEPTHWISE.m)
        pitch = self.packed.blocks * BLOCK
        at_a_time = min(part.taps, max(MOST_SUMS // (found.tiles * pitch), 1))
        for first in range(0, part.taps, at_a_time):
            taps = min(at_a_time, part.taps - first)
            size = (found.tiles, taps, pitch)
            sums = torch.zeros(size, dtype=torch.float32, device=self.x.device)
            with on_device(self.x.device):
                grad_depthwise_kernel[(found.unit_count, self.packed.blocks)](
                    found.units, found.regions, found.runs, grad.data, self.rows.data, sums,
                    **self.numbers, x_chunks=self.rows.chunks, grad_chunks=grad.chunks,
                    first_tap=first, taps=taps, M=GRAD_DEPTHWISE.m, N=GRAD_DEPTHWISE.n,
                    CHUNK=self.chunk, num_warps=GRAD_DEPTHWISE.warps, num_stages=1,
                )  # fmt: skip
            self._add_tiles(sums, out.view(-1)[first:], taps, (part.taps, 1))

    def input(self, grads: Sequence[Rows]) -> Tensor:
        """The gradient of x from those of all depthwise results."""
        found, chosen = self.joint, self.chosen
        out, firsts = operands.out_rows(self.x, self.shape.pixels, [self.channels])
        partials = partials_of(found, chosen, self.x)
        tile = {"M": chosen.m, "N": chosen.n, "CHUNK": self.chunk, "num_warps": chosen.warps}
        with on_device(self.x.device):
            grad_input_kernel[(found.unit_count,)](
                found.units, found.regions, found.runs, found.branches,
                tuple(g.data for g in grads), self.packed.depthwise, out.data, partials,
                **self.numbers, BRANCHES=len(grads), TAPS=chosen.stages, num_stages=1, **tile,
            )  # fmt: skip
            finish(
                finish_grad_input_kernel, self.target, found, 1,
                found.units, found.cut, found.regions, out.data, partials, self.shape.height,
                self.shape.width, self.numbers["chunks"], **tile,
            )  # fmt: skip
        return operands.to_image(out, firsts, [self.channels], self.x, [self.x])


def _zeros(tensors: Sequence[Tensor], needed: bool) -> list[Tensor]:
    return [t.new_zeros(t.shape) for t in tensors] if needed else []


def atrous_separable_pyramid_backward(
    grad: Tensor,
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    rates: list[int],
    between_scale: Sequence[Tensor],
    between_shift: Sequence[Tensor],
    between_relu: bool,
    need_x: bool,
    need_depthwise: bool,
    need_pointwise: bool,
    need_between: bool,
    tf32: bool = False,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of x, depthwise, pointwise, between_scale and between_shift; empty where they are
    not needed."""
    if x.numel() == 0:
        return (
            empty_image(x, x.size(1), [x]) if need_x else x.new_empty((0,)),
            _zeros(depthwise, need_depthwise),
            _zeros(pointwise, need_pointwise),
            _zeros(between_scale, need_between),
            _zeros(between_shift, need_between),
        )
    parts = _parts(x, depthwise, rates, between_scale, between_shift)
    shared = _Backward(x, parts, between_relu)
    of_x: list[Rows] = []
    of_depthwise: list[Tensor] = []
    of_pointwise: list[Tensor] = []
    of_between: list[list[Tensor]] = []
    slices = _channels_last(grad).split([p.size(0) for p in pointwise], 1)
    for b, (part, weight, own) in enumerate(zip(parts, pointwise, slices, strict=True)):
        needs_depthwise = need_depthwise and not part.is_plain
        back: Rows | None = None
        if need_x or needs_depthwise or (need_between and part.has_between):
            back = operands.image(atrous_pyramid_grad_input(own, [weight], POINTWISE, tf32))
        operand = shared.image
        pair = [x.new_empty(x.size(1) if part.has_between else 0) for _ in range(2)]
        forward = need_pointwise and not part.is_plain
        between = back if part.has_between else None
        if forward or between is not None:
            of_vectors = pair if need_between and between is not None else []
            operand = shared.between(b, between, forward, of_vectors)
        if need_pointwise:
            out_channels = [weight.size(0)]
            of_pointwise += atrous_pyramid_grad_weight(
                own, operand, POINTWISE, out_channels, POINTWISE, tf32
            )
        if need_depthwise:
            of_depthwise.append(x.new_empty(part.depthwise.shape))
        if needs_depthwise and back is not None:
            shared.depthwise(b, back, of_depthwise[b])
        if need_x and back is not None:
            of_x.append(back)
        of_between.append(pair)
        del back, between, operand  # the next branch's may take their memory
    listed = of_between if need_between and len(between_scale) else []
    grad_x = shared.input(of_x) if need_x else x.new_empty((0,))
    return (
        grad_x,
        of_depthwise,
        of_pointwise,
        [pair[0] for pair in listed],
        [pair[1] for pair in listed],
    )
