# SPDX-License-Identifier: BSD-3-Clause
"""The operators and their gradients, one by one, as inference and a training step run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.device import Host
from benchmarks.gpu.peers import LAYOUTS, Ours
from benchmarks.problems import Problem
from benchmarks.roofline import ITEM_BYTES, work_of

Call = Callable[[], object]


@dataclass(frozen=True)
class NamedCall:
    """One operator on one problem by one implementation."""

    implementation: str
    what: str  # "forward NHWC" and the like
    problem: Problem
    make: Callable[[NamedCall], Call]

    @property
    def name(self) -> str:
        """As a word of a command line."""
        return f"{self.implementation} {self.what}".replace(",", "").replace(" ", "-")

    def build(self) -> Call:
        return self.make(self)

    @property
    def compulsory_bytes(self) -> float:
        """Operands and results once each. The three faces of a convolution read and write the same
        tensors; a separable backward reads input and weights besides writing their gradients."""
        problem = self.problem
        work = work_of(problem)
        assert work is not None
        if "backward" not in self.what:
            return work.bytes
        pixels = problem.batch * problem.height * problem.width
        results = problem.out_channels * (1 + len(problem.rates)) * pixels
        return 2 * work.bytes - results * ITEM_BYTES[problem.dtype]

    @property
    def columns(self) -> dict[str, Any]:
        named = {"implementation": self.implementation, "call": self.what}
        return named | {"compulsory_mb": self.compulsory_bytes / 1e6}


def operator(call: NamedCall, name: str) -> Any:
    """The operator of the call's implementation, by the native one's name."""
    suffix = "_triton" if call.implementation == "triton" else ""
    return getattr(torch.ops.aspp_ext, name + suffix)


def forward(call: NamedCall) -> Call:
    layout = call.what.split()[-1]
    return Ours(layout, call.implementation).build(*call.problem.build())


def forward_stored(call: NamedCall) -> Call:
    """CUDA's separable forward through memory, whatever it would choose."""
    own, way = call.what.rsplit(", ", 1)
    from aspp_ext.ops.separable_choice import separable_way

    run = forward(replace(call, what=own))

    @functools.wraps(run)
    def going() -> object:
        with separable_way(way):
            return run()

    return going


def gradient(call: NamedCall) -> Call:
    """In channels_last; the incoming gradient is the right size of random numbers."""
    import aspp_ext  # noqa: F401  registers the operators

    module, x = call.problem.build()
    last = {"memory_format": torch.channels_last}
    x = x.contiguous(**last)
    weights = [conv.weight.detach().contiguous(**last) for conv in module.dense]
    depthwise = [x.new_empty(0), *(conv.weight.detach() for conv in module.depthwise)]
    rates = [rate for rate in module.rates for _ in range(2)]
    outputs = [weight.shape[0] for weight in weights]
    n, _, h, w = x.shape
    grad = torch.randn(n, sum(outputs), h, w, device=x.device).to(x.dtype).contiguous(**last)
    kernels = [size for weight in weights for size in weight.shape[2:]]
    face = call.what.split()[0]
    if face == "grad_input":
        by_input = operator(call, "atrous_pyramid_grad_input")
        return lambda: by_input(grad, weights, rates)
    if face == "grad_weight":
        by_weight = operator(call, "atrous_pyramid_grad_weight")
        return lambda: by_weight(grad, x, kernels, outputs, rates)
    backward = operator(call, "atrous_separable_pyramid_backward")
    wanted = (True, True, True, False)
    return lambda: backward(grad, x, depthwise, weights, rates, [], [], False, *wanted)


def calls(
    device: Host, problems: Sequence[Problem]
) -> tuple[list[NamedCall], list[dict[str, Any]]]:
    """Those of every implementation, and a row that says why for each that has none."""
    named, absent = [], []
    for backend in device.backends:
        for problem in problems:
            separable = "separable " if problem.separable else ""
            reason = Ours("NHWC", backend).why_not(problem)
            if reason is not None:
                absent.append(
                    {"implementation": backend, "call": f"forward {separable}NHWC"}
                    | {"compulsory_mb": work_of(problem).bytes / 1e6, "note": reason}
                )
                continue
            for layout in reversed(LAYOUTS):
                what = f"forward {separable}{layout}"
                named.append(NamedCall(backend, what, problem, forward))
            if backend == "cuda" and problem.separable:
                what = "forward separable NHWC, stored"
                named.append(NamedCall(backend, what, problem, forward_stored))
            faces = ["backward separable"] if problem.separable else ["grad_input", "grad_weight"]
            named += [NamedCall(backend, f"{face} NHWC", problem, gradient) for face in faces]
    return named, absent
