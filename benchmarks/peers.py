# SPDX-License-Identifier: BSD-3-Clause
"""The contenders. Each one says why it cannot run a problem, or builds a call that does the work.

A call takes nothing and returns its results as a tuple of tensors: (y,) in inference,
(y, grad of x, grads of the parameters ...) in training. Every contender gets the input in the
memory format that suits it, and the same number of threads.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.problems import Problem

Call = Callable[[], tuple[Tensor, ...]]
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


class Contender(Protocol):
    """What run.py needs to know of a contender."""

    name: str
    group: str  # "ours" | "pytorch" | "other"

    def why_not(self, problem: Problem) -> str | None: ...

    def build(self, module: nn.Module, example: Tensor) -> Call: ...


def training_call(module: nn.Module, x: Tensor) -> Call:
    """Forward and backward. The incoming gradient is fixed, exact in every dtype, in y's format."""
    x = x.detach().requires_grad_()
    inputs = [x, *module.parameters()]
    incoming: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        y = module(x)
        if not incoming:  # the first call knows y's shape and format
            torch.manual_seed(1)
            noise = torch.randn(y.shape, device=y.device)
            incoming.append(torch.empty_like(y).copy_(noise.bfloat16()))
        return (y.detach(), *torch.autograd.grad(y, inputs, incoming))

    return call


def inference_call(module: nn.Module, x: Tensor) -> Call:
    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (module(x),)

    return call


def eager_call(module: nn.Module, x: Tensor) -> Call:
    return training_call(module, x) if module.training else inference_call(module, x)


class Eager:
    """The module as it stands, input and weights in one memory format."""

    group = "pytorch"

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.name = f"eager {layout}"

    def why_not(self, problem: Problem) -> str | None:
        return models.why_not(problem.model) if problem.model else None

    def convert(self, module: nn.Module) -> nn.Module:
        """A copy of the module as this contender runs it."""
        return copy.deepcopy(module).to(memory_format=FORMATS[self.layout])

    def keep(self, converted: nn.Module, x: Tensor) -> int:
        """Makes what the module keeps for inputs of x's size; returns its bytes."""
        return 0

    def build(self, module: nn.Module, example: Tensor) -> Call:
        x = example.to(memory_format=FORMATS[self.layout])
        return eager_call(self.convert(module), x)


class Ours(Eager):
    """aspp_ext under the same weights."""

    group = "ours"

    def __init__(self, layout: str) -> None:
        super().__init__(layout)
        self.name = f"aspp_ext {layout}"

    def why_not(self, problem: Problem) -> str | None:
        try:
            import aspp_ext  # noqa: F401
        except (ImportError, OSError) as error:
            return f"aspp_ext does not import: {error}"
        return super().why_not(problem)

    def convert(self, module: nn.Module) -> nn.Module:
        return super().convert(module.to_ours())

    def keep(self, converted: nn.Module, x: Tensor) -> int:
        from aspp_ext.modules.fused import FusedModule

        if not isinstance(converted, FusedModule) or converted.training:
            return 0
        with torch.no_grad():
            converted(x)
        return sum(cache.prepared_bytes for cache in converted.folded_copies())


class Compiled:
    """torch.compile with frozen weights: BatchNorm folded, weights packed for oneDNN."""

    group = "pytorch"

    def __init__(self, layout: str, everywhere: bool) -> None:
        self.layout = layout
        self.everywhere = everywhere
        self.name = f"compile {layout}"

    def why_not(self, problem: Problem) -> str | None:
        if problem.mode == "training":
            return "freezing is for inference only"
        if problem.level != "module" and not self.everywhere:
            return "compiling takes long: only under --full"
        return models.why_not(problem.model) if problem.model else None

    def build(self, module: nn.Module, example: Tensor) -> Call:
        import torch._inductor.config as inductor

        memory_format = FORMATS[self.layout]
        twin = copy.deepcopy(module).to(memory_format=memory_format)
        call = inference_call(torch.compile(twin), example.to(memory_format=memory_format))
        with inductor.patch(freezing=True):
            call()
        return call


class Runtime:
    """A runtime beside PyTorch, fed with the ONNX export of the module."""

    group = "other"
    name = ""
    package = ""

    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere

    def why_not(self, problem: Problem) -> str | None:
        for package in (self.package, "onnx"):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if problem.mode == "training":
            return "inference only"
        if problem.model and not self.everywhere:
            return "the whole model elsewhere than in PyTorch: only under --full"
        return models.why_not(problem.model) if problem.model else None


def to_onnx(module: nn.Module, example: Tensor) -> bytes:
    """The module as ONNX, BatchNorm folded by the exporter. The older exporter needs onnx alone."""
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), target, dynamo=False, input_names=["x"])
    return target.getvalue()


class OnnxRuntime(Runtime):
    """ONNX Runtime's CPU provider, all graph optimisations on."""

    name = "ONNX Runtime"
    package = "onnxruntime"

    def why_not(self, problem: Problem) -> str | None:
        if problem.dtype == "bfloat16":
            return "its CPU provider has no bfloat16 convolution"
        return super().why_not(problem)

    def build(self, module: nn.Module, example: Tensor) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            to_onnx(module, example), options, providers=["CPUExecutionProvider"]
        )
        feed = {"x": example.numpy()}
        return lambda: tuple(torch.from_numpy(y) for y in session.run(None, feed))


class OpenVino(Runtime):
    """OpenVINO's CPU plugin with the latency hint, computing in the problem's own precision."""

    name = "OpenVINO"
    package = "openvino"

    def why_not(self, problem: Problem) -> str | None:
        reason = super().why_not(problem)
        if reason is None and problem.dtype == "bfloat16":
            import openvino

            able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            return None if "BF16" in able else "no bfloat16 instructions on this processor"
        return reason

    def build(self, module: nn.Module, example: Tensor) -> Call:
        import openvino

        precision = "bf16" if example.dtype == torch.bfloat16 else "f32"
        module, example = copy.deepcopy(module).float(), example.float()
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(to_onnx(module, example)),
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": precision,
            },
        )
        request, feed = compiled.create_infer_request(), [example.numpy()]

        def call() -> tuple[Tensor, ...]:
            results = request.infer(feed, share_inputs=True, share_outputs=True)
            return tuple(torch.from_numpy(y) for y in results.values())

        return call


def contenders(everywhere: bool = False) -> list[Contender]:
    """All contenders in table order; `everywhere` runs the slow ones even where they take long."""
    return [
        Ours("NCHW"),
        Ours("NHWC"),
        Eager("NCHW"),
        Eager("NHWC"),
        Compiled("NCHW", everywhere),
        Compiled("NHWC", everywhere),
        OnnxRuntime(everywhere),
        OpenVino(everywhere),
    ]


def forget_compiled() -> None:
    """Drops torch.compile's caches: compiling one forward for many modules hits a limit."""
    torch._dynamo.reset()
