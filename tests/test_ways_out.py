# SPDX-License-Identifier: BSD-3-Clause
"""What TorchScript, wrappers and the way back do to a fused module, and what they leave of it."""

from __future__ import annotations

import copy
import functools
import io
import sys
import warnings

import pytest
import torch
from aspp_pairs import (
    CHANNELS,
    PAIRS,
    RATES,
    TIGHT,
    WIDTH,
    Pair,
    features,
    smp,
    smp_aspp,
    torchvision_aspp,
)
from processes import said_by_python
from torch import nn
from torch.nn.utils import parametrize

from aspp_ext.fuse import fuse, fuse_report, unfuse
from aspp_ext.modules import ASPP, freeze
from aspp_ext.modules.fused import FusedModule

quiet = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


def results(model: nn.Module, parameters: list, x: torch.Tensor) -> list[torch.Tensor]:
    """The result and the gradients of all parameters and of x."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@quiet
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("traced_with", [True, False], ids=["grad", "no_grad"])
def test_a_trace_serves_with_and_without_gradients(pair: Pair, traced_with, layout) -> None:
    original, ours = (m.eval().to(memory_format=layout) for m in pair.build())
    with torch.set_grad_enabled(traced_with):
        traced = torch.jit.trace(nn.Sequential(ours), features())  # checks itself, too
    other = features(3, seed=1, height=8)
    with torch.no_grad():
        torch.testing.assert_close(traced(other), original(other), **TIGHT)
        assert "aspp_ext::aspp_inference" in str(traced.inlined_graph)
    got = results(traced, list(traced.parameters()), other)
    expected = results(original, list(original.parameters()), other)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **TIGHT)


@quiet
def test_a_trace_is_saved_and_loaded(pair: Pair) -> None:
    _, ours = pair.build()
    traced, buffer = torch.jit.trace(ours.eval(), features()), io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.jit.load(buffer)(features()), ours(features()))


@quiet
def test_a_frozen_module_is_traced_as_any(pair: Pair) -> None:
    original, ours = (m.eval() for m in pair.build())
    freeze(ours)
    traced = torch.jit.trace(ours, features())
    for module in (original, ours):
        module.convs[0][0].weight.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(traced(features()), original(features()), **TIGHT)


@quiet
def test_training_is_traced_too(pair: Pair) -> None:
    original, ours = pair.build()
    original.project[3].p = ours.project[3].p = 0
    traced = torch.jit.trace(ours, features())
    original(features())  # as the tracing did
    for _ in range(2):  # as the check did, with and without the trace
        original(features())
    torch.testing.assert_close(traced(features(seed=1)), original(features(seed=1)), **TIGHT)


@quiet
def test_scripting_leaves_the_module_what_it_was(pair: Pair) -> None:
    _, ours = pair.build()
    model = nn.ModuleDict({"inner": nn.Sequential(ours.eval())})
    kind, keys = type(ours), list(model.state_dict())
    scripted = torch.jit.script(model["inner"])
    assert model["inner"][0] is ours
    assert type(ours) is kind
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        expected = ours(features())
        torch.testing.assert_close(scripted(features()), expected, **TIGHT)
        torch.testing.assert_close(torch.jit.script(ours)(features()), expected, **TIGHT)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(features()), expected, **TIGHT)
        assert torch.equal(ours(features()), expected)


@quiet
def test_a_scripted_module_has_used_its_copy_before(pair: Pair) -> None:
    """What the fused forward keeps is no part of what TorchScript sees."""
    _, ours = pair.build()
    freeze(ours.eval())
    with torch.no_grad():
        expected = ours(features())
        torch.testing.assert_close(torch.jit.script(ours)(features()), expected, **TIGHT)


@quiet
@pytest.mark.parametrize("strict", [True, False])
def test_tools_trace_as_they_come(pair: Pair, strict: bool) -> None:
    """TensorBoard's add_graph and OpenVINO's convert_model: eval mode, gradients on."""
    _, ours = pair.build()
    traced = torch.jit.trace(ours.eval(), (features(),), strict=strict)
    assert "aspp_inference" in str(traced.graph)


@quiet
@pytest.mark.parametrize("name", [name for name in PAIRS if name.startswith("fused")])
def test_openvino_converts_what_is_unfused(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    ours, x = PAIRS[name].ours().float().eval(), features().float()
    unfused = unfuse(copy.deepcopy(ours))
    model = openvino.convert_model(unfused, example_input=x)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    (got,) = openvino.compile_model(model, "CPU", exact)(x.numpy()).values()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), ours(x))


FUSABLE = {"torchvision": torchvision_aspp}
if smp is not None:
    FUSABLE |= {"smp dense": lambda: smp_aspp(False), "smp separable": lambda: smp_aspp(True)}
each_fusable = pytest.mark.parametrize("make", FUSABLE.values(), ids=FUSABLE.keys())


class Sharded:
    """In the place of FSDP2's mix-in, which needs processes; tests of it are below."""

    def reshard(self) -> str:
        return f"{type(self).__name__} resharded"


def wrapped(module: nn.Module) -> nn.Module:
    kind = type(module)
    module.__class__ = type(f"FSDP{kind.__name__}", (Sharded, kind), {"note": 1})
    return module


@each_fusable
def test_unfuse_reaches_through_classes_made_at_run_time(make) -> None:
    plain = make().eval()
    model = nn.Sequential(copy.deepcopy(plain), copy.deepcopy(plain))
    fuse(model)
    kinds = [type(wrapped(m)) for m in model]
    assert all(isinstance(m, FusedModule) for m in model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        x = torch.randn(1, CHANNELS, 5, 6)
        torch.testing.assert_close(model[0](x), plain(x))
        unfuse(model)
        assert torch.equal(model[0](x), plain(x))
    for module, kind in zip(model, kinds, strict=True):
        assert not isinstance(module, FusedModule)
        assert isinstance(module, (Sharded, type(plain)))
        assert type(module).__name__ == f"FSDP{type(plain).__name__}" != kind.__name__
        assert module.reshard() == f"FSDP{type(plain).__name__} resharded"
        assert module.note == 1
    assert "_aspp_ext_folded" not in vars(model[0])


@each_fusable
def test_unfuse_keeps_a_parametrization(make) -> None:
    model = fuse(make().eval())
    model.register_parameter("scale", nn.Parameter(torch.ones(2)))
    parametrize.register_parametrization(model, "scale", nn.Identity())
    assert type(model).__name__ == "ParametrizedFusedASPP"
    unfuse(model)
    assert not isinstance(model, FusedModule)
    assert parametrize.is_parametrized(model, "scale")
    assert torch.equal(model.scale, torch.ones(2))


@each_fusable
def test_unfuse_under_a_wrapped_forward(make) -> None:
    """As accelerate's hooks do: the old forward is put aside and called by the new one."""
    plain = make().eval()
    model = fuse(copy.deepcopy(plain))
    model._old_forward = model.forward
    model.forward = lambda x: 2 * model._old_forward(x)
    x = torch.randn(1, CHANNELS, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), 2 * plain(x))
        unfuse(model)
        assert type(model) is type(plain)
        assert torch.equal(model(x), 2 * plain(x))
    del model.forward, model._old_forward
    assert fuse_report(model)[0].reason is None


WRAPPERS = {
    "closure": lambda old: lambda x: old(x),
    "partial": functools.partial,
    "no_grad": lambda old: torch.no_grad()(old),
    "wraps": lambda old: functools.wraps(old)(lambda *a, **k: old(*a, **k)),
}


@each_fusable
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_unfuse_under_whatever_holds_the_old_forward(make, wrap) -> None:
    plain = make().eval()
    model = fuse(copy.deepcopy(plain))
    model.forward = wrap(model.forward)
    x = torch.randn(1, CHANNELS, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        unfuse(model)
        assert torch.equal(model(x), plain(x))


@each_fusable
def test_a_class_that_somebody_derived_is_left_with_a_warning(make) -> None:
    model = fuse(make())
    kind = type(model)

    class Mine(kind):
        def forward(self, x):
            return super().forward(x) + 1

    class Bare(kind):
        pass

    model.__class__ = Bare
    with pytest.warns(UserWarning, match="left these modules fused"):
        assert type(unfuse(model)) is Bare
    model.__class__ = Mine
    with pytest.warns(UserWarning, match="left these modules fused: 0: .*Mine is a subclass of"):
        unfuse(nn.Sequential(model))
    assert type(model) is Mine


def test_our_own_class_stays_whoever_derives_from_it() -> None:
    class Mine(ASPP):
        pass

    model = nn.Sequential(Mine(4, [2], 3), ASPP(4, [2], 3))
    model[1].__class__ = type("FSDPASPP", (ASPP,), {})
    before = [type(m) for m in model]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [type(m) for m in unfuse(model)] == before


def test_a_class_inside_another_or_made_anew_is_somebodys(monkeypatch) -> None:
    model = fuse(torchvision_aspp())

    class Inner(type(model)):
        def fused_forward(self, x):
            return super().fused_forward(x) + 1

    here = sys.modules[__name__]
    outer, other = type("Outer", (), {}), type("Inner", (), {})
    monkeypatch.setattr(here, "Outer", outer, raising=False)
    for found in (Inner, other):  # itself, or what a notebook's cell made when it ran again
        Inner.__qualname__, outer.Inner = "Outer.Inner", found
        model.__class__ = Inner
        with pytest.warns(UserWarning, match=r"Outer\.Inner is a subclass of"):
            assert type(unfuse(model)) is Inner


FSDP2 = """
import copy
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import aspp_ext, sys
sys.path.insert(0, "tests")
from aspp_pairs import CHANNELS, smp, smp_aspp, torchvision_aspp
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
x = torch.randn(2, CHANNELS, 5, 6)
for plain in [torchvision_aspp(), *([smp_aspp(False), smp_aspp(True)] if smp else [])]:
    plain.eval()
    model = torch.nn.Sequential(aspp_ext.fuse(copy.deepcopy(plain)))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(model[0]).__name__ == "FSDPFusedASPP"
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
        for shard, own in zip(model.parameters(), plain.parameters()):
            shard._local_tensor.mul_(1.25)
            own.mul_(1.25)
        torch.testing.assert_close(model(x), plain(x))
        aspp_ext.unfuse(model)
        assert type(model[0]).__name__ == "FSDPASPP", type(model[0])
        torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    model[0].reshard()
dist.destroy_process_group()
"""


def test_fully_sharded() -> None:
    said_by_python(FSDP2)


def test_our_own_module_stays_what_it_is() -> None:
    ours = ASPP(CHANNELS, RATES, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(unfuse(nn.Sequential(ours))[0]) is ASPP
