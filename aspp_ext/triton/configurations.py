# SPDX-License-Identifier: BSD-3-Clause
"""Which tile a kernel runs with: pure functions of the operation, the products and the device.

The sets are small, so that few kernels are ever compiled. None has been tuned on hardware yet: they
are the widest that compile without spilling registers (tests/test_triton_binaries.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .target import Target
from .work import Tile


class Configuration(NamedTuple):
    """A tile, the warps that compute it and the stages that its loads are spread over."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def tile(self) -> Tile:
        return Tile(self.m, self.n, self.k)

    def options(self, target: Target) -> dict[str, int]:
        """What the compiler is told. NVIDIA's would rather spill a few registers to run another
        program beside than take as many as there are, so it is told their number."""
        most = {"maxnreg": 255} if target.architecture.startswith("sm_") else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **most}

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"


def family(target: Target) -> str:
    """Whose tiles a device takes: the newest architecture that is no newer than its own and has no
    more shared memory; AMD's are "gfx"."""
    if target.is_interpreter:
        return target.architecture
    if target.architecture.startswith("gfx"):
        return "gfx"
    if target.shared_bytes < 160 * 1024:
        return "sm_120"
    major = int(target.architecture.removeprefix("sm_")[:-1])
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


# Widest first; k counts 16-bit operands. Where the widest tile would spill with a shift per sample
# or with 32-bit operands, the next one does both.
_GATHER = {
    "sm_80": (Configuration(128, 128, 64, 8, 4), Configuration(64, 64, 64, 4, 4)),
    "sm_90": (
        Configuration(128, 256, 64, 8, 4),
        Configuration(128, 128, 64, 8, 4),
        Configuration(128, 64, 64, 4, 4),
    ),
    "sm_100": (Configuration(128, 128, 64, 8, 4), Configuration(128, 64, 64, 4, 4)),
    "sm_120": (Configuration(128, 128, 64, 8, 3), Configuration(64, 64, 64, 4, 3)),
    "gfx": (Configuration(128, 128, 32, 8, 2), Configuration(128, 64, 32, 4, 2)),
    "interpreter": (Configuration(64, 64, 32, 1, 1),),
}
_WEIGHT = _GATHER

# Float32 products without tensor cores.
_IEEE = Configuration(128, 64, 16, 8, 3)
_IEEE_GRAD_INPUT = Configuration(64, 32, 16, 4, 3)


def _fitting(
    tiles: tuple[Configuration, ...], columns: int, dtype: torch.dtype, narrower: bool
) -> list[Configuration]:
    """The tiles whose columns are less than twice the output's, widest first."""
    if narrower and tiles[0].n > 128:
        tiles = tiles[1:]
    fitting = [tile for tile in tiles if tile.n < 2 * columns] or [tiles[-1]]
    return [tile._replace(k=tile.k * 2 // dtype.itemsize) for tile in fitting]


def gather_candidates(
    target: Target,
    pass_: str,
    dtype: torch.dtype,
    products: str,
    columns: int,
    per_sample: bool = False,
) -> list[Configuration]:
    """The tiles for forward or the gradient of the input, the one that is taken first.

    Args:
        pass_: "forward" or "grad_input".
        products: "tf32" or "ieee", for float32.
        columns: channels of the output; of forward those of the widest branch.
        per_sample: whether a shift per sample is added.
    """
    if dtype == torch.float32 and products == "ieee" and not target.is_interpreter:
        return [_IEEE_GRAD_INPUT if pass_ == "grad_input" else _IEEE]
    narrower = per_sample or dtype == torch.float32
    return _fitting(_GATHER[family(target)], columns, dtype, narrower)


def weight_candidates(
    target: Target, dtype: torch.dtype, products: str, columns: int
) -> list[Configuration]:
    """The same for the gradient of the weights, whose columns are input channels."""
    if dtype == torch.float32 and products == "ieee" and not target.is_interpreter:
        return [_IEEE]
    return _fitting(_WEIGHT[family(target)], columns, dtype, dtype == torch.float32)
