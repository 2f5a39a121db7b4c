# SPDX-License-Identifier: BSD-3-Clause
"""A GPU that Python believes in: nothing but fake tensors lives there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aspp_ext import _gpu, _native, _triton, dispatch
from aspp_ext.dispatch import Problem
from aspp_ext.evidence import rulings, store
from aspp_ext.evidence.entry import MODES, PRECISIONS, Cell, Entry, Speed, Verdict
from aspp_ext.evidence.environment import Environment

HERE = Environment(
    device="NVIDIA H200",
    architecture="sm_90",
    processors=132,
    driver="580.65.06",
    torch="2.13.0+cu130",
    cuda="13.0",
    cudnn="91200",
    triton="3.9.0",
    compiler="g++ 12.2.0, nvcc 13.0",
    kernels={"cpu": "1" * 16, "cuda": "2" * 16, "triton": "3" * 16},
)
FASTER = {name: Speed(1.42, "faster") for name in rulings.CLASSES}
DATE = "2026-01-02"
LAST = {"memory_format": torch.channels_last}
"""Copies of fake CUDA tensors need a PyTorch with CUDA: these are read in place."""


def pretend(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    """That every device has this compute capability."""
    monkeypatch.setattr(_gpu, "capability", lambda device: (major, minor))


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch, place: Path, here: Environment = HERE) -> None:
    """Of compute capability 9.0, with kernels for it of which nobody knows anything.

    Args:
        place: where the store is.
    """
    monkeypatch.delenv("ASPP_EXT_BACKEND", raising=False)
    monkeypatch.setenv(store.VARIABLE, str(place / "store"))
    monkeypatch.setattr(store, "COMMITTED", place / "committed")
    monkeypatch.setattr(rulings, "environment_of", lambda device: here)
    rulings.forget()
    monkeypatch.setattr(_native, "cuda_missing", None)
    monkeypatch.setattr(_triton, "missing", None)
    monkeypatch.setattr(_triton, "interpreted", False)
    monkeypatch.setattr(_gpu, "has_device", lambda: True)
    monkeypatch.setattr(_gpu, "shared_bytes", lambda device: 227 << 10)
    pretend(monkeypatch, 9, 0)


def verdicts(
    implementation: str,
    verdict: Verdict = Verdict("right", 1.0, "", FASTER),  # noqa: B008, it is constant
    operators: Sequence[str] = tuple(dispatch.IMPLEMENTATIONS),
    precisions: Sequence[str] = PRECISIONS,
    modes: Sequence[str] = MODES,
) -> dict[Cell, Verdict]:
    cells = itertools.product([implementation], operators, precisions, modes)
    return {Cell(*cell): verdict for cell in cells}


def know(found: dict[Cell, Verdict], here: Environment = HERE) -> Path:
    """Puts an entry in the store; returns where."""
    path = store.write(Entry(here, DATE, found))
    assert path is not None
    rulings.forget()
    return path


def on_cuda(*shape: int, **keywords) -> torch.Tensor:
    return torch.empty(shape, device="cuda", **keywords)


def problem(
    op: str = "atrous_pyramid", shape=(2, 8, 9, 9), branches: int = 1, **keywords
) -> Problem:
    weight = on_cuda(8, shape[1], 3, 3, **keywords)
    return Problem(op, on_cuda(*shape, **keywords), (weight,) * branches)


def reasons(p: Problem) -> dict[str, str | None]:
    return {i.name: i.reason(p) for i in dispatch.IMPLEMENTATIONS[p.op]}


class Calls(TorchDispatchMode):
    """The operators of ours that run, and their arguments, of which the last are left out where
    they have their defaults."""

    __module__ = "torch.testing"  # looks on, as PyTorch's modes do: under others the layers run

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aspp_ext":
            self.seen.append((function._schema.name.split("::")[1], args))
        return function(*args, **(kwargs or {}))

    def __iter__(self) -> Iterator[tuple[str, tuple]]:
        return iter(self.seen)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]
