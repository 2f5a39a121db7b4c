# SPDX-License-Identifier: BSD-3-Clause
"""The contenders on a GPU."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.gpu.device import Host
from benchmarks.problems import Problem

BACKEND = "ASPP_EXT_BACKEND"


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body once the time is over; only in the main thread."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def with_search(call: peers.Call, benchmark: bool) -> peers.Call:
    """The call with cudnn.benchmark on or off. The search itself happens in the first call."""

    @functools.wraps(call)
    def switched() -> tuple[Tensor, ...]:
        torch.backends.cudnn.benchmark = benchmark
        return call()

    return switched


def with_variable(call: peers.Call, name: str, value: str) -> peers.Call:
    """The call with a variable of the environment that it reads."""

    @functools.wraps(call)
    def changed() -> tuple[Tensor, ...]:
        before = os.environ.get(name)
        os.environ[name] = value
        try:
            return call()
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    return changed


class Eager(peers.Eager):
    """The module as it stands, with cuDNN's heuristics or its search among algorithms."""

    def __init__(self, layout: str, benchmark: bool) -> None:
        super().__init__(layout)
        self.benchmark = benchmark
        self.name += ", search" if benchmark else ""

    def build(self, module: nn.Module, example: Tensor) -> peers.Call:
        return with_search(super().build(module, example), self.benchmark)


def why_not(backend: str, problem: Problem) -> str | None:
    """What keeps one implementation of aspp_ext from a problem, asked of tensors without memory."""
    from aspp_ext import dispatch

    size = (problem.batch, problem.channels, problem.height, problem.width)
    one = torch.empty(1, dtype=problem.torch_dtype, device=problem.device)
    channels, side = problem.channels, 1 if problem.separable else 3
    weight = one.expand(problem.out_channels, channels, side, side)
    depthwise = (one.expand(channels, 1, 3, 3),) if problem.separable else ()
    op = "atrous_separable_pyramid" if problem.separable else "atrous_pyramid"
    branches = (weight,) * (1 + len(problem.rates))
    call = dispatch.Problem(op, one.expand(size), branches, depthwise)
    chosen = next(i for i in dispatch.IMPLEMENTATIONS[op] if i.name == backend)
    return chosen.why_not(call)


class Ours(peers.Ours):
    """aspp_ext with one implementation forced, so that no other can be timed in its place."""

    def __init__(self, layout: str, backend: str) -> None:
        super().__init__(layout)
        self.backend = backend
        self.name = f"aspp_ext {backend} {layout}"

    def why_not(self, problem: Problem) -> str | None:
        return super().why_not(problem) or why_not(self.backend, problem)

    def build(self, module: nn.Module, example: Tensor) -> peers.Call:
        # PyTorch's own convolutions in an aspp_ext module get the search too.
        call = with_search(super().build(module, example), True)
        return with_variable(call, BACKEND, self.backend)


class Compiled:
    """torch.compile in its longest mode, which also records CUDA graphs."""

    group = "pytorch"

    def __init__(self, layout: str, limit_s: float, mode: str | None = "max-autotune") -> None:
        self.layout = layout
        self.limit_s = limit_s
        self.mode = mode
        self.name = f"compile {layout}"

    def why_not(self, problem: Problem) -> str | None:
        return None

    def build(self, module: nn.Module, example: Tensor) -> peers.Call:
        memory_format = peers.FORMATS[self.layout]
        twin = copy.deepcopy(module).to(memory_format=memory_format)
        x = example.to(memory_format=memory_format)
        run = torch.compile(twin, mode=self.mode)
        once = (peers.training_call if module.training else peers.inference_call)(run, x)

        def step() -> tuple[Tensor, ...]:
            torch.compiler.cudagraph_mark_step_begin()
            return once()

        call = with_search(step, True)
        with time_limit(self.limit_s):
            for _ in range(3):  # compiles; warms up; records
                call()
        return call


class TensorRT:
    """torch_tensorrt's ahead-of-time compilation, where it is installed."""

    group = "other"
    name = "TensorRT"

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s

    def why_not(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("torch_tensorrt") is None:
            return "torch_tensorrt is not installed"
        return "inference only" if problem.mode == "training" else None

    def build(self, module: nn.Module, example: Tensor) -> peers.Call:
        import torch_tensorrt

        with time_limit(self.limit_s):
            engine = torch_tensorrt.compile(
                module, ir="dynamo", inputs=[example], enabled_precisions={example.dtype}
            )
            call = peers.inference_call(engine, example)
            call()
        return call


LAYOUTS = ("NCHW", "NHWC")


def contenders(device: Host) -> list[peers.Contender]:
    """Those that are ready within seconds, in table order."""
    ours = [Ours(layout, backend) for backend in device.backends for layout in LAYOUTS]
    return [*ours, *(Eager(layout, search) for layout in LAYOUTS for search in (False, True))]


def slow_contenders(limit_s: float, mode: str | None = "max-autotune") -> list[peers.Contender]:
    """Those that compile first, `limit_s` each."""
    return [Compiled("NHWC", limit_s, mode), TensorRT(limit_s)]
