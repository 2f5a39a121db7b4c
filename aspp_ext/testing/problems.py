# SPDX-License-Identifier: BSD-3-Clause
"""The table ``PROBLEMS``: shapes and branches, how tensors lie in memory, and what is in them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Branch:
    """One branch; the separable operators take a 1x1 kernel at rate 1 as a plain convolution."""

    out_channels: int
    kernel: Pair = (3, 3)
    rate: Pair = (1, 1)

    @property
    def plain(self) -> bool:
        return self.kernel == (1, 1) and self.rate == (1, 1)


@dataclass(frozen=True)
class Problem:
    """A small input ``[N, C, H, W]``, its branches, and how the tensors lie in memory."""

    name: str
    shape: tuple[int, int, int, int]
    branches: tuple[Branch, ...]
    layout: str = "contiguous"
    weight_layout: str = "contiguous"

    @property
    def rates(self) -> list[int]:
        return [r for b in self.branches for r in b.rate]

    @property
    def out_channels(self) -> int:
        return sum(b.out_channels for b in self.branches)


Spec = tuple[int] | tuple[int, int | Pair] | tuple[int, int | Pair, int | Pair]


def _branch(out_channels: int, kernel: int | Pair = 3, rate: int | Pair = 1) -> Branch:
    def pair(v: int | Pair) -> Pair:
        return (v, v) if isinstance(v, int) else v

    return Branch(out_channels, pair(kernel), pair(rate))


def _problem(
    name: str, shape: tuple[int, int, int, int], *branches: Spec, **layouts: str
) -> Problem:
    """Branches: (out_channels, kernel = 3, rate = 1)."""
    return Problem(name, shape, tuple(_branch(*spec) for spec in branches), **layouts)


def _aspp(out_channels: int, *rates: int) -> list[Spec]:
    return [(out_channels, 1), *((out_channels, 3, rate) for rate in rates)]


_HUGE = 2**31 - 1
_CUT_OUT = {"channel_slice": (16, 0, 0), "row_slice": (0, 1, 0), "column_slice": (0, 0, 2)}
"""Layout -> channels, rows and columns of NaN before and behind those of a channels_last image."""
_X_LAYOUTS = (
    *("channels_last", "offset", "sliced", "strided", "transposed"),
    *("expanded_batch", "expanded_channels", "expanded_plane"),
    *_CUT_OUT,
)
_WEIGHT_LAYOUTS = ("channels_last", "outputs_last", "sliced", "strided", "offset", *_CUT_OUT)
_ANY_LAYOUT: tuple[Spec, ...] = ((16, 1), (5, 3, 2), (32, 3, (1, 4)))

_PROBLEMS = (
    _problem("aspp", (2, 16, 17, 17), *_aspp(16, 3, 6, 9)),
    _problem("one_branch", (1, 8, 6, 8), (8, 3, 2)),
    _problem("seven_branches", (1, 6, 9, 8), *_aspp(4, 1, 2, 3, 5, 8), (3, 5, 2)),
    _problem("prime_sizes", (3, 13, 7, 11), (5, 3, 2), (17, 1), (1, 3, 5)),
    _problem("one_channel", (1, 1, 4, 5), (1,), (2, 1)),
    _problem("channels_not_of_8", (2, 43, 5, 6), (11, 3, 2), (9, 1)),
    _problem("channel_blocks", (1, 301, 4, 5), (3, 3, 2), (4, 1)),
    _problem("channel_blocks_dense", (1, 144, 3, 4), (18,), (18, 3, 2)),
    _problem("outputs_not_of_16", (1, 5, 8, 7), (33, 3, 3), (70, 1), (15,)),
    _problem("rate_of_the_map", (2, 4, 6, 5), (3, 3, 6), (3, 3, 5), (3, 3, 4)),
    _problem("rate_above_the_map", (2, 5, 4, 6), (3, 3, 9), (4, 5, 100), (2, 3, (7, 1))),
    _problem("rate_maximum", (1, 3, 4, 5), (2, 3, _HUGE), (3, 5, (1, _HUGE))),
    _problem("rate_maximum_in_a_window", (1, 3, 2, 411), (2, 3, _HUGE), (3, 5, (1, _HUGE))),
    _problem("one_pixel", (3, 6, 1, 1), *_aspp(5, 1, 7)),
    _problem("one_row", (1, 4, 1, 29), (5, 3, 4), (4, (1, 3), 6), (4, (1, 5), 2)),
    _problem("one_column", (2, 4, 23, 1), (5, 3, 4), (4, (3, 1), 6)),
    _problem("empty_batch", (0, 5, 6, 7), *_aspp(4, 2)),
    _problem("kernel_5x5", (1, 6, 12, 13), (5, 5, 2), (4, 5, 1)),
    _problem("kernel_1x3_3x1", (1, 6, 7, 9), (5, (1, 3), 2), (4, (3, 1), 3)),
    _problem("kernel_7x1_3x5", (2, 3, 11, 9), (5, (7, 1), 2), (4, (3, 5), (4, 1))),
    _problem("kernel_1x1_at_a_rate", (1, 7, 5, 6), (5, 1, 3), (3, 1)),
    _problem("kernel_63x63", (1, 2, 9, 8), (3, 63, 1), (2, (63, 1), 2)),
    _problem("many_triples", (8, 56, 9, 9), *_aspp(56, 3)),
    _problem("rates_per_axis", (2, 9, 10, 14), (6, 3, (1, 6)), (6, 3, (5, 2))),
    _problem("many_chunks", (1, 3, 41, 40), (5, 3, 12), (4, 3, 7), (3, 1)),
    _problem("row_windows", (1, 3, 3, 431), (4, 3, (1, 150)), (2, 3, (2, 3)), (2, 1)),
    _problem("row_windows_batch", (2, 2, 2, 811), (3, (1, 3), 6), (2, 3, (1, 500))),
    _problem("row_at_the_chunk_limit", (1, 4, 3, 384), (3, 3, (1, 9)), (2, 1)),
    _problem("row_below_the_chunk_limit", (1, 4, 4, 191), (3, 3, (2, 90)), (2, 1)),
    *(_problem(f"x_{k}", (2, 20, 6, 18), *_ANY_LAYOUT, layout=k) for k in _X_LAYOUTS),
    *(
        _problem(f"weights_{k}", (1, 6, 5, 7), *_ANY_LAYOUT, weight_layout=k)
        for k in _WEIGHT_LAYOUTS
    ),
    # Of whole 16 bytes in every dtype, so that kernels read them in place: weights too.
    *(
        _problem(f"in_place_{k}", (1, 40, 6, 18), *_ANY_LAYOUT, layout=k, weight_layout=k)
        for k in _CUT_OUT
    ),
    *(
        _problem(f"{k}_{c}", (1, c, 6, 1), (c, 1), (c, 3, 2), layout=k, weight_layout=k)
        for k, c in (("steps_not_taken", 1), ("steps_not_taken", 16))
    ),
)
PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in _PROBLEMS}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` with other strides. Memory between the elements is NaN, so that touching it shows.

    The ``expanded`` layouts repeat a slice of ``t`` (stride 0), hence change its values.
    """
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()
    if layout == "outputs_last":  # stride 1 over O: the kernels read such weights in place
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t
    if layout.startswith("expanded_"):
        kept = {"batch": (0,), "channels": (1,), "plane": (2, 3)}[layout.removeprefix("expanded_")]
        index = tuple(slice(0, 1) if d in kept else slice(None) for d in range(t.dim()))
        return t[index].expand(t.shape)
    if layout == "steps_not_taken":  # of dimensions with one element: any step is as good
        steps = [
            2**60 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)
        ]
        return t.as_strided(t.shape, steps)
    if layout in _CUT_OUT:
        return _cut_out(t, _CUT_OUT[layout]) if t.dim() == 4 else t.contiguous()
    first, step, extra = {"offset": (0, 1, 0), "sliced": (1, 1, 3), "strided": (1, 2, 1)}[layout]
    sizes = [s * step + extra for s in t.shape]
    places = 1 + int(torch.Size(sizes).numel())
    memory = torch.full((places,), torch.nan, dtype=t.dtype, device=t.device)
    view = memory[1:].view(sizes)[tuple(slice(first, first + s * step, step) for s in t.shape)]
    return view.copy_(t)


def _cut_out(t: Tensor, around: tuple[int, int, int]) -> Tensor:
    """``t [N, C, H, W]`` as a part of a channels_last image whose memory ends with the part's last
    element, so that reading on is reading somebody else's."""
    sizes = zip(t.shape[1:], around, strict=True)
    channels, rows, columns = (size + 2 * nan for size, nan in sizes)
    strides = (rows * columns * channels, 1, columns * channels, channels)
    first = sum(a * s for a, s in zip(around, strides[1:], strict=True))
    last = first + sum((s - 1) * stride for s, stride in zip(t.shape, strides, strict=True))
    memory = torch.full((max(last + 1, 0),), torch.nan, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, strides, first if t.numel() else 0).copy_(t)


class Values:
    """Tensors for a problem: small integers (``integer``), or normal values scaled by fan-in.

    The integers are so small that bfloat16 holds every intermediate result of every problem. The
    values are the same on every device, for they are drawn on the CPU.
    """

    def __init__(
        self, dtype: torch.dtype, integer: bool, seed: str, device: str | torch.device = "cpu"
    ) -> None:
        self.dtype, self.integer, self.device = dtype, integer, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def __call__(self, *shape: int, fan_in: int = 1, layout: str = "contiguous") -> Tensor:
        if self.integer:
            most = 1 if fan_in > 1 else 2
            t = torch.randint(-most, most + 1, shape, generator=self.generator).double()
        else:
            t = torch.randn(shape, generator=self.generator, dtype=torch.float64) / fan_in**0.5
        return laid_out(t.to(self.device, self.dtype), layout)
