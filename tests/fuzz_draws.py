# SPDX-License-Identifier: BSD-3-Clause
"""What the fuzzer draws: sizes, branches, values and layouts, weighted to where faults are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aspp_ext.testing import laid_out

Pair = tuple[int, int]

PRIMES = (13, 17, 31, 37, 61, 67, 127, 131, 257)
BLOCKS = (16, 32, 48, 64, 80, 128, 192, 256)
KERNELS = [(3, 3)] * 9 + [(1, 1)] * 4 + [(5, 5)] * 2
KERNELS += [(7, 7), (1, 3), (3, 1), (5, 1), (1, 5), (5, 3), (1, 7)]
RATES = (1, 1, 2, 3, 4, 5, 6, 8, 12, 18, 24, 36)
LAYOUTS = ["contiguous"] * 6 + ["channels_last"] * 4
LAYOUTS += ["transposed", "sliced", "strided", "offset", "outputs_last", "steps_not_taken"]
LAYOUTS += ["expanded_batch", "expanded_channels", "expanded_plane"]
DTYPES = [torch.float32] * 5 + [torch.float64] * 2 + [torch.bfloat16] * 2 + [torch.float16]
FAR_FROM_OVERFLOW = 1e30
"""Where a value passes through several sums, of which one may be infinite and no other."""
INTEGERS, NORMAL, RANGES = "integers", "normal", "ranges"


class Draws(random.Random):
    """The same draws for the same name, on every machine; torch's generator is seeded by it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        torch.manual_seed(self.getrandbits(60))

    def maybe(self, share: float) -> bool:
        return self.random() < share

    def channels(self, most: int = 300) -> int:
        kind = self.random()
        if kind < 0.5:
            return self.randint(1, 12)
        if kind < 0.85:
            return self.choice([c for c in (PRIMES if kind < 0.65 else BLOCKS) if c <= most])
        return self.randint(1, most)

    def side(self) -> int:
        kind = self.random()
        if kind < 0.75:
            return self.randint(1, 12)
        return self.randint(13, 32) if kind < 0.95 else self.randint(33, 70)

    def plane(self) -> list[int]:
        sides = [self.side(), self.side()]
        if self.maybe(0.12):
            sides = [self.randint(1, 2), self.randint(1, 70)]
            self.shuffle(sides)
        return sides

    def batch(self) -> int:
        return 0 if self.maybe(0.02) else self.choice([1, 1, 1, 2, 2, 3, 4])

    def rate(self) -> int:
        return self.choice(RATES) if self.maybe(0.8) else self.randint(1, 40)

    def rates(self) -> int | Pair:
        return (self.rate(), self.rate()) if self.maybe(0.2) else self.rate()

    def laid_out(self, t: Tensor) -> Tensor:
        """As some views lie, with NaN around them; those that are expanded change its values."""
        if t.dim() not in (1, 4) or t.numel() == 0:
            return t
        if t.dim() == 1:
            return laid_out(t, self.choice(["contiguous"] * 3 + ["sliced", "strided", "offset"]))
        return laid_out(t, self.choice(LAYOUTS))

    def values(self, kind: str, *shape: int, terms: int = 1) -> Tensor:
        """float64; ``terms`` are those of the sums that these are for: they stay of one size."""
        if kind != INTEGERS:
            return torch.randn(shape, dtype=torch.float64) * (terms**-0.5)
        t = torch.randint(-2, 3, shape, dtype=torch.float64)
        return t * (torch.rand(shape) < 24 / terms)

    def image(self, kind: str, *shape: int, most: float = math.inf) -> Tensor:
        """[N, C, ...]; what is drawn of RANGES in one call may lie on each other."""
        x = self.values(kind, *shape)
        if not x.numel():
            return x
        if kind == INTEGERS and self.maybe(0.25):
            self.choice(EXACT)(self, x)
        if kind == RANGES:
            for _ in range(self.choice([1, 1, 2])):
                self.choice(EXACT + UNEQUAL)(self, x)
        return torch.where(x.isfinite(), x.clamp(-most, most), x)


def some_pixels(d: Draws, x: Tensor) -> Tensor:
    """A view of one pixel, of one or of all channels."""
    pixel = x[d.randrange(len(x))]
    for size in x.shape[2:]:
        pixel = pixel.select(1, d.randrange(size))
    return pixel[d.randrange(len(pixel)) :][:1] if d.maybe(0.7) else pixel


def some_part(d: Draws, x: Tensor) -> Tensor:
    """A sample, or of all a half, a row, a column or a border of the map."""
    if d.maybe(0.2):
        return x[d.randrange(len(x))]
    axis = d.randrange(2, x.dim())
    size = x.size(axis)
    length = d.choice([1, (size + 1) // 2, d.randint(1, size)])
    return x.narrow(axis, d.choice([0, size - length, d.randint(0, size - length)]), length)


def not_finite(d: Draws, x: Tensor) -> None:
    some_pixels(d, x).fill_(d.choice([torch.nan, torch.inf, -torch.inf]))


def nothing(d: Draws, x: Tensor) -> None:
    some_part(d, x).zero_()


def huge_pixel(d: Draws, x: Tensor) -> None:
    some_pixels(d, x).fill_(d.choice([1e4, 1e20, -1e30, 3e38]))


def filled(d: Draws, x: Tensor) -> None:
    some_part(d, x).fill_(d.choice([-3.4e38, 1e20, -1e9, 255.0]))


def scaled(d: Draws, x: Tensor) -> None:
    some_part(d, x).mul_(d.choice([1e-3, 1e-3, 1e-8, 1e3, 1e8]))


def unequal_channels(d: Draws, x: Tensor) -> None:
    x[:, d.randrange(x.size(1)) :].mul_(d.choice([0, 1e-6, 1e6]))


EXACT: list[Callable[[Draws, Tensor], None]] = [not_finite, nothing, nothing]
UNEQUAL = [huge_pixel, filled, filled, scaled, scaled, scaled, unequal_channels]


def smaller(d: Draws, sizes: dict[str, int], cost: Callable[[], int], most: int) -> None:
    """Halves some of ``sizes`` until their cost is not too much."""
    while cost() > most:
        name = d.choice([name for name, size in sizes.items() if size > 1])
        sizes[name] = (sizes[name] + 1) // 2


def same_bits(a: Any, b: Any) -> bool:
    """Of tensors; NaN equals NaN."""
    if isinstance(a, Tensor):
        return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def kept(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the memory that they are in, around them too."""
    return [torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in tensors]
