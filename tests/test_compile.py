# SPDX-License-Identifier: BSD-3-Clause
"""``torch.compile``, ``torch.export``, AOTInductor, tracing: one graph, no recompilation."""

from __future__ import annotations

import shutil

import pytest
import torch
from marks import (
    on_all,
    on_cpu,
    on_native,
    proven_emulated,
    proven_interpreted,
    quick_emulated,
    quick_interpreted,
    varied,
)
from torch import Tensor, nn
from torch.export import Dim

import aspp_ext
from aspp_ext import reference
from aspp_ext.ops.polyphase_choice import policy

pytestmark = [
    proven_emulated,
    proven_interpreted,
    on_native,
    varied,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
each_kind = pytest.mark.parametrize("separable", [False, True], ids=["pyramid", "separable"])


class Layer(nn.Module):
    """A pyramid of three branches with everything an epilogue can have."""

    def __init__(self, separable: bool, module=aspp_ext, relu: bool = True) -> None:
        super().__init__()
        self.separable, self.module, self.activation = separable, module, "relu" if relu else None
        self.depthwise = nn.Parameter(torch.randn(5, 1, 3, 3))
        self.pointwise = nn.ParameterList(torch.randn(4, 5, 1, 1) for _ in range(2))
        self.dense = nn.ParameterList([torch.randn(4, 5, 1, 1), torch.randn(4, 5, 3, 3)])
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        end = {"scale": self.scale, "shift": self.shift, "activation": self.activation}
        if not self.separable:
            return self.module.atrous_pyramid(x, list(self.dense), [1, (2, 6)], **end)
        depthwise, pointwise = [None, self.depthwise], list(self.pointwise)
        return self.module.atrous_separable_pyramid(x, depthwise, pointwise, [1, (2, 6)], **end)


class Head(nn.Module):
    def __init__(self, project: bool = True) -> None:
        super().__init__()
        self.projects = project
        self.register_buffer("d", torch.randn(5, 1, 3, 3))
        self.register_buffer("w", torch.randn(4, 5, 1, 1))
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("pool", torch.randn(3, 5))
        self.register_buffer("pool_shift", torch.randn(3))
        self.register_buffer("project", torch.randn(6, 11))
        self.register_buffer("project_shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        end = (self.pool, self.pool_shift, self.project, self.project_shift)
        return aspp_ext.aspp_inference(
            *(x, [None, self.d], [self.w, self.w], [1, 2], self.shift),
            *(end if self.projects else [None] * 4),
            activation=None,
        )


def twin(layer: Layer) -> Layer:
    """The same parameters, computed by the reference."""
    other = Layer(layer.separable, reference)
    other.load_state_dict(layer.state_dict())
    return other


def assert_same_step(layer: nn.Module, expected: nn.Module, x: Tensor) -> None:
    results = []
    for module in (layer, expected):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        y.square().mean().backward()
        results.append({n.split("orig_mod.")[-1]: p.grad for n, p in module.named_parameters()})
        results[-1] |= {"y": y, "x": leaf.grad}
        for p in module.parameters():
            p.grad = None
    ours, theirs = ({n: g for n, g in r.items() if g is not None} for r in results)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


SIZES = [(2, 7, 9), (3, 12, 8), (4, 5, 31), (2, 3, 17)]


@on_all
@quick_interpreted(lambda backend, separable: (backend, separable) == ("aot_eager", False))
@quick_emulated(lambda backend: backend == "aot_eager")
@pytest.mark.quick("cpu", when=lambda backend, separable: backend == "aot_eager" or separable)
@each_kind
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_gradients_once_for_all_sizes(separable, backend) -> None:
    layer = Layer(separable)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    expected = twin(layer)
    for i, (n, h, w) in enumerate(SIZES):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert_same_step(compiled, expected, torch.randn(n, 5, h, w))


@each_kind
def test_compile_keeps_channels_last(separable) -> None:
    layer = Layer(separable)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor")
    x = torch.randn(2, 5, 7, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y, expected = compiled(x), layer(x)
    assert y.stride() == expected.stride()
    assert torch.equal(y, expected)


def test_compile_head() -> None:
    head = Head()
    compiled = torch.compile(head, fullgraph=True, dynamic=True, backend="inductor")
    for i, (n, h, w) in enumerate(SIZES):
        x = torch.randn(n, 5, h, w)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.testing.assert_close(compiled(x), head(x))


def test_compile_does_not_break_at_the_choice_of_implementation() -> None:
    def forced(x, w):
        return aspp_ext.atrous_pyramid(x, [w], [2], backend="cpu")

    x, w = torch.randn(1, 5, 6, 7), torch.randn(3, 5, 3, 3)
    assert torch._dynamo.explain(forced)(x, w).graph_break_count == 0


def test_compile_under_autocast() -> None:
    layer = Layer(False, relu=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 5, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(x), layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_compile_function_transforms() -> None:
    w = torch.randn(3, 5, 3, 3)

    def loss(x):
        return aspp_ext.atrous_pyramid(x, [w], [2]).square().sum()

    x = torch.randn(4, 1, 5, 6, 7)
    per_sample = torch.func.vmap(torch.func.grad(loss))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), per_sample(x))


def test_compile_refuses_in_the_same_words() -> None:
    compiled = torch.compile(lambda x, w: aspp_ext.atrous_pyramid(x, [w], [1]), backend="eager")
    with pytest.raises(Exception, match="4 input channels but x has 3"):
        compiled(torch.randn(1, 3, 5, 5), torch.randn(2, 4, 1, 1))


def targets(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "call_function"}


@each_kind
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_with_dynamic_shapes(separable, strict) -> None:
    layer = Layer(separable).eval()
    shapes = ({0: Dim("n"), 2: Dim("h"), 3: Dim("w")},)
    with torch.no_grad():
        program = torch.export.export(
            layer, (torch.randn(2, 5, 7, 9),), dynamic_shapes=shapes, strict=strict
        )
        name = "separable_pyramid" if separable else "pyramid"
        assert f"aspp_ext.atrous_{name}.default" in targets(program)
        for n, h, w in SIZES:
            x = torch.randn(n, 5, h, w)
            torch.testing.assert_close(program.module()(x), layer(x))


def test_export_saves_and_loads(tmp_path) -> None:
    head, x = Head(), torch.randn(2, 5, 7, 9)
    program = torch.export.export(head, (x,), strict=True)
    torch.export.save(program, tmp_path / "head.pt2")
    again = torch.export.load(tmp_path / "head.pt2").module()
    assert torch.equal(again(x), head(x))


@each_kind
def test_export_for_training_has_gradients(separable) -> None:
    layer = Layer(separable)
    x = torch.randn(2, 5, 7, 9)
    module = torch.export.export(layer, (x,), strict=True).module()
    assert_same_step(module, layer, x)


@on_cpu
@pytest.mark.prove
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["pyramid", "separable", "head", "head_no_projection"])
def test_aot_inductor(name, tmp_path) -> None:
    """A package that runs without Python's half of the package."""
    layers = {"pyramid": Layer(False), "separable": Layer(True), "head": Head()}
    layer = (layers | {"head_no_projection": Head(project=False)})[name].eval()
    shapes = ({0: Dim("n", min=2), 2: Dim("h", min=2), 3: Dim("w", min=2)},)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(2, 5, 7, 9),), dynamic_shapes=shapes)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layer.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for n, h, w in SIZES:
            x = torch.randn(n, 5, h, w)
            torch.testing.assert_close(run(x), layer(x))


@each_kind
def test_jit_trace(separable) -> None:
    layer = Layer(separable).eval()
    with torch.no_grad():
        traced = torch.jit.trace(layer, torch.randn(2, 5, 7, 9))
        x = torch.randn(3, 5, 4, 11)
        assert torch.equal(traced(x), layer(x))


def test_jit_script_of_the_operator() -> None:
    @torch.jit.script
    def scripted(x: Tensor, w: Tensor, polyphase: int) -> Tensor:
        pyramid = torch.ops.aspp_ext.atrous_pyramid
        return pyramid(x, [w], [2, 2], None, None, True, False, polyphase)

    x, w = torch.randn(1, 5, 6, 7), torch.randn(3, 5, 3, 3)
    assert torch.equal(
        scripted(x, w, policy()), aspp_ext.atrous_pyramid(x, [w], [2], activation="relu")
    )


def test_checkpointing() -> None:
    class Checkpointed(Layer):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    layer = Checkpointed(False)
    assert_same_step(layer, twin(layer), torch.randn(2, 5, 6, 7))


def test_meta_tensors() -> None:
    x, w = torch.empty(2, 5, 6, 7, device="meta"), torch.empty(3, 5, 3, 3, device="meta")
    y = aspp_ext.atrous_pyramid(x, [w], [2], activation="relu")
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 6, 7)
