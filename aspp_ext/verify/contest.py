# SPDX-License-Identifier: BSD-3-Clause
"""Whether an implementation is faster than PyTorch, in a class of problems.

Against the best that eager PyTorch does: either memory format, with cuDNN's search among its
algorithms. A training step is forward and backward together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import aspp_ext

from ..testing import outputs, timing
from ..testing.timing import Timing
from .failure import Failure
from .isolation import COMPILING, FINAL, PYTORCH
from .rightness import Subject, precision_of

LEAST = 1.05
"""A ratio below this is not worth a change."""
BUDGET_S = 0.6
MOST_S = 4.0
"""Of a round: calls that take longer are not timed."""
CLOSE = 0.1
"""Of the largest number of a result: how far two right ones may be apart, in 16 bits too."""
OUT_CHANNELS, RATES = 256, {"small": (6, 12, 18), "medium": (6, 12, 18), "large": (12, 24, 36)}
SHAPES = {
    "cuda": {
        "small": (1, 320, 33, 33),
        "medium": (1, 2048, 33, 33),
        "large": (8, 2048, 65, 65),
    },
    "cpu": {
        "small": (1, 320, 33, 33),
        "medium": (1, 2048, 33, 33),
        "large": (1, 2048, 49, 49),
    },
}
"""A problem of each class of ``aspp_ext.evidence.rulings``: of DeepLab v3's heads on MobileNet and
ResNet backbones (arXiv 1706.05587, 1801.04381), where a kind of device sees them."""
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
Call = Callable[[], Any]


class Tensors:
    """The arguments of a subject's operator in one memory format."""

    def __init__(self, subject: Subject, size: str, memory_format: torch.memory_format) -> None:
        n, c, h, w = self.shape = SHAPES[torch.device(subject.device).type][size]
        self.subject, self.rates = subject, [1, *RATES[size]]
        self.generator = torch.Generator(subject.device).manual_seed(0)
        self.memory_format = memory_format
        outs, total = OUT_CHANNELS, OUT_CHANNELS * len(self.rates)
        sides = [1, *(3 for _ in RATES[size])]
        separable = subject.cell.operator == "atrous_separable_pyramid"
        self.x = self.drawn(n, c, h, w, fan_in=1)
        own = [1 if separable else side for side in sides]
        self.weights = [self.drawn(outs, c, k, k, fan_in=c * k * k) for k in own]
        self.depthwise = [None if k == 1 else self.drawn(c, 1, k, k, fan_in=9) for k in sides]
        self.between = [None if k == 1 else (self.drawn(c), self.drawn(c)) for k in sides]
        self.shift, self.grad = self.drawn(total), self.drawn(n, total, h, w, fan_in=1)
        self.pool = self.drawn(outs, c, fan_in=c), self.drawn(outs)
        self.project = self.drawn(outs, total + outs, fan_in=total), self.drawn(outs)

    def drawn(self, *shape: int, fan_in: int = 4) -> Tensor:
        device = self.subject.device
        drawn = torch.randn(shape, generator=self.generator, device=device) / fan_in**0.5
        drawn = drawn.to(self.subject.dtype)
        return drawn.contiguous(memory_format=self.memory_format) if len(shape) == 4 else drawn

    @property
    def leaves(self) -> list[Tensor]:
        separable = self.subject.cell.operator == "atrous_separable_pyramid"
        found = [self.x, *self.weights]
        return found + [d for d in self.depthwise if d is not None] * separable

    def forward(self, backend: str) -> Tensor:
        """With what is fused behind the convolutions, which in training are alone."""
        x, weights, rates = self.x, self.weights, self.rates
        training = self.subject.cell.mode == "training"
        shift, activation = (None, None) if training else (self.shift, "relu")
        behind: Any = {"shift": shift, "activation": activation, "backend": backend}
        if self.subject.cell.operator == "atrous_pyramid":
            return aspp_ext.atrous_pyramid(x, weights, rates, **behind)
        if self.subject.cell.operator == "atrous_separable_pyramid":
            behind["between"] = None if training else self.between
            behind["between_activation"] = activation
            return aspp_ext.atrous_separable_pyramid(x, self.depthwise, weights, rates, **behind)
        rest: Any = (self.shift, *self.pool, *self.project)
        keywords: Any = {"backend": backend, "prepared": self.prepared(backend)}
        return aspp_ext.aspp_inference(x, [None] * len(rates), weights, rates, *rest, **keywords)

    def prepared(self, backend: str) -> list[Tensor] | None:
        """As modules keep them, for the CPU alone."""
        if backend != "cpu":
            return None
        if not hasattr(self, "kept"):
            h, w = self.shape[2:]
            self.kept = aspp_ext.ops.polyphase_weights(self.weights, self.rates, h, w)
        return self.kept

    def call(self, backend: str) -> Call:
        if self.subject.cell.mode == "inference":
            return partial(self.forward, backend)
        for leaf in self.leaves:
            leaf.requires_grad_()
        return lambda: torch.autograd.grad(self.forward(backend), self.leaves, self.grad)


def decide(ours: Mapping[str, Timing], torchs: Mapping[str, Timing]) -> tuple[float, str]:
    """The ratio of medians and what it says, of timings by memory format.

    Faster is what beats the best of PyTorch in either format; slower, what loses in both.
    """
    worst = max(ours.values(), key=lambda t: t.p50_ms)
    best = min(torchs.values(), key=lambda t: t.p50_ms)
    ratio = best.p50_ms / worst.p50_ms
    if worst.p75_ms < best.p25_ms and ratio >= LEAST:
        return ratio, "faster"
    loses = (
        torchs.get(name, best).p75_ms < own.p25_ms
        and own.p50_ms / torchs.get(name, best).p50_ms >= LEAST
        for name, own in ours.items()
    )
    return ratio, "slower" if all(loses) else "even"


def _told(subject: Subject, size: str, name: str, call: Call) -> Call:
    """The call, of which it is known whose it is."""
    doing, patience = f"{name}, {size}", 1 if name.startswith("ours") else PYTORCH

    def told() -> Any:
        subject.beat(doing, patience)
        return call()

    return told


def _far(own: list[Tensor], other: list[Tensor]) -> str | None:
    """How the two differ by more than CLOSE; a NaN does."""
    for i, (a, b) in enumerate(zip(own, other, strict=True)):
        off = (a.double() - b.double()).abs().max().item() / max(b.abs().max().item(), 1e-30)
        if not off <= CLOSE:
            return f"result {i} is off by {off:.2g} of its largest number"
    return None


def _credible(subject: Subject, size: str, results: Mapping[str, list[Tensor]]) -> list[str]:
    """The formats in which PyTorch agrees with ours; what is right has been seen by ``rightness``.

    PyTorch has faults of its own, like its gradients of channels_last depthwise weights in bfloat16
    on the CPU, which are not timed.

    Raises:
        Failure: ours agree with PyTorch in no format; nothing that is grossly wrong is timed.
    """
    agreeing = set(FORMATS)
    for name in FORMATS:
        far = {each: _far(results[f"ours {name}"], results[f"PyTorch {each}"]) for each in FORMATS}
        agreeing -= {each for each, how in far.items() if how is not None}
        if all(far.values()):
            shape = SHAPES[torch.device(subject.device).type][size]
            sentence = f"x {list(shape)} {name}: {far[name]}, against PyTorch in any format"
            raise Failure(sentence, f"{subject.cell.title} on {subject.device}\n{sentence}\n")
    return [name for name in FORMATS if name in agreeing]


def contest(subject: Subject, size: str) -> dict[str, Any]:
    """Ratio, what it says, and the medians in milliseconds; or why it was not timed."""
    device = torch.device(subject.device)
    stopwatch: timing.Stopwatch = timing.BY_WALL_CLOCK
    if device.type == "cuda":
        stopwatch = timing.CudaStopwatch()
    gradients = torch.enable_grad() if subject.cell.mode == "training" else torch.inference_mode()
    torch.backends.cudnn.benchmark = True  # in a process that times and does nothing else
    with precision_of(subject), gradients:
        calls: dict[str, Call] = {}
        for name, memory_format in FORMATS.items():
            tensors = Tensors(subject, size, memory_format)
            calls[f"ours {name}"] = tensors.call(subject.implementation)
            calls[f"PyTorch {name}"] = tensors.call("reference")
        seconds, results = 0.0, {}
        for name, call in calls.items():
            subject.beat(f"{name}, {size}", COMPILING if name.startswith("ours") else PYTORCH)
            results[name] = outputs(call())  # searches, compiles
            seconds += stopwatch(call)[0]
        credible = _credible(subject, size, results)
        timed_names = [f"ours {n}" for n in FORMATS] + [f"PyTorch {n}" for n in credible]
        calls = {name: calls[name] for name in timed_names}
        del results
        calls = {name: _told(subject, size, name, call) for name, call in calls.items()}
        if seconds > MOST_S:
            why = f"a round of {size} calls takes {seconds:.0f} s"
            return {"result": "unavailable", "why": why, FINAL: True}
        timed = timing.interleave(
            calls,
            budget_s=BUDGET_S,
            stopwatch=stopwatch,
        )
    ours, torchs = (
        {name: timed[f"{who} {name}"] for name in FORMATS if f"{who} {name}" in timed}
        for who in ("ours", "PyTorch")
    )
    ratio, says = decide(ours, torchs)
    medians = {name: round(t.p50_ms, 4) for name, t in timed.items()}
    return {"result": "timed", "ratio": round(ratio, 4), "says": says, "medians_ms": medians}
