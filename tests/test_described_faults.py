# SPDX-License-Identifier: BSD-3-Clause
"""What a module that was fused by its structure may hide, and a model that cannot be read."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_described import agree, features
from torch import Tensor, nn

from aspp_ext.fuse import fuse, fuse_report


class Norm(nn.GroupNorm):
    """Under a name of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(2, channels)


class Plain(nn.Module):
    """With places for what may come later."""

    doubled = False

    def __init__(self, rates: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=r, dilation=r), Norm(8), nn.Dropout(0.5))
            for r in rates
        )
        self.mix = nn.Conv2d(8 * len(rates), 8, 1)
        self.last = nn.ReLU()
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)
        self.register_parameter("scale", None)
        self.register_module("extra", None)

    def join(self, ys: list[Tensor]) -> Tensor:
        return torch.cat(ys, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.mix(self.join([branch(x) for branch in self.branches])))
        y = y if self.scale is None else y * self.scale
        y = y if self.extra is None else self.extra(y)
        y = y if self.last is None else self.last(y)
        return 2 * y if self.doubled else y


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    original = Plain().double()
    return original, fuse(copy.deepcopy(original))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a class's default": lambda m: setattr(m, "doubled", True),
    "a parameter that was None": lambda m: setattr(
        m, "scale", nn.Parameter(torch.full((8, 1, 1), 3.0).double())
    ),
    "a module that was None": lambda m: setattr(m, "extra", nn.Tanh()),
    "a module that is None": lambda m: setattr(m, "last", None),
    "a function": lambda m: setattr(m, "act", functools.partial(F.leaky_relu, negative_slope=0.5)),
    "a norm's eps": lambda m: setattr(m.branches[1][1], "eps", 1.0),
    "in place": lambda m: setattr(m.last, "inplace", True),
    "a dropout's mode": lambda m: m.branches[1][2].train(),
    "a method": lambda m: setattr(m, "join", lambda ys: 3 * torch.cat(ys, 1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes(pair, change: str) -> None:
    original, ours = pair
    agree(original, ours)
    for module in pair:
        CHANGES[change](module.eval())
    x = features()
    torch.manual_seed(0)
    expected = original(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours(x), expected, rtol=1e-9, atol=1e-10)


def test_a_class_s_value_changes(pair, monkeypatch) -> None:
    monkeypatch.setattr(Plain, "doubled", True)
    agree(*pair)


def test_a_patch_that_is_taken_back(pair, monkeypatch) -> None:
    original, ours = pair
    with monkeypatch.context() as patch:
        patch.setattr(Plain, "forward", lambda self, x: x)
        agree(original, ours)
        assert fuse_report(ours)[0].reason is not None
    agree(original, ours)
    assert fuse_report(ours)[0].reason is None


def test_an_export_leaves_it_fused(pair) -> None:
    _, ours = pair
    with torch.no_grad():
        graph = torch.export.export(ours.eval(), (features(),)).graph
    assert any("aspp_ext" in str(node.target) for node in graph.nodes)
    assert fuse_report(ours)[0].reason is None


def test_models_with_parts_that_cannot_be_read() -> None:
    model = nn.Sequential(Plain(), nn.Flatten(), nn.LazyLinear(3))
    assert [e.reason for e in fuse_report(fuse(model))] == [None]

    class Masked(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    assert [e.reason for e in fuse_report(fuse(Masked()))] == [None]

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3)

        def __deepcopy__(self, memo: object) -> nn.Module:
            return self

    module = Plain()
    module.teacher = Shared().eval()
    kept = module.teacher.net.weight.clone()
    with pytest.warns(UserWarning, match="does not let itself be copied"):
        fuse(module)
    assert torch.equal(module.teacher.net.weight, kept)
    assert not module.teacher.training

    scripted = nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU())))
    assert fuse(scripted, strict=False) is scripted


class Named(Plain):
    """Names that a fused class might have wanted."""

    def __init__(self) -> None:
        super().__init__()
        self._cache, self._way, self.original = {}, 3, "a word"

    def read(self) -> str:
        return "read"

    def describe(self) -> str:
        return f"{self.read()}, {self.compute()}"

    def compute(self) -> str:
        return self.original


def test_a_module_keeps_its_names() -> None:
    fused = fuse(Named())
    assert [e.reason for e in fuse_report(fused)] == [None]
    assert fused.describe() == "read, a word"
    assert copy.deepcopy(fused).describe() == "read, a word"


def test_names_of_the_fused_classes_own() -> None:
    class Settled(Plain):
        def drop_folded(self) -> None:
            pass

    class Original(Plain):
        original = 3

    for kind, name in ((Settled, "drop_folded"), (Original, "original")):
        with pytest.warns(UserWarning, match=f"its {name} has the name"):
            fuse(kind())


def test_example_inputs_of_one_image_and_of_the_model_s_dtype() -> None:
    for module, x in ((Plain(), torch.randn(1, 16, 9, 9)), (Plain().double(), features(1))):
        assert [e.reason for e in fuse_report(fuse(module, example_inputs=(x,)))] == [None]
    ours = fuse(Plain())
    ours.doubled = True
    with pytest.raises(TypeError, match="example_inputs must be a tuple"):
        fuse(ours, example_inputs=[features()])
    with pytest.raises(ValueError, match="does not run on example_inputs"):
        fuse(ours, example_inputs=(torch.randn(1, 3, 9, 9),))
    assert fuse_report(ours)[0].fused


def test_of_two_alike_one_has_a_hook() -> None:
    model = nn.ModuleList([Plain(), Plain()])
    model[1].branches[0].register_forward_hook(print)
    with pytest.warns(UserWarning, match="1: branches.0 has a hook"):
        fuse(model)
    assert [e.fused for e in fuse_report(model)] == [True, False]


def test_fusing_draws_nothing(pair) -> None:
    import random

    before = torch.get_rng_state(), random.getstate()
    fuse(Plain().eval())
    fresh = torch.get_rng_state(), random.getstate()
    assert fresh[1] == before[1]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    fuse_report(pair[0])
    assert torch.equal(torch.get_rng_state(), state)


class Scaled(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.share if hasattr(self, "share") else y


@pytest.mark.parametrize(
    "add",
    [
        lambda m: m.register_buffer("share", torch.tensor(3.0).double()),
        lambda m: m.register_parameter("share", nn.Parameter(torch.tensor(3.0).double())),
    ],
    ids=["buffer", "parameter"],
)
def test_a_tensor_that_comes_later(add: Callable[[nn.Module], None]) -> None:
    ours = fuse(Scaled().double().eval())
    x = features()
    before = ours(x)
    add(ours)
    torch.testing.assert_close(ours(x), 3 * before)
    assert fuse_report(ours)[0].reason is not None


def test_a_forward_that_decides_by_the_memory_format() -> None:
    class ByFormat(Plain):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return 2 * y if x.is_contiguous(memory_format=torch.channels_last) else y

    with pytest.warns(UserWarning, match="gives another result 0 in eval mode"):
        fuse(ByFormat())
