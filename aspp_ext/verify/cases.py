# SPDX-License-Identifier: BSD-3-Clause
"""What there is to find out, in the order in which it is worth knowing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .. import _native, _triton, dispatch
from ..evidence.entry import Cell

OPERATORS = tuple(dispatch.IMPLEMENTATIONS)
RIGHT, SIZES = "right", ("medium", "large", "small")
# By what users run: on GPUs networks are trained in 16 bits, or in float32 with PyTorch's own TF32.
ON_GPU = ("bfloat16", "tf32", "float16", "float32", "float64")
ON_CPU = ("float32", "bfloat16", "float64", "float16")
QUICK = {"cuda": ("bfloat16", "tf32"), "cpu": ("float32",)}
"""The precisions of ``--quick``."""


class Case(NamedTuple):
    """Whether a cell is right, or how fast it is in a class of problems."""

    cell: Cell
    what: str  # RIGHT, or one of SIZES

    @property
    def name(self) -> str:
        return f"{self.cell.title}: {self.what}"

    @property
    def instruction_set(self) -> str:
        """Of the CPU's kernels, where it is not the one that this machine picks."""
        return self.cell.implementation.partition(" ")[2]


def implementations(device: str, picked: str) -> list[str]:
    """Of a kind of device; of the CPU's first the instruction set that runs unasked.

    Args:
        picked: that instruction set.
    """
    if device == "cuda":
        return ["cuda", "triton"]
    names = ["cpu"]
    if not _native.emulated:
        listed = (isa.removeprefix("isa_") for isa in _native.read_build_info().get("isas", ()))
        names += [f"cpu {isa}" for isa in listed if isa != picked]
    return [*names, *(["triton"] if _triton.interpreted else [])]


def has_precision(implementation: str, precision: str) -> bool:
    return not (implementation == "triton" and precision == "float64")


def timed(device: str) -> bool:
    """Whether times mean anything: those of emulated or interpreted kernels do not."""
    return device == "cuda" or not (_native.emulated or _triton.interpreted)


def cells(names: Iterable[str], precisions: Iterable[str]) -> Iterator[Cell]:
    for precision, name, operator in itertools.product(precisions, names, OPERATORS):
        # The head is for inference; training computes its parts.
        for mode in ("inference", "training")[: 1 if operator == "aspp_inference" else 2]:
            if has_precision(name, precision):
                yield Cell(name, operator, precision, mode)


def cases(device: str, picked: str, quick: bool = False, only: str | None = None) -> list[Case]:
    """All of a kind of device: of each precision what is right, then what is fast.

    Args:
        picked: the CPU's instruction set that runs unasked.
        quick: the precisions and sizes that most calls have.
        only: the operator.
    """
    precisions = QUICK[device] if quick else ON_GPU if device == "cuda" else ON_CPU
    names = implementations(device, picked)
    main = [name for name in names if " " not in name]  # others are proven, and never chosen here
    sizes = ["medium"] if quick else list(SIZES)
    found = []
    for precision in precisions:
        each = [*cells(main, [precision])]
        found += [Case(cell, RIGHT) for cell in each]
        if timed(device):
            found += [Case(cell, size) for size in sizes for cell in each]
    narrow = [p for p in precisions if p in ("float32", "bfloat16")]  # what they differ in
    found += [Case(cell, RIGHT) for cell in cells([n for n in names if " " in n], narrow)]
    return [case for case in found if only is None or case.cell.operator == only]
