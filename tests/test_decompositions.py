# SPDX-License-Identifier: BSD-3-Clause
"""Exported programs in PyTorch's own operators run and are converted without this package."""

from __future__ import annotations

import io

import pytest
import torch
from aspp_pairs import PAIRS, features, randomise
from marks import on_native, proven_emulated
from test_compile import Layer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import aspp_ext
from aspp_ext.ops.family import FAMILIES, NATIVE
from aspp_ext.testing import OPS, PROBLEMS

pytestmark = [
    on_native,
    proven_emulated,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BOUND = 1.3e-6
DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
each_format = pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
each_module = pytest.mark.parametrize("name", PAIRS)


def ours_in(program: ExportedProgram) -> int:
    return sum("aspp_ext" in str(node.target) for node in program.graph.nodes)


def plain(module: nn.Module, x: Tensor) -> ExportedProgram:
    program = torch.export.export(module, (x,), dynamic_shapes=(DYNAMIC,), strict=True)
    assert ours_in(program)
    decomposed = program.run_decompositions(aspp_ext.decompositions())
    assert not ours_in(decomposed)
    return decomposed


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).norm() <= BOUND * expected.norm()


def laid(x: Tensor, last: bool) -> Tensor:
    return x.float().to(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.quick("cpu", when=lambda name, last: name == "fused smp separable" and not last)
@each_format
@each_module
def test_modules(name, last) -> None:
    """At other sizes, too: rates reach beyond some of the maps and not beyond others."""
    module = randomise(PAIRS[name].ours()).eval()
    with torch.no_grad():
        program = plain(module, laid(features(), last)).module()
        for x in (features(), features(3, height=20, width=11), features(4, height=2, width=30)):
            x = laid(x, last)
            got, expected = program(x), module(x)
            assert_close(got, expected)
            assert got.stride() == expected.stride()


@pytest.mark.quick("cpu", when=lambda name, last: name == "ours dense" and last)
@each_format
@pytest.mark.parametrize("name", ["ours dense", "fused smp separable"])
def test_training(name, last) -> None:
    if name not in PAIRS:
        pytest.skip("segmentation_models_pytorch is not installed")
    module = PAIRS[name].ours().train()
    module.project[3].eval()
    program = plain(module, laid(features(), last)).module()
    x = laid(features(3, height=20, width=11), last)
    assert_close(program(x), module(x))


@pytest.mark.parametrize("separable", [False, True], ids=["pyramid", "separable"])
def test_operators_called_by_a_module(separable) -> None:
    module = Layer(separable)
    x = torch.randn(2, 5, 9, 11)
    assert_close(plain(module, x).module()(x), module(x))


def test_every_operator_of_a_forward_pass_is_in_the_table() -> None:
    names = {op.name().removeprefix("aspp_ext::") for op in aspp_ext.decompositions()}
    forward = {"atrous_pyramid", "atrous_pyramid_statistics", "atrous_separable_pyramid"}
    assert names == {f"{n}{f.suffix}" for n in forward for f in FAMILIES} | {"aspp_inference"}


@pytest.mark.parametrize("name", [n for n in OPS if "grad" not in n and "backward" not in n])
def test_functions(name) -> None:
    """With the operators' own defaults, by position and by name."""
    arguments = OPS[name].make(PROBLEMS["aspp"], torch.float32)
    op = OPS[name].operator(NATIVE).default
    decomposed = aspp_ext.decompositions()[op]
    expected = op(*arguments)
    assert_close(decomposed(*arguments), expected)
    named = dict(zip((a.name for a in op._schema.arguments), arguments, strict=False))
    x = named.pop("x")
    assert_close(decomposed(x, **named), expected)


def test_statistics() -> None:
    x, w = torch.randn(2, 3, 5, 6), torch.randn(4, 3, 3, 3)
    op = torch.ops.aspp_ext.atrous_pyramid_statistics.default
    y, mean, squares = aspp_ext.decompositions()[op](x, [w], [2, 2])
    assert_close(y, aspp_ext.reference.atrous_pyramid(x, [w], [2]))
    assert_close(mean, y.mean((0, 2, 3)))
    assert_close(squares, y.var((0, 2, 3), correction=0) * 60)


@pytest.mark.quick("cpu", when=lambda name, last: name == "fused torchvision" and last)
@each_format
@each_module
def test_openvino_converts_the_program(name, last) -> None:
    openvino = pytest.importorskip("openvino")
    module, x = randomise(PAIRS[name].ours()).eval(), laid(features(), last)
    with torch.no_grad():
        model = openvino.convert_model(plain(module, x), example_input=(x,))
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        (got,) = openvino.compile_model(model, "CPU", exact)(x.numpy()).values()
        assert_close(torch.from_numpy(got), module(x))


@pytest.mark.quick("cpu", when=lambda name: name == "fused torchvision")
@each_module
def test_onnx_has_an_exporter_for_the_program(name) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    module, x = randomise(PAIRS[name].ours()).eval(), laid(features(), False)
    with torch.no_grad():
        exported = torch.onnx.export(plain(module, x), (x,), dynamo=True)
    buffer = io.BytesIO()
    exported.save(buffer)
    nodes = onnx.load_from_string(buffer.getvalue()).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
