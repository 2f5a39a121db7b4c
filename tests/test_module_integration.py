# SPDX-License-Identifier: BSD-3-Clause
"""The fused forward under PyTorch's other machinery: hooks, compilers, exporters, transforms."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from aspp_pairs import PAIRS, TIGHT, Pair, assert_all_close, features, train_step
from marks import varied
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune

pytestmark = varied

CHOSEN = ("ours separable", "fused torchvision", "fused smp separable")


@pytest.fixture(params=[PAIRS[name] for name in CHOSEN], ids=CHOSEN)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture
def evaluated(pair: Pair) -> tuple[nn.Module, nn.Module]:
    original, ours = pair.build()
    return original.eval(), ours.eval()


INNER = ["convs.0", "convs.0.0", "convs.2.1", "convs.2.2", "convs.4", "convs.4.0", "project.3"]


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("grad", [False, True])
def test_hooks_on_inner_layers_fire(pair: Pair, name: str, grad: bool) -> None:
    original, ours = pair.build()
    seen: list[list[torch.Size]] = []
    for module in (original, ours):
        shapes: list[torch.Size] = []
        seen.append(shapes)
        layer = module.eval().requires_grad_(grad).get_submodule(name)
        layer.register_forward_hook(lambda _, i, y, s=shapes: s.append(y.shape))
        layer.register_forward_pre_hook(lambda _, i, s=shapes: s.append(i[0].shape))
        layer.register_full_backward_hook(lambda _, i, o, s=shapes: s.append(o[0].shape))
    x = features().requires_grad_(grad)
    outputs = [original(x), ours(x)]
    torch.testing.assert_close(outputs[1], outputs[0], **TIGHT)
    if grad:
        for y in outputs:
            y.sum().backward()
    assert seen[0] == seen[1]
    assert len(seen[1]) == (3 if grad else 2)


def test_global_hooks_fire(evaluated: tuple) -> None:
    original, ours = evaluated
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, i, y: seen.append(type(module).__name__)
    )
    with handle, torch.no_grad():
        original(features())
        expected, seen[:] = seen[:-1], []
        ours(features())
    assert seen[:-1] == expected


def test_hooks_on_the_module_itself_keep_the_fused_path(evaluated: tuple) -> None:
    _, ours = evaluated
    seen: list[torch.Size] = []
    ours.register_forward_hook(lambda _, i, y: seen.append(y.shape))
    with torch.no_grad():
        y = ours(features())
    assert seen == [y.shape]


def test_reparametrised_layers_are_respected(pair: Pair) -> None:
    original, ours = pair.build()
    for module in (original, ours):
        parametrizations.weight_norm(module.convs[0][0])
        prune.l1_unstructured(module.project[0], "weight", 0.5)
    assert_all_close(train_step(ours, features()), train_step(original, features()), **TIGHT)
    with torch.no_grad():
        expected = original.eval()(features())
        torch.testing.assert_close(ours.eval()(features()), expected, **TIGHT)


def test_replaced_layers_are_respected(pair: Pair) -> None:
    class Doubling(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    original, ours = pair.build()
    for module in (original, ours):
        module.convs[0][0].__class__ = Doubling
    with torch.no_grad():
        expected = original.eval()(features())
        torch.testing.assert_close(ours.eval()(features()), expected, **TIGHT)
        for module in (original, ours):
            module.convs[0][0].__class__ = nn.Conv2d
            layer = module.convs[1][2]
            layer.forward = torch.sigmoid
        torch.testing.assert_close(ours(features()), original(features()), **TIGHT)


@pytest.mark.parametrize("name", CHOSEN[1:])
@pytest.mark.parametrize("training", [False, True])
def test_compile_whole_graph_with_dynamic_shapes(name: str, training: bool) -> None:
    torch._dynamo.reset()
    original, ours = PAIRS[name].build()
    for module in (original, ours):
        module.train(training).project[3].eval()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (features(2), features(3, height=8, width=5)):
        if training:
            got, expected = train_step(compiled, x), train_step(original, x)
            got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
            assert_all_close(got, expected, **TIGHT)
            ours.zero_grad()
            original.zero_grad()
        else:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), original(x), **TIGHT)


def test_compile_beside_a_hook() -> None:
    torch._dynamo.reset()
    original, ours = (m.eval() for m in PAIRS["fused torchvision"].build())
    ours.convs[1][0].register_forward_hook(lambda module, x, y: 2 * y)
    original.convs[1][0].register_forward_hook(lambda module, x, y: 2 * y)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(features()), original(features()), **TIGHT)


@pytest.mark.parametrize("strict", [False, True])
def test_export(evaluated: tuple, strict: bool) -> None:
    original, ours = evaluated
    dynamic = {0: torch.export.Dim("n", max=9), 2: torch.export.Dim("h", max=99)}
    with torch.no_grad():
        program = torch.export.export(ours, (features(),), dynamic_shapes=(dynamic,), strict=strict)
        x = features(3, height=10)
        torch.testing.assert_close(program.module()(x), original(x), **TIGHT)
    assert program.state_dict.keys() == original.state_dict().keys()
    assert any("aspp_inference" in str(node.target) for node in program.graph.nodes)


def test_trace_depends_on_the_parameters(evaluated: tuple) -> None:
    original, ours = evaluated
    with torch.no_grad():
        traced = torch.jit.trace(ours, (features(),))
        x = features(3, height=8)
        torch.testing.assert_close(traced(x), original(x), **TIGHT)
        traced.load_state_dict({k: v * 1.5 for k, v in original.state_dict().items()})
        original.load_state_dict({k: v * 1.5 for k, v in original.state_dict().items()})
        torch.testing.assert_close(traced(x), original(x), **TIGHT)


def test_script_and_symbolic_trace_see_the_layers(evaluated: tuple) -> None:
    original, ours = evaluated
    kind = type(ours)
    for other in (torch.fx.symbolic_trace(ours), torch.jit.script(ours)):
        torch.testing.assert_close(other(features()), original(features()), **TIGHT)
    assert type(ours) is kind


def test_onnx_export_has_only_standard_operators(evaluated: tuple) -> None:
    onnx = pytest.importorskip("onnx")
    _, ours = evaluated
    buffer = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(ours.float(), (features().float(),), buffer, dynamo=False)
    nodes = onnx.load_from_string(buffer.getvalue()).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}


def test_function_transforms(evaluated: tuple) -> None:
    original, ours = evaluated
    parameters, buffers = dict(ours.named_parameters()), dict(ours.named_buffers())

    def loss(module: nn.Module, parameters: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, (parameters, buffers), (x,)).square().sum()

    for module in (original, ours):
        one = torch.func.grad(loss, 1)(module, parameters, features())
        per_sample = torch.func.vmap(torch.func.grad(loss, 1), (None, None, 0))
        many = per_sample(module, parameters, features()[:, None])
        assert_all_close({k: v.sum(0) for k, v in many.items()}, one, **TIGHT)
        if module is original:
            expected = one
    assert_all_close(one, expected, **TIGHT)


def test_linearize(evaluated: tuple) -> None:
    original, ours = evaluated
    got, expected = (torch.func.linearize(m, features())[1](features()) for m in (ours, original))
    torch.testing.assert_close(got, expected, **TIGHT)


def test_functional_call_in_inference(evaluated: tuple) -> None:
    original, ours = evaluated
    state = {name: value * 1.5 for name, value in original.state_dict().items()}
    with torch.no_grad():
        before = ours(features())
        got = torch.func.functional_call(ours, state, (features(),))
        expected = torch.func.functional_call(original, state, (features(),))
        torch.testing.assert_close(got, expected, **TIGHT)
        assert torch.equal(ours(features()), before)


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_derivatives(evaluated: tuple, grad: bool) -> None:
    x, tangent = features(), features(seed=1)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        got, expected = (
            forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent
            for module in evaluated[::-1]
        )
        torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(pair: Pair, training: bool, dtype: torch.dtype) -> None:
    original, ours = (m.float() for m in pair.build())
    for module in (original, ours):
        module.train(training).project[3].eval()
    x = features().to(dtype)
    oracle = copy.deepcopy(original).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
        low, got = original(x), ours(x)
    assert got.dtype == low.dtype == torch.bfloat16
    allowed = 2 * (low - oracle).abs().max() + 2**-7 * oracle.abs().max()
    assert (got - oracle).abs().max() <= allowed
    if training:
        got.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    ours.load_state_dict(original.state_dict())
    with torch.no_grad():  # the copy made under autocast is not used outside of it
        x = x.float()
        torch.testing.assert_close(ours.eval()(x), original.eval()(x), rtol=1e-4, atol=1e-5)


def test_meta_device(evaluated: tuple) -> None:
    original, ours = (m.to("meta") for m in evaluated)
    with torch.no_grad():
        assert ours(features().to("meta")).shape == original(features().to("meta")).shape


def test_threads_share_a_module(evaluated: tuple) -> None:
    original, ours = evaluated
    with torch.no_grad():
        expected = [original(features(seed=seed)) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.allclose(ours(features(seed=seed)), expected[seed], 1e-9, 1e-10):
                    wrong.append(seed)
                ours.drop_folded()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_synchronised_norms(pair: Pair) -> None:
    original, ours = (nn.SyncBatchNorm.convert_sync_batchnorm(m).eval() for m in pair.build())
    with torch.no_grad():
        torch.testing.assert_close(ours(features()), original(features()), **TIGHT)
    assert_all_close(train_step(ours, features()), train_step(original, features()), **TIGHT)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_saved_tensors_that_may_be_written(pair: Pair, training: bool) -> None:
    """Parameters written between forward and backward: gradients are of what they were."""
    original, ours = (m.train(training) for m in pair.build())
    original.project[3].p = ours.project[3].p = 0.0
    x = features()
    expected = train_step(original, x)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        y = ours(x)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.mul_(1.1)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"{name}.grad"], **TIGHT)
