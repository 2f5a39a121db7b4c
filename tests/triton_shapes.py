# SPDX-License-Identifier: BSD-3-Clause
"""Problems that no new kernel may be compiled for, after those that stand for all of their kind;
and the kernels that there are.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pkgutil
import random
from collections.abc import Iterator

from aspp_ext.testing import Branch, Problem

FORMATS = ("contiguous", "channels_last")


def problem(shape: tuple[int, int, int, int], widths: tuple[int, int, int], layout: str) -> Problem:
    """A 1x1 branch and two at rates that depend on the shape."""
    rates = (1 + shape[2] // 3, 1 + shape[3] % 40)
    branches = [Branch(widths[0], (1, 1))]
    branches += [Branch(o, (3, 3), (r, r)) for o, r in zip(widths[1:], rates, strict=True)]
    return Problem(f"{shape} {widths} {layout}", shape, tuple(branches), layout)


def kinds() -> list[Problem]:
    """One of each way to read and write: memory formats, channels and pixels that are or are no
    multiples of 16 bytes, sums that are cut into slices."""
    sizes = itertools.product(FORMATS, ((40, 48, 56), (37, 51, 43)), (48, 45), ((24, 20), (21, 19)))
    some = [problem((2, c, h, w), widths, layout) for layout, widths, c, (h, w) in sizes]
    cut = ((1, 64, 9, 9), (1, 64, 28, 40), (4, 64, 50, 50))
    return [*some, *(problem(shape, (40, 48, 56), FORMATS[1]) for shape in cut)]


def new_shapes(count: int = 20) -> list[Problem]:
    """Others, for which the same tiles are chosen."""
    draw = random.Random(0)
    return [
        problem(
            (draw.randint(1, 4), draw.randint(33, 64), draw.randint(8, 50), draw.randint(8, 50)),
            (draw.randint(33, 64), draw.randint(33, 64), draw.randint(33, 64)),
            draw.choice(FORMATS),
        )
        for _ in range(count)
    ]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The kernels, with their arguments' types, that Triton compiles inside."""
    from triton import knobs

    found: list[str] = []

    def compiled(*, repr: str, **_: object) -> None:
        found.append(repr)

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = compiled
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


def kernels() -> set[str]:
    """The names of what aspp_ext.triton launches: of its functions those that end in "_kernel"."""
    from triton.runtime.jit import KernelInterface

    import aspp_ext.triton as package

    modules = [
        importlib.import_module(f"{package.__name__}.{module.name}")
        for module in pkgutil.iter_modules(package.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, KernelInterface)
    }
