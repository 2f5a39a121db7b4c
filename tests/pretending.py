# SPDX-License-Identifier: BSD-3-Clause
"""A GPU that Python believes in: nothing but fake tensors lives there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aspp_ext import _gpu, _native, _triton, dispatch, verified
from aspp_ext.dispatch import Problem

RESULT = verified.Result("benchmarks/results/a-correctness.csv", "abc1234", "0" * 16)
LAST = {"memory_format": torch.channels_last}
"""Copies of fake CUDA tensors need a PyTorch with CUDA: these are read in place."""


def pretend(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    """That every device has this compute capability."""
    monkeypatch.setattr(_gpu, "capability", lambda device: (major, minor))


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compute capability 9.0, with kernels for it that no result has verified."""
    monkeypatch.delenv("ASPP_EXT_BACKEND", raising=False)
    monkeypatch.setattr(_native, "cuda_missing", None)
    monkeypatch.setattr(_triton, "missing", None)
    monkeypatch.setattr(_triton, "interpreted", False)
    monkeypatch.setattr(_gpu, "has_device", lambda: True)
    monkeypatch.setattr(_gpu, "shared_bytes", lambda device: 227 << 10)
    pretend(monkeypatch, 9, 0)
    for key in list(verified.VERIFIED):
        monkeypatch.delitem(verified.VERIFIED, key)


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
