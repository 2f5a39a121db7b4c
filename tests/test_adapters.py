# SPDX-License-Identifier: BSD-3-Clause
"""Classes that are made known by name: by anybody's call, and by packages' entry points."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aspp_pairs import TIGHT, assert_all_close, randomise, train_step
from torch import Tensor, nn

from aspp_ext.fuse import adapters, fuse, fuse_report, register_adapter, unfuse
from aspp_ext.modules import parts
from aspp_ext.modules.fused import FusedForward
from aspp_ext.modules.head import Branch, Head, Pool

CHANNELS, WIDTH = 8, 4
HERE = __name__


@pytest.fixture(autouse=True)
def only_here(monkeypatch) -> Iterator[None]:
    """What is registered, and which entry points were loaded, is forgotten again."""
    known, loaded = dict(adapters.ADAPTERS), set(adapters._loaded)
    yield
    adapters.ADAPTERS.clear()
    adapters.ADAPTERS.update(known)
    adapters._loaded.clear()
    adapters._loaded.update(loaded)


def branch(rate: int) -> nn.Sequential:
    conv = nn.Conv2d(CHANNELS, WIDTH, 3, padding=rate, dilation=rate, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU())


class OfList(nn.Module):
    """Reads the last of two maps and joins the first."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branch(rate) for rate in (1, 2, 3))
        self.project = nn.Conv2d(3 * WIDTH, WIDTH, 1)
        self.classify = nn.Conv2d(WIDTH + 2, 3, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        low, high = maps
        y = self.project(torch.cat([b(high) for b in self.branches], 1))
        y = F.interpolate(y, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.classify(torch.cat([y, low], 1))


def two_maps(module: nn.Module) -> tuple[list[Tensor]]:
    return ([torch.empty(2, 2, 16, 24), torch.empty(2, CHANNELS, 8, 12)],)


class Window(nn.Module):
    """Its image pooling is a window of the map's size: of that no structure is read."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branch(rate) for rate in (1, 2, 3))
        self.pooled = nn.Conv2d(CHANNELS, WIDTH, 1)
        self.project = nn.Conv2d(4 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        spread = F.interpolate(self.pooled(F.avg_pool2d(x, size)), size, mode="nearest")
        return self.project(torch.cat([*(b(x) for b in self.branches), spread], 1))


class FusedWindow(FusedForward, Window):
    original = Window

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        parts.check_calls()
        parts.check_classes(*parts.LAYERS)
        blocks, pooled, project = parts.children(module, "", ("branches", "pooled", "project"))
        branches = []
        for i, block in enumerate(parts.part(blocks, "branches", nn.ModuleList).children()):
            at = f"branches.{i}"
            conv, norm, relu = parts.children(parts.part(block, at, nn.Sequential), at, 3)
            conv = parts.dense_conv(conv, f"{at}.0")
            norm = parts.batch_norm(norm, f"{at}.1", conv)
            relu = parts.part(relu, f"{at}.2", nn.ReLU)
            branches.append(Branch(None, (), conv, (norm, relu)))
        pool = Pool(parts.pointwise(pooled, "pooled"), (), len(branches))
        projection = parts.pointwise(project, "project")
        head = Head(tuple(branches), pool, "cat", (), projection, ())
        parts.check_channels(head)
        return head


def check(make: Callable[[], nn.Module], arguments: Callable[[], Any]) -> nn.Module:
    """Fused without a warning, and right in training and in eval mode; the fused module."""
    original = randomise(make()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fuse(copy.deepcopy(original))
    given = arguments()
    for training in (True, False):
        results = []
        for module in (original, ours):
            module.train(training).zero_grad()
            with torch.set_grad_enabled(training):
                y = module(given)
                if training:
                    y.square().sum().backward()
            found = {"result": y.detach()} | dict(module.named_buffers())
            if training:
                found |= {n: p.grad for n, p in module.named_parameters()}
            results.append({name: value.clone() for name, value in found.items()})
        assert_all_close(results[1], results[0], **TIGHT)
    return ours


def listed() -> list[Tensor]:
    low = torch.randn(2, 2, 14, 18, dtype=torch.float64)
    return [low, torch.randn(2, CHANNELS, 7, 9, dtype=torch.float64)]


def one_map() -> Tensor:
    return torch.randn(2, CHANNELS, 7, 9, dtype=torch.float64)


def test_a_head_of_a_list_needs_example_inputs() -> None:
    """Nothing else says what it takes."""
    with pytest.warns(UserWarning, match="example_inputs may help"):
        fuse(OfList())


@pytest.mark.parametrize("source", [OfList, f"{HERE}:OfList"], ids=["class", "name"])
def test_example_inputs(source: Any) -> None:
    register_adapter(source, example_inputs=two_maps)
    ours = check(OfList, listed)
    (entry,) = fuse_report(ours)
    assert (entry.fused, entry.recognised, entry.reason) == (True, "structure", None)
    assert entry.left == "upsample_bilinear2d, cat, classify"
    assert type(unfuse(ours)) is OfList


def test_example_inputs_inside_a_model() -> None:
    register_adapter(OfList, example_inputs=two_maps)
    model = fuse(nn.ModuleDict({"head": OfList()}))
    assert [(e.name, e.fused) for e in fuse_report(model)] == [("head", True)]


def test_a_subclass_is_not_the_class_that_is_known() -> None:
    class Derived(OfList):
        pass

    register_adapter(OfList, example_inputs=two_maps)
    with pytest.warns(UserWarning, match="example_inputs may help"):
        fuse(Derived())


@pytest.mark.parametrize(
    ("source", "fused"),
    [(Window, FusedWindow), (f"{HERE}:Window", f"{HERE}:FusedWindow")],
    ids=["classes", "names"],
)
def test_a_fused_class(source: Any, fused: Any) -> None:
    (entry,) = fuse_report(Window())
    assert entry.recognised == "siblings"
    register_adapter(source, fused)
    ours = check(Window, one_map)
    assert type(ours) is FusedWindow
    (entry,) = fuse_report(ours)
    assert (entry.fused, entry.recognised, entry.reason) == (True, "name", None)
    assert type(unfuse(ours)) is Window


def test_what_a_fused_class_refuses_is_said() -> None:
    register_adapter(Window, FusedWindow)
    module = Window()
    module.branches[1][2] = nn.GELU()
    (entry,) = fuse_report(fuse(module))
    assert (type(module), entry.recognised) == (Window, "siblings")
    assert entry.left == "branches.1.2 is a GELU, not a ReLU"


def raising(module: nn.Module) -> Any:
    raise KeyError("high")


class Strange(FusedWindow):
    original = Window

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        return super().describe(module)._replace(join="concat")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"fused": f"{HERE}:Nothing"}, "the fused class of its adapter cannot be used: Attribute"),
        ({"fused": Strange}, "the fused class of its adapter cannot be used: KeyError: 'concat'"),
        ({"example_inputs": raising}, "the example_inputs of its adapter cannot be used: KeyError"),
        ({"example_inputs": lambda m: [one_map()]}, "it must give a tuple, it gave list"),
    ],
    ids=["no such class", "describes nonsense", "raises", "no tuple"],
)
def test_an_adapter_that_is_wrong_stops_nothing(given: dict[str, Any], reason: str) -> None:
    register_adapter(Window, **given)
    model = nn.ModuleList([Window(), OfOne()])
    with pytest.warns(UserWarning, match="0: the .* of its adapter cannot be used"):
        fuse(model)
    first, second = fuse_report(model)
    assert reason in first.reason
    assert second.fused


class OfOne(nn.Module):
    """Any that needs no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branch(rate) for rate in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([b(x) for b in self.branches], 1)


def test_the_last_one_said_counts() -> None:
    register_adapter(Window, example_inputs=lambda module: (one_map().float(),))
    register_adapter(Window, FusedWindow)
    assert type(fuse(Window())) is FusedWindow


def test_nothing_is_imported_before_it_is_met() -> None:
    register_adapter("no_such_package.of_anybody:Head", "no_such_package.of_ours:FusedHead")
    assert fuse_report(nn.Sequential(nn.Conv2d(1, 1, 1))) == []


class Other:
    pass


BAD: dict[str, tuple[type[Exception], tuple[Any, ...], dict[str, Any], str]] = {
    "source is a number": (
        *(TypeError, (3, FusedWindow), {}),
        "register_adapter: source must be a class of modules or its name, got 3",
    ),
    "source is no class of modules": (
        *(TypeError, (Other, FusedWindow), {}),
        "register_adapter: source must be a class of modules or its name, got ",
    ),
    "source is a module": (
        *(TypeError, (nn.ReLU(), FusedWindow), {}),
        "register_adapter: source must be a class of modules or its name, got ",
    ),
    "source has no colon": (
        *(ValueError, ("package.module.Head", FusedWindow), {}),
        "register_adapter: a name must be 'module:name', got 'package.module.Head'",
    ),
    "source has no name": (
        *(ValueError, ("package.module:", FusedWindow), {}),
        "register_adapter: a name must be 'module:name', got 'package.module:'",
    ),
    "fused is a number": (
        *(TypeError, (Window, 3), {}),
        "register_adapter: fused must be a subclass of FusedForward or its name, got 3",
    ),
    "fused is another class": (
        *(TypeError, (Window, Window), {}),
        "register_adapter: fused must be a subclass of FusedForward or its name, got ",
    ),
    "fused has no module": (
        *(ValueError, (Window, ":FusedHead"), {}),
        "register_adapter: a name must be 'module:name', got ':FusedHead'",
    ),
    "example_inputs are tensors": (
        *(TypeError, (Window,), {"example_inputs": (torch.ones(2),)}),
        "register_adapter: example_inputs must be a function, got ",
    ),
    "neither": (
        *(ValueError, (Window,), {}),
        "register_adapter: fused or example_inputs must be given, got neither",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    kind, arguments, keywords, sentence = BAD[case]
    known = dict(adapters.ADAPTERS)
    with pytest.raises(kind) as error:
        register_adapter(*arguments, **keywords)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)
    assert known == adapters.ADAPTERS


class Point:
    """An entry point, as importlib.metadata has them."""

    def __init__(self, value: str, load: Callable[[], Callable[[], None]]) -> None:
        self.value, self.load = value, load


def installed(monkeypatch, *points: Point) -> None:
    """As if packages with these entry points were."""
    real = importlib.metadata.entry_points

    def found(**chosen: Any) -> Any:
        return points if chosen == {"group": "aspp_ext.adapters"} else real(**chosen)

    monkeypatch.setattr(importlib.metadata, "entry_points", found)


def test_entry_points(monkeypatch) -> None:
    calls = []

    def register() -> None:
        calls.append(1)
        register_adapter(Window, FusedWindow)

    installed(monkeypatch, Point("package.adapters:register", lambda: register))
    assert type(fuse(Window())) is FusedWindow
    assert type(fuse(Window())) is FusedWindow
    assert len(calls) == 1


def test_an_entry_point_that_fails_is_told_of_once(monkeypatch) -> None:
    def absent() -> Any:
        raise ImportError("no module named package")

    def broken() -> None:
        raise RuntimeError("cannot register")

    installed(
        monkeypatch,
        Point("absent.adapters:register", absent),
        Point("broken.adapters:register", lambda: broken),
        Point("package.adapters:register", lambda: lambda: register_adapter(Window, FusedWindow)),
    )
    module = Window()
    with pytest.warns(UserWarning, match="could not be loaded") as caught:
        fuse(module)
    assert [str(w.message) for w in caught] == [
        "aspp_ext.fuse: the adapters of absent.adapters:register could not be loaded: "
        "no module named package",
        "aspp_ext.fuse: the adapters of broken.adapters:register could not be loaded: "
        "cannot register",
    ]
    assert type(module) is FusedWindow
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(Window())


def test_a_class_that_cannot_run_on_its_example_inputs_is_left_alone() -> None:
    register_adapter(OfList, example_inputs=lambda module: (torch.empty(2, 3, 8, 8),))
    with pytest.warns(UserWarning, match="example_inputs may help"):
        fuse(OfList())


def test_a_registered_class_without_a_pyramid() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(CHANNELS, WIDTH, 1)

        def forward(self, maps: list[Tensor]) -> Tensor:
            return self.conv(maps[0])

    register_adapter(Flat, example_inputs=lambda m: ([torch.empty(2, CHANNELS, 8, 8)],))
    with pytest.warns(UserWarning, match="nothing in it is a pyramid"):
        fuse(Flat())


def test_a_step_of_a_fused_class_trains_alike() -> None:
    register_adapter(Window, FusedWindow)
    original = randomise(Window()).double()
    ours = fuse(copy.deepcopy(original))
    x = one_map()
    assert_all_close(train_step(ours, x), train_step(original, x), **TIGHT)
