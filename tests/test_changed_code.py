# SPDX-License-Identifier: BSD-3-Clause
"""Whoever replaces what a layer's code is, or what it calls, gets what they wrote, however well it
passes for the author's: a function of PyTorch's own, one in the same module, code in place."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aspp_pairs import PAIRS, TIGHT, Pair, features, torchvision
from torch import Tensor, nn

from aspp_ext.fuse import fuse, fuse_report
from aspp_ext.modules import untouched

Change = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


def without_dropout(pair: Pair) -> tuple[nn.Module, nn.Module]:
    original, ours = pair.build()
    original.project[3].p = ours.project[3].p = 0
    return original, ours


class Twice:
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class TwiceCalled:
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(*args, **kwargs)


def sigmoid(self: nn.Module, input: Tensor) -> Tensor:
    return input.sigmoid()


def sigmoid_of(input: Tensor, inplace: bool = False) -> Tensor:
    return input.sigmoid()


def doubled(self: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rest = (self.stride, self.padding, self.dilation, self.groups)
    return 2 * torch.conv2d(input, weight, bias, *rest)


def largest(x: Tensor, size: Any) -> Tensor:
    return x.amax((2, 3), keepdim=True)


def found(module: nn.Module, name: str) -> Any:
    if name == "forward":
        return lambda x: x.sigmoid()
    return object.__getattribute__(module, name)


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """monkeypatch does not know how to give a class its bases back."""
    added = isinstance(owner, type) and name not in ("__bases__", *vars(owner))
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if added:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def function(owner: Any, name: str, value: Any) -> Change:
    return lambda: put(owner, name, value)


def code(of: Any, value: Any) -> Change:
    return lambda: put(of, "__code__", value.__code__)


def base(kind: type, value: type) -> Change:
    return lambda: put(kind, "__bases__", (value, *kind.__bases__))


def anew(kind: type, name: str, text: str) -> Change:
    """As a reloader or a notebook defines it: in the module of its class."""
    made: dict[str, Any] = {}
    exec(text, vars(importlib.import_module(kind.__module__)), made)
    return lambda: put(kind, name, made[name])


def reloaded(kind: type, name: str, text: str) -> Callable[..., Tensor]:
    """From the file that the class is from, which has changed since."""
    home, made = importlib.import_module(kind.__module__), {}
    exec(compile(text, str(home.__file__), "exec"), vars(home), made)
    return made[name]


OTHER = "def forward(self, input):\n    return input.sigmoid()"
CHANGES: dict[str, Change] = {
    "another of PyTorch's functions": function(F, "relu", F.silu),
    "another of its builtins": function(torch, "relu", torch.sigmoid),
    "a builtin below": function(torch._C._nn, "adaptive_avg_pool2d", largest),
    "a base of the norms": base(nn.BatchNorm2d, Twice),
    "a base of the convolutions": base(nn.Conv2d, TwiceCalled),
    "a base of ReLU": base(nn.ReLU, TwiceCalled),
    "code of a method": code(nn.ReLU.forward, sigmoid),
    "code of a function": code(F.relu, sigmoid_of),
    "code of another function": code(F.relu, F.silu),
    "code of _conv_forward": code(nn.Conv2d._conv_forward, doubled),
    "a method of the same name": anew(nn.ReLU, "forward", OTHER),
    "torch of the functions": function(
        F, "torch", types.SimpleNamespace(**{**vars(torch), "relu": torch.sigmoid})
    ),
    "attributes": function(nn.ReLU, "__getattribute__", found),
    "torch of the norms": function(
        nn.modules.batchnorm, "torch", types.SimpleNamespace(**vars(torch))
    ),
}
OF_TORCHVISION: dict[str, Change] = {
    "a base of a branch": base(torchvision.ASPPConv, Twice),
    "a method of the pooled branch": anew(
        torchvision.ASPPPooling,
        "forward",
        "def forward(self, x):\n"
        "    y = torch.nn.Sequential.forward(self, x)\n"
        "    return 2 * F.interpolate(y, size=x.shape[-2:], mode='bilinear')",
    ),
    "torch of the pyramid": function(
        torchvision, "torch", types.SimpleNamespace(cat=lambda t, dim: 2 * torch.cat(t, dim))
    ),
}
SAME = ("torch of the norms",)  # the numbers are


def check(pair: Pair, name: str, change: Change) -> None:
    original, ours = without_dropout(pair)
    state = copy.deepcopy(original.state_dict())
    for training in (True, False):
        with torch.set_grad_enabled(training):
            for module in (original, ours):
                module.load_state_dict(state)
                module.train(training)
            before = ours(features())
            ours.load_state_dict(state)
            with change():
                expected, got = original(features()), ours(features())
                (entry,) = fuse_report(ours)
            torch.testing.assert_close(got, expected, **TIGHT)
            assert name in SAME or not torch.allclose(expected, before)
            assert str(entry.reason).endswith(" is replaced")
    assert fuse_report(ours)[0].reason is None


@pytest.mark.parametrize("name", CHANGES)
def test_what_passes_for_the_author_s(pair: Pair, name: str) -> None:
    check(pair, name, CHANGES[name])


@pytest.mark.parametrize("name", OF_TORCHVISION)
def test_what_passes_for_torchvision_s(name: str) -> None:
    check(PAIRS["fused torchvision"], name, OF_TORCHVISION[name])


@pytest.mark.parametrize("way", ["code", "function"])
def test_a_method_reloaded_after_the_first_call(pair: Pair, way: str) -> None:
    new = reloaded(nn.ReLU, "forward", OTHER)
    change = code(nn.ReLU.forward, new) if way == "code" else function(nn.ReLU, "forward", new)
    check(pair, way, change)


@pytest.mark.parametrize(
    ("module", "name"), [(F, "conv2d"), (torch, "relu"), (torch._C._nn, "adaptive_avg_pool2d")]
)
def test_a_builtin_of_somebody_else_s(module: Any, name: str, monkeypatch) -> None:
    original, _ = without_dropout(PAIRS["fused torchvision"])
    monkeypatch.setattr(untouched, "_known", {})
    monkeypatch.setattr(module, name, math.exp)
    with pytest.warns(UserWarning, match=f"{name} is replaced"):
        fuse(original)


@pytest.mark.parametrize("name", {**CHANGES, **OF_TORCHVISION})
def test_before_fusing(name: str, monkeypatch) -> None:
    """Nothing having been looked at before: left alone, or read with what is there."""
    original, _ = without_dropout(PAIRS["fused torchvision"])
    monkeypatch.setattr(untouched, "_known", {})
    with {**CHANGES, **OF_TORCHVISION}[name](), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = fuse(copy.deepcopy(original))
        if type(ours) is torchvision.ASPP:
            assert any("left these modules as they were" in str(w.message) for w in said)
        else:
            assert fuse_report(ours)[0].recognised == "structure"
            torch.testing.assert_close(ours(features()), original(features()), **TIGHT)
    assert type(fuse(original)) is not torchvision.ASPP


def test_a_function_replaced_by_another_after_compiling(fresh_compiler, monkeypatch) -> None:
    original, ours = (m.eval() for m in without_dropout(PAIRS["fused torchvision"]))
    run = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        run(features())
        monkeypatch.setattr(F, "relu", F.silu)
        torch.testing.assert_close(run(features()), original(features()), **TIGHT)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.Conv2d])
def test_a_call_without_gradients(pair: Pair, kind: type, monkeypatch) -> None:
    """PyTorch's own decorators are no authors."""
    monkeypatch.setattr(kind, "__call__", torch.no_grad()(kind.__call__), raising=False)
    reached = []
    for module in without_dropout(pair):
        y = module(features())
        if y.requires_grad:
            y.sum().backward()
        reached.append([p.grad is not None for p in module.parameters()])
    assert reached[0] == reached[1]
    assert not all(reached[0])


def test_a_call_under_autocast(pair: Pair, monkeypatch) -> None:
    autocast = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(nn.Conv2d, "__call__", autocast(nn.Conv2d.__call__), raising=False)
    original, ours = (m.float() for m in without_dropout(pair))
    expected, got = (m(features().float()) for m in (original, ours))
    assert expected.dtype == got.dtype == torch.bfloat16
    assert torch.equal(got, expected)
