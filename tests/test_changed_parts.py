# SPDX-License-Identifier: BSD-3-Clause
"""Whoever replaces a method of a layer, of one instance or of a class, gets what they wrote."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from aspp_pairs import (
    CHANNELS,
    PAIRS,
    RATES,
    TIGHT,
    WIDTH,
    Pair,
    features,
    randomise,
    smp,
    torchvision,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aspp_ext.fuse import fuse, fuse_report
from aspp_ext.modules import ASPP, inference
from aspp_ext.modules.aspp import ASPPConv, ASPPPooling, ASPPSeparableConv, LayeredASPP


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


def doubled(method: Callable) -> Callable:
    """As careful as a wrapper can be."""

    @functools.wraps(method)
    def twice(*args, **kwargs):
        return 2 * method(*args, **kwargs)

    return twice


def wrap_around(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For panoramas, whose left and right edge meet."""
    across = conv.padding[1]
    x = F.pad(x, (across, across, 0, 0), mode="circular")
    padding = (conv.padding[0], 0)
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def on_instance(name: str) -> Callable[[nn.Module], None]:
    def change(part: nn.Module) -> None:
        setattr(part, name, doubled(getattr(part, name)))

    return change


def panorama(conv: nn.Module) -> None:
    conv._conv_forward = types.MethodType(wrap_around, conv)


def atrous_conv(aspp: nn.Module) -> nn.Module:
    return next(m for m in aspp.convs[1].modules() if isinstance(m, nn.Conv2d))


PARTS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], None]]] = {
    "_conv_forward of an atrous convolution": (atrous_conv, panorama),
    "_conv_forward of the projection": (lambda m: m.project[0], on_instance("_conv_forward")),
    "forward of a convolution": (lambda m: m.convs[0][0], on_instance("forward")),
    "forward of a norm": (lambda m: m.convs[0][1], on_instance("forward")),
    "_check_input_dim of a norm": (
        lambda m: m.convs[0][1],
        lambda norm: setattr(norm, "_check_input_dim", lambda x: x.mul_(2)),
    ),
    "forward of a ReLU": (lambda m: m.convs[1][-1], on_instance("forward")),
    "forward of a branch": (lambda m: m.convs[1], on_instance("forward")),
    "forward of the pooled branch": (lambda m: m.convs[-1], on_instance("forward")),
    "forward of the projection": (lambda m: m.project, on_instance("forward")),
    "_compiled_call_impl of a convolution": (
        lambda m: m.convs[0][0],
        lambda conv: setattr(conv, "_compiled_call_impl", doubled(conv._call_impl)),
    ),
    "_call_impl of a ReLU": (lambda m: m.convs[1][-1], on_instance("_call_impl")),
}


def agree(original: nn.Module, ours: nn.Module) -> Tensor:
    """In training, in eval, and in eval with gradients; returns the result in eval."""
    original.project[3].p = ours.project[3].p = 0
    before = copy.deepcopy(original.state_dict())
    for training, grad in ((True, True), (False, True), (False, False)):
        with torch.set_grad_enabled(grad):
            expected, got = (m.train(training)(features()) for m in (original, ours))
        torch.testing.assert_close(got, expected, **TIGHT)
        for module in (original, ours):
            module.load_state_dict(before)
    return got


def reasons(model: nn.Module) -> list[str | None]:
    return [entry.reason for entry in fuse_report(model)]


@pytest.mark.parametrize("name", PARTS)
def test_a_method_replaced_on_an_instance(pair: Pair, name: str) -> None:
    find, change = PARTS[name]
    original, ours = pair.build()
    before = agree(original, ours)
    for module in (original, ours):
        change(find(module))
    assert not torch.allclose(agree(original, ours), before)
    (reason,) = reasons(ours)
    assert reason is not None
    assert reason.endswith(("replaced", "on its own"))


@pytest.mark.parametrize("name", PARTS)
def test_a_method_replaced_before_fusing(name: str) -> None:
    find, change = PARTS[name]
    original = randomise(torchvision.ASPP(CHANNELS, RATES, WIDTH)).double()
    ours = copy.deepcopy(original)
    for module in (original, ours):
        change(find(module))
    with pytest.warns(UserWarning, match="left these modules as they were: the model: .* (re|own)"):
        assert type(fuse(ours)) is torchvision.ASPP
    agree(original, ours)


CLASSES = [
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.Conv2d, "__call__"),
    (nn.BatchNorm2d, "forward"),
    (nn.modules.batchnorm._BatchNorm, "forward"),
    (nn.ReLU, "forward"),
    (nn.Sequential, "forward"),
    (nn.AdaptiveAvgPool2d, "forward"),
    (nn.Module, "_call_impl"),
]


@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=lambda x: getattr(x, "__name__", x))
def test_a_method_replaced_on_a_class(pair: Pair, kind: type, name: str, monkeypatch) -> None:
    original, ours = pair.build()
    before = agree(original, ours)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, doubled(getattr(kind, name)))
        assert not torch.allclose(agree(original, ours), before)
        assert f"{name} is replaced" in reasons(ours)[0]
    assert reasons(ours) == [None]
    agree(original, ours)


BY_CLASS = {
    "ours dense": (LayeredASPP, ASPPConv, ASPPPooling),
    "ours separable": (LayeredASPP, ASPPSeparableConv, ASPPPooling),
    "fused torchvision": (torchvision.ASPP, torchvision.ASPPConv, torchvision.ASPPPooling),
}
if smp is not None:
    BY_CLASS["fused smp dense"] = (smp.ASPP, smp.ASPPConv, smp.ASPPPooling)
    BY_CLASS["fused smp separable"] = (smp.ASPP, smp.ASPPSeparableConv, smp.SeparableConv2d)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in BY_CLASS.items() for kind in kinds]
)
def test_a_forward_replaced_on_a_class_of_the_pyramid(name, kind, monkeypatch) -> None:
    ours = randomise(PAIRS[name].ours()).double().eval()
    with torch.no_grad():
        before = ours(features())
        monkeypatch.setattr(kind, "forward", doubled(kind.forward))
        plain = LayeredASPP if isinstance(ours, ASPP) else type(ours).original
        expected = plain.forward(ours, features())
        torch.testing.assert_close(ours(features()), expected, **TIGHT)
    assert not torch.allclose(expected, before)
    assert "forward is replaced" in reasons(ours)[0]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((F, name) for name in ("conv2d", "batch_norm", "relu", "adaptive_avg_pool2d")),
        *((torch, name) for name in ("cat", "relu", "batch_norm")),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_replaced_function(pair: Pair, module, name: str, monkeypatch) -> None:
    """As counters of operations do."""
    original, ours = pair.build()
    before = agree(original, ours)
    monkeypatch.setattr(module, name, doubled(getattr(module, name)))
    assert not torch.allclose(agree(original, ours), before)
    assert reasons(ours) == [f"{module.__name__}.{name} is replaced"]


@pytest.mark.parametrize(
    ("home", "name"),
    [(nn.modules.conv, "conv2d"), (nn.modules.batchnorm, "batch_norm")],
    ids=["conv", "norm"],
)
def test_other_functions_in_the_layers_module(pair: Pair, home, name: str, monkeypatch) -> None:
    original, ours = pair.build()
    before = agree(original, ours)
    others = types.SimpleNamespace(**vars(F))
    setattr(others, name, doubled(getattr(F, name)))
    monkeypatch.setattr(home, "F", others)
    assert not torch.allclose(agree(original, ours), before)
    assert reasons(ours)[0].endswith("F is replaced")


class Doubled(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.ops.aten.convolution.default else result


class Padded(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.conv2d else result


@pytest.mark.parametrize("mode", [Padded, Doubled])
def test_a_mode_that_sees_functions(pair: Pair, mode) -> None:
    original, ours = pair.build()
    before = agree(original, ours)
    with mode():
        assert not torch.allclose(agree(original, ours), before)


def test_a_mode_of_pytorch_changes_nothing(pair: Pair, monkeypatch) -> None:
    _, ours = pair.build()
    ran = []
    run = inference.aspp_inference
    monkeypatch.setattr(inference, "aspp_inference", lambda *a, **k: ran.append(a) or run(*a, **k))
    with torch.device("cpu"), torch.no_grad():
        ours.eval()(features())
    assert ran


TENSORS = {
    "weight": lambda m: (m.convs[1][0], "weight"),
    "projection": lambda m: (m.project[0], "weight"),
    "scale": lambda m: (m.convs[0][1], "weight"),
    "variance": lambda m: (m.convs[-1][2], "running_var"),
}


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_another_dtype(name, dtype) -> None:
    """PyTorch mixes no others than low precision with norms in float32."""
    ours = ASPP(CHANNELS, RATES, WIDTH).eval().requires_grad_(False)
    ours(features().float())
    layer, attribute = TENSORS[name](ours)
    getattr(layer, attribute).data = getattr(layer, attribute).to(dtype)
    said = []
    for run in (ours, functools.partial(LayeredASPP.forward, ours)):
        with pytest.raises(Exception) as error:
            run(features().float())
        said.append((type(error.value), str(error.value)))
    assert said[0] == said[1]
    assert reasons(ours)[0] is not None


@pytest.mark.parametrize("names", [["running_mean"], ["weight"], ["weight", "bias"]], ids=str)
def test_norms_in_two_dtypes(names) -> None:
    """Wholly in float32, beside convolutions in a lower precision, PyTorch takes them."""
    ours = randomise(ASPP(CHANNELS, RATES, WIDTH)).eval().bfloat16().requires_grad_(False)
    x = features().bfloat16()
    ours.convs[0][1].float()
    ours(x)
    ours.convs[0][1].bfloat16()
    for name in names:
        tensor = getattr(ours.convs[0][1], name)
        tensor.data = tensor.data.float()
    for run in (ours, functools.partial(LayeredASPP.forward, ours)):
        with pytest.raises(RuntimeError, match="scalar type"):
            run(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.convs[0][0], "weight", nn.Parameter(m.convs[0][0].weight[:, :1])),
        lambda m: setattr(m.convs[1][0], "weight", nn.Parameter(torch.ones(WIDTH, CHANNELS, 1, 1))),
        lambda m: setattr(m.convs[0][1], "running_var", torch.ones(1)),
        lambda m: setattr(m.convs[0][1], "weight", nn.Parameter(torch.ones(1))),
    ],
    ids=["channels", "kernel", "variance", "scale"],
)
def test_tensors_of_other_shapes_than_a_layer_says(change) -> None:
    """PyTorch reads the tensors, not what the layer says of itself."""
    ours = ASPP(CHANNELS, RATES, WIDTH).eval().requires_grad_(False)
    change(ours)
    errors = []
    for run in (ours, functools.partial(LayeredASPP.forward, ours)):
        with pytest.raises(RuntimeError) as error:
            run(features().float())
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    assert reasons(ours)[0] is not None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: vars(m.convs[1][0]).update(dilation=3, padding=3),
        lambda m: vars(m.convs[1][0]).update(kernel_size=3),
        lambda m: vars(m.convs[1][0]).update(dilation=(3,), padding=(3,)),
        lambda m: vars(m.convs[1][0]).update(kernel_size=()),
        lambda m: vars(m).update(read=True, compute=nn.Identity()),
        lambda m: delattr(m.convs[1][0], "out_channels"),
        lambda m: vars(m).update(project=lambda y: 2 * y),
        lambda m: setattr(m.convs[0][1], "running_mean", m.convs[0][1].running_mean[:1].expand(8)),
    ],
    ids=["ints", "an int", "one", "none", "names of ours", "less", "in front", "expanded"],
)
def test_what_pytorch_reads_otherwise(pair: Pair, change) -> None:
    original, ours = (m.eval() for m in pair.build())
    if isinstance(ours.convs[1][0], nn.Sequential):
        pytest.skip("has no dense convolution there")
    for module in (original, ours):
        change(module)
    with torch.no_grad():
        torch.testing.assert_close(ours(features()), original(features()), **TIGHT)
    assert len(reasons(ours)) == 1


def test_a_list_without_branches() -> None:
    ours = ASPP(CHANNELS, RATES, WIDTH).eval()
    ours.convs = nn.ModuleList()
    assert reasons(ours)[0] is not None


def test_a_batch_of_one_that_somebody_allows(monkeypatch) -> None:
    """A known way around PyTorch's refusal to train a norm on one value."""
    original, ours = PAIRS["fused torchvision"].build()
    monkeypatch.setattr(F, "_verify_batch_size", lambda size: None)
    torch.manual_seed(0)
    expected = original(features(1))
    torch.manual_seed(0)
    torch.testing.assert_close(ours(features(1)), expected, **TIGHT)


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_weights_of_other_layouts_are_refused_by_the_layers(layout) -> None:
    ours = ASPP(CHANNELS, RATES, WIDTH).eval().requires_grad_(False)
    ours(features().float())
    weight = ours.convs[0][0].weight
    weight = weight.to_sparse() if layout == "sparse" else weight.to_mkldnn()
    del ours.convs[0][0].weight
    ours.convs[0][0].weight = weight
    said = []
    for run in (ours, functools.partial(LayeredASPP.forward, ours)):
        with pytest.raises(Exception) as error:
            run(features().float())
        said.append(str(error.value).splitlines()[0])
    assert said[0] == said[1]


def compiled(module: nn.Module) -> Callable[[], Tensor]:
    run = torch.compile(module.eval(), backend="eager", fullgraph=True)
    return torch.no_grad()(lambda: run(features()))


def test_what_was_replaced_is_compiled_too(fresh_compiler) -> None:
    ours = ASPP(CHANNELS, RATES, WIDTH).double()
    panorama(ours.convs[1][0])
    got = compiled(ours)()
    torch.testing.assert_close(got, LayeredASPP.forward(ours, features()), **TIGHT)


def check_after_compiling(name: str, part: str) -> None:
    find, change = PARTS[part]
    original, ours = PAIRS[name].build()
    run = compiled(ours)
    before = run()
    for module in (original.eval(), ours):
        change(find(module))
    expected = original(features())
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(run(), expected, **TIGHT)


SEEN = [part for part in PARTS if "_compiled" not in part]  # which PyTorch's compiler passes by


@pytest.mark.parametrize("part", SEEN)
def test_a_method_replaced_after_compiling(part: str, fresh_compiler) -> None:
    check_after_compiling("fused torchvision", part)


@pytest.mark.parametrize("name", PAIRS)
def test_a_convolution_replaced_after_compiling(name: str, fresh_compiler) -> None:
    check_after_compiling(name, "_conv_forward of an atrous convolution")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.ReLU, "forward"),
        (nn.Conv2d, "__call__"),
        (LayeredASPP, "forward"),
        (F, "conv2d"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_replaced_for_all_after_compiling(owner, name, fresh_compiler, monkeypatch) -> None:
    ours = randomise(ASPP(CHANNELS, RATES, WIDTH)).double()
    run = compiled(ours)
    before = run()
    monkeypatch.setattr(owner, name, doubled(getattr(owner, name)))
    expected = LayeredASPP.forward(ours, features())
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(run(), expected, **TIGHT)
