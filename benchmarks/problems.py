# SPDX-License-Identifier: BSD-3-Clause
"""The problem table: what is timed, at which level, and how fast it has to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.modules import PlainASPP, PlainPyramid, avoid_kinks, randomise_norms

DEFAULTS = ("float32", "inference")  # not repeated in a problem's title


@dataclass(frozen=True)
class Problem:
    """One job. level: operator | module | model; mode: inference | training."""

    level: str
    head: str  # "separable" | "dense"
    channels: int
    height: int
    width: int
    rates: tuple[int, ...]
    out_channels: int = 256
    batch: int = 1
    dtype: str = "float32"
    mode: str = "inference"
    model: str = ""
    device: str = "cpu"

    @property
    def separable(self) -> bool:
        return self.head == "separable"

    @property
    def name(self) -> str:
        """The problem without level, dtype and mode: what a table's first column shows."""
        if self.model:
            return f"{self.model} {self.height}x{self.width}"
        rates = "/".join(map(str, self.rates))
        batch = f"{self.batch}x" if self.batch > 1 else ""
        shape = f"{self.channels}->{self.out_channels} {batch}{self.height}x{self.width}"
        return f"{self.head} {shape} {rates}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Identifies the problem in a results file."""
        return (self.level, self.name, self.dtype, self.mode)

    @property
    def torch_dtype(self) -> torch.dtype:
        """tf32 is float32 in memory; the products are what differs."""
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def input_bytes(self) -> int:
        return self.batch * self.channels * self.height * self.width * self.torch_dtype.itemsize

    @property
    def title(self) -> str:
        extra = [word for word in (self.dtype, self.mode) if word not in DEFAULTS]
        return ", ".join([f"{self.level}: {self.name}", *extra])

    def build(self) -> tuple[nn.Module, Tensor]:
        """The plain PyTorch module with random weights and one input [N, C, H, W], NCHW."""
        torch.manual_seed(0)
        if self.model:
            return models.build(self.model, self.height)
        with torch.device(self.device):
            module = self.plain_module()
            x = torch.randn(self.batch, self.channels, self.height, self.width)
        module, x = module.to(self.torch_dtype), x.to(self.torch_dtype)
        return module.train(self.mode == "training"), x

    def plain_module(self) -> nn.Module:
        training = self.mode == "training"
        shape = (self.channels, self.rates, self.out_channels, self.separable)
        if self.level == "operator":
            return PlainPyramid(*shape, epilogue=not training)
        module = PlainASPP(*shape, dropout=0.0 if training else 0.5)
        randomise_norms(module)
        return avoid_kinks(module) if training else module


SHAPES = {
    "large": (2048, 65, 65, (12, 24, 36)),
    "wide": (512, 64, 128, (6, 12, 18)),
    "small": (2048, 33, 33, (6, 12, 18)),
    "narrow": (512, 33, 33, (6, 12, 18)),
}


def head(level: str, kind: str, shape: str, **options: object) -> Problem:
    return Problem(level, kind, *SHAPES[shape], **options)  # type: ignore[arg-type]


# In order of importance: a machine too slow for all of them leaves out the last ones, by name.
PROBLEMS = (
    head("module", "separable", "large"),
    head("module", "separable", "wide"),
    head("module", "separable", "small"),
    head("module", "dense", "large"),
    head("module", "dense", "wide"),
    head("module", "dense", "small"),
    head("module", "separable", "large", mode="training", batch=2),
    head("module", "dense", "large", mode="training", batch=2),
    head("module", "dense", "narrow", mode="training", batch=2),
    head("module", "separable", "large", dtype="bfloat16"),
    head("module", "dense", "small", dtype="bfloat16"),
    Problem("model", "dense", 2048, 513, 513, (12, 24, 36), model="torchvision deeplabv3_resnet50"),
    Problem("model", "separable", 2048, 512, 512, (12, 24, 36), model="smp DeepLabV3Plus resnet50"),
    head("operator", "separable", "large"),
    head("operator", "dense", "small"),
)

QUICK = (
    head("module", "separable", "small"),
    head("module", "dense", "small"),
    head("operator", "separable", "small"),
)


@dataclass(frozen=True)
class Target:
    """How many times as fast as the best of a group `contender` has to run the problem.

    `against` is a group, or the beginning of contenders' names. With "memory": at most `ratio`
    times the smallest peak memory of PyTorch's contenders; with "input": a call takes at most
    `ratio` times the input's size, beside what is kept from call to call.
    """

    problem: Problem
    against: str  # "pytorch" | "other" | "memory" | "input" | a name
    ratio: float
    contender: str = "aspp_ext"  # a name without its memory format


def targets_of(problem: Problem, pytorch: float, other: float | None) -> list[Target]:
    targets = [Target(problem, "pytorch", pytorch)]
    return targets if other is None else [*targets, Target(problem, "other", other)]


TARGETS = (
    *targets_of(head("module", "separable", "large"), 4.0, 1.2),
    *targets_of(head("module", "separable", "wide"), 1.8, 1.2),
    *targets_of(head("module", "separable", "small"), 2.0, 1.2),
    *targets_of(head("module", "dense", "large"), 1.4, 1.4),
    *targets_of(head("module", "dense", "wide"), 1.25, 1.25),
    *targets_of(head("module", "dense", "small"), 1.3, 1.3),
    *targets_of(head("module", "separable", "large", dtype="bfloat16"), 4.0, None),
    *targets_of(head("module", "dense", "small", dtype="bfloat16"), 1.0, None),
    *targets_of(head("module", "separable", "large", mode="training", batch=2), 3.0, None),
    *targets_of(head("module", "dense", "large", mode="training", batch=2), 1.2, None),
    *(Target(head("module", "dense", shape), "input", 1.0) for shape in ("large", "wide", "small")),
)
