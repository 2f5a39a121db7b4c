# SPDX-License-Identifier: BSD-3-Clause
"""Which tile the kernels of the depthwise-separable pyramid run with: pure functions."""

from __future__ import annotations

import torch

from .configurations import Configuration, family
from .target import Target

# Widest first. ``stages`` are the taps whose loads are in flight together: x goes to registers, not
# through shared memory. 64 rows leave room for two programs on a multiprocessor, so that one's taps
# hide the other's product; before Hopper that many columns spill with four warps.
_WIDE = Configuration(64, 256, 32, 4, 3)
_MIDDLE = Configuration(64, 128, 64, 4, 2)
_SHALLOW = _MIDDLE._replace(k=32, stages=3)  # where that spills with a shift per sample
_NARROW = Configuration(64, 64, 32, 4, 3)
_FORWARD = {
    "sm_80": (Configuration(128, 256, 32, 8, 3), _SHALLOW, _NARROW),
    "sm_90": (_WIDE, _MIDDLE, _NARROW),
    "sm_100": (_WIDE, _SHALLOW, _NARROW),
    "sm_120": (_WIDE, _MIDDLE, _NARROW),
    "gfx": (_MIDDLE, _NARROW),
    "interpreter": (Configuration(64, 64, 32, 1, 1),),
}

# Taps of float32 take twice the registers; these tiles spill on no architecture.
_TF32 = (Configuration(64, 128, 32, 8, 2), Configuration(64, 64, 32, 4, 2))

# Products without tensor cores.
_IEEE = Configuration(64, 64, 16, 4, 2)

DEPTHWISE = Configuration(64, 64, 1, 8, 2)
"""Pixels x channels of the depthwise kernels for 16-bit operands; ``k`` counts taps."""

GRAD_DEPTHWISE = Configuration(32, 64, 1, 1, 1)
"""One warp, so that the sum over pixels stays within it."""


def depthwise_configuration(dtype: torch.dtype) -> Configuration:
    """Operands of 32 bits take twice the registers."""
    return DEPTHWISE if dtype.itemsize == 2 else Configuration(32, 64, 1, 4, 1)


TILES_AT_A_TIME = 32
"""Of a program that adds up the sums of tiles."""


def sums_at_a_time(target: Target) -> int:
    """Sums of such a program; the interpreter's time is that of its programs."""
    return 4096 if target.is_interpreter else 64


def separable_candidates(
    target: Target, dtype: torch.dtype, products: str, columns: int, per_sample: bool
) -> list[Configuration]:
    """The tiles for the forward pass, the one that is taken first.

    Args:
        products: "tf32" or "ieee", for float32.
        columns: output channels of the widest branch.
        per_sample: whether a shift per sample is added, for which the widest tile lacks registers.
    """
    if dtype == torch.float32 and products == "ieee" and not target.is_interpreter:
        return [_IEEE]
    tiles = _FORWARD[family(target)]
    if dtype == torch.float32 and not target.is_interpreter:
        tiles = _TF32
    if per_sample and tiles[0].n > 128:
        tiles = tiles[1:]
    return [tile for tile in tiles if tile.n < 2 * columns] or [tiles[-1]]
