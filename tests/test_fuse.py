# SPDX-License-Identifier: BSD-3-Clause
"""fuse and unfuse on the real models of torchvision and segmentation_models_pytorch."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from aspp_pairs import (
    CHANNELS,
    PAIRS,
    RATES,
    TIGHT,
    WIDTH,
    assert_all_close,
    deeplabv3_resnet50,
    features,
    randomise,
    smp,
    smp_aspp,
    smp_models,
    torchvision,
    torchvision_aspp,
    train_step,
)
from processes import said_by_python
from torch import nn

from aspp_ext.fuse import fuse, fuse_report, unfuse
from aspp_ext.modules import ASPP
from aspp_ext.modules.fused import FusedModule


def torchvision_model() -> nn.Module:
    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)


def torchvision_head() -> nn.Module:
    return torchvision.DeepLabHead(CHANNELS, 3, (2, 3))


def smp_v3(separable: bool = False) -> nn.Module:
    return smp_models.DeepLabV3(
        "resnet18",
        encoder_weights=None,
        decoder_channels=24,
        decoder_atrous_rates=(2, 3, 5),
        decoder_aspp_separable=separable,
    )


def smp_v3plus(separable: bool = True) -> nn.Module:
    return smp_models.DeepLabV3Plus(
        "resnet18", encoder_weights=None, decoder_channels=24, decoder_aspp_separable=separable
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "deeplabv3_resnet50": (torchvision_model, "classifier.0", (2, 3, 48, 56)),
    "DeepLabHead": (torchvision_head, "0", (2, CHANNELS, 7, 9)),
    "smp DeepLabV3": (smp_v3, "decoder.aspp", (2, 3, 48, 64)),
    "smp DeepLabV3 separable": (lambda: smp_v3(True), "decoder.aspp", (2, 3, 48, 64)),
    "smp DeepLabV3Plus": (smp_v3plus, "decoder.aspp.0", (2, 3, 48, 64)),
    "smp DeepLabV3Plus dense": (lambda: smp_v3plus(False), "decoder.aspp.0", (2, 3, 48, 64)),
}


def primary(output: torch.Tensor | dict) -> torch.Tensor:
    return output["out"] if isinstance(output, dict) else output


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, str, torch.Tensor]:
    build, name, shape = MODELS[request.param]
    torch.manual_seed(0)
    return randomise(build()), name, torch.randn(shape)


def test_whole_model(case: tuple) -> None:
    model, name, x = case
    original = copy.deepcopy(model).eval()
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    hook_calls: list[str] = []
    aspp = model.get_submodule(name)
    kind = type(aspp)
    aspp.register_forward_hook(lambda module, i, y: hook_calls.append(type(module).__name__))

    assert fuse(model) is model
    assert model.get_submodule(name) is aspp
    assert type(aspp) is not kind
    assert isinstance(aspp, kind)
    assert isinstance(aspp, FusedModule)
    assert [(e.name, e.fused, e.reason) for e in fuse_report(model)] == [(name, True, None)]
    assert list(model.state_dict()) == list(original.state_dict())
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(b is buffers[n] for n, b in model.named_buffers())
    model.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(model.state_dict(), strict=True)

    model.eval()
    with torch.no_grad():
        expected, got = primary(original(x)), primary(model(x))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model_without_hooks(model)))):
            assert type(twin.get_submodule(name)) is type(aspp)
            assert torch.equal(primary(twin(x)), got)
    assert hook_calls[0] == "FusedASPP"

    assert fuse(model) is model
    assert unfuse(model) is model
    assert type(aspp) is kind
    assert list(vars(aspp)) == list(vars(original.get_submodule(name)))
    with torch.no_grad():
        assert torch.equal(primary(model(x)), expected)
    assert hook_calls[-1] == kind.__name__


def model_without_hooks(model: nn.Module) -> nn.Module:
    """A copy whose lambdas do not stand in the way of pickling."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks.clear()
    return model


@pytest.mark.parametrize("name", ["DeepLabHead", "smp DeepLabV3Plus"])
def test_whole_model_trains_alike(name: str) -> None:
    build, _, shape = MODELS[name]
    torch.manual_seed(0)
    original = randomise(build()).double()
    model = fuse(copy.deepcopy(original))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (original, model)]
    x = torch.randn(shape, dtype=torch.float64)
    for step in range(3):
        losses = []
        for module, optimizer in zip((original, model), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = primary(module(x)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    for key, value in original.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-6, atol=1e-8)
    original.eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(primary(model(x)), primary(original(x)), rtol=1e-6, atol=1e-8)


def test_the_root_itself_and_shared_modules() -> None:
    aspp = torchvision_aspp()
    model = nn.ModuleList([aspp, nn.Sequential(aspp), smp_aspp(True)])
    fuse(model)
    assert model[1][0] is model[0] is aspp
    assert [e.name for e in fuse_report(model)] == ["0", "2"]
    assert unfuse(fuse(aspp)) is aspp
    assert type(aspp) is torchvision.ASPP
    assert type(unfuse(model)[2]) is smp.ASPP


def test_nothing_to_fuse() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError) as error:
        fuse(model)
    assert "at least one pyramid" in str(error.value)
    assert "example_inputs" in str(error.value)
    assert fuse(model, strict=False) is model
    assert unfuse(model) is model
    assert fuse_report(model) == []


def test_our_own_module_counts_and_is_left_alone() -> None:
    model = nn.Sequential(ASPP(CHANNELS, RATES, WIDTH))
    fuse(model)
    unfuse(model)
    assert type(model[0]) is ASPP
    assert [e.fused for e in fuse_report(model)] == [True]


def test_pool_batch_of_one() -> None:
    model = fuse(torchvision_head(), pool_batch_of_one="running_stats")
    before = model[0].convs[-1][2].running_mean.clone()
    model(features(1).float()).sum().backward()
    assert torch.equal(model[0].convs[-1][2].running_mean, before)
    assert model[0].convs[-1][2].weight.grad is not None
    assert fuse(model)[0].pool_batch_of_one == "running_stats"
    assert copy.deepcopy(model)[0].pool_batch_of_one == "running_stats"
    fuse(model, pool_batch_of_one="error")
    with pytest.raises(ValueError, match="pooled branch"):
        model(features(1).float())
    with pytest.raises(ValueError, match="pool_batch_of_one must be one of"):
        fuse(model, pool_batch_of_one="never")
    assert "pool_batch_of_one" not in vars(unfuse(model)[0])


def test_polyphase() -> None:
    model = fuse(torchvision_head())
    assert model[0].polyphase
    assert not fuse(model, polyphase=False)[0].polyphase
    for twin in (fuse(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin[0].polyphase
    with pytest.raises(TypeError, match="fuse: polyphase must be True or False, got 0"):
        fuse(model, polyphase=0)
    assert "polyphase" not in vars(unfuse(model)[0])


class Inherited(torchvision.ASPP):
    pass


class Subclassed(torchvision.ASPP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


def replace(path: str, new: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    """A change that puts another layer at ``path``."""
    return lambda module: module.set_submodule(path, new())


def conv(**keywords) -> Callable[[], nn.Module]:
    defaults = {"kernel_size": 3, "padding": 3, "dilation": 3, "bias": False}
    return lambda: nn.Conv2d(CHANNELS, WIDTH, **(defaults | keywords))


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "convs.2.0 has padding=(2, 2)": replace("convs.2.0", conv(padding=2)),
    "convs.2.0 has stride=(2, 2)": replace("convs.2.0", conv(stride=2)),
    "convs.2.0 has groups=4": replace("convs.2.0", conv(groups=4)),
    "convs.2.0 has padding_mode='reflect'": replace("convs.2.0", conv(padding_mode="reflect")),
    "convs.2.0 has the even kernel_size=(4, 4)": replace("convs.2.0", conv(kernel_size=4)),
    "convs.2.0 is a LazyConv2d": replace("convs.2.0", lambda: nn.LazyConv2d(WIDTH, 1)),
    "convs.1.1 norms 4 channels": replace("convs.1.1", lambda: nn.BatchNorm2d(4)),
    "convs.1 is an Identity": replace("convs.1", nn.Identity),
    "convs.4 is a Sequential": replace("convs.4", nn.Sequential),
    "the projection reads 8 channels": replace("project.0", lambda: nn.Conv2d(WIDTH, WIDTH, 1)),
    "convs.3.0 has a hook": lambda m: m.convs[3][0].register_forward_hook(print),
    "project.1 has its forward replaced": lambda m: setattr(m.project[1], "forward", torch.abs),
    "its forward is replaced": lambda m: setattr(m, "forward", torch.abs),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_fused_path_does_not_compute_is_left_alone(reason: str) -> None:
    module = torchvision_aspp()
    REFUSED[reason](module)
    with pytest.warns(UserWarning, match="left these modules as they were") as caught:
        fuse(module)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert type(module) is torchvision.ASPP
    (entry,) = fuse_report(module)
    assert not entry.fused
    assert reason in entry.reason


def test_equal_settings_in_other_words_are_fused() -> None:
    original = torchvision_aspp()
    original.convs[1][0].padding = "same"
    original.convs[0][0].padding = "valid"
    original.convs[2][0] = nn.Conv2d(CHANNELS, WIDTH, (5, 3), padding=(4, 3), dilation=(2, 3))
    original.convs[2][2] = nn.ReLU(inplace=True)
    original.project[3] = nn.Identity()
    original = randomise(original).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = fuse(copy.deepcopy(original))
    with torch.no_grad():
        x = features().float()
        torch.testing.assert_close(fused(x), original(x), rtol=1e-4, atol=1e-5)


def biased_depthwise(module: nn.Module) -> None:
    module.convs[1][0][0].bias = nn.Parameter(torch.ones(CHANNELS))


# What torchvision's, and in the end smp's, description does not cover.
BY_STRUCTURE: dict[str, Callable[[nn.Module], object]] = {
    "group norm": replace("convs.1.1", lambda: nn.GroupNorm(2, WIDTH)),
    "leaky": replace("convs.1.2", nn.LeakyReLU),
    "pools to 2": replace("convs.4.0", lambda: nn.AdaptiveAvgPool2d(2)),
    "3x3 projection": replace("project.0", lambda: nn.Conv2d(5 * WIDTH, WIDTH, 3, padding=1)),
    "more parts": lambda m: m.project.append(nn.ReLU()),
    "spare part": lambda m: m.add_module("extra", nn.ReLU()),
    "biased depthwise": biased_depthwise,
    "dense and separable": lambda m: m.convs.__setitem__(1, smp_aspp(False).convs[1]),
}


@pytest.mark.parametrize("change", BY_STRUCTURE)
def test_what_a_name_does_not_cover_is_read_by_structure(change: str) -> None:
    of_smp = change in ("biased depthwise", "dense and separable")
    original = smp_aspp(True) if of_smp else torchvision_aspp()
    BY_STRUCTURE[change](original)
    check_by_structure(randomise(original))


def check_by_structure(original: nn.Module) -> None:
    original = original.double()
    module = fuse(copy.deepcopy(original))
    assert isinstance(module, FusedModule)
    assert [e.recognised for e in fuse_report(module)] == ["structure"]
    x = features()
    assert_all_close(train_step(module, x), train_step(original, x), **TIGHT)
    original.eval()
    module.eval()
    assert_all_close(train_step(module, x), train_step(original, x), **TIGHT)
    with torch.no_grad():
        torch.testing.assert_close(module(x), original(x), **TIGHT)


@pytest.mark.parametrize("kind", [Subclassed, Inherited])
def test_a_subclass_is_read_by_structure(kind: type[nn.Module]) -> None:
    check_by_structure(randomise(kind(CHANNELS, RATES, WIDTH)))


def test_one_refused_module_does_not_stop_the_others() -> None:
    model = nn.ModuleList([torchvision_aspp(), torchvision_aspp()])
    model[0].convs[1][0].stride = (2, 2)
    with pytest.warns(UserWarning, match="0: convs.1.0 has stride"):
        fuse(model)
    assert [e.fused for e in fuse_report(model)] == [False, True]


def test_a_module_changed_after_fusing_is_reported_and_right() -> None:
    pair = PAIRS["fused torchvision"]
    original, ours = pair.build()
    for module in (original, ours):
        module.eval().convs[1][2] = nn.GELU()
    (entry,) = fuse_report(ours)
    assert entry.fused
    assert entry.reason == "convs.1.2 is a GELU, not a ReLU"
    with torch.no_grad():
        assert torch.equal(ours(features()), original(features()))


def test_importing_does_not_import_the_libraries() -> None:
    script = """
import sys, aspp_ext
from torch import nn
aspp_ext.fuse(nn.Sequential(aspp_ext.ASPP(4, [1], 4)))
for name in ("torchvision", "segmentation_models_pytorch", "triton"):
    assert name not in sys.modules, name
"""
    said_by_python(script)
