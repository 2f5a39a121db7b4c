# SPDX-License-Identifier: BSD-3-Clause
"""What a forward reads beside its tensors: a module that was fused computes by what it is now."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import fractions
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import constants_elsewhere as elsewhere
import numpy
import pytest
import torch
import torch.nn.functional as F
from constants_elsewhere import PARENT, Parent
from test_described import features
from torch import Tensor, nn

from aspp_ext.fuse import fuse, fuse_report


class Mode(enum.Enum):
    ONCE = 1
    TWICE = 2


@dataclasses.dataclass
class Inner:
    k: float = 2.0
    rates: list[int] = dataclasses.field(default_factory=lambda: [1, 2])

    def scaled(self, y: Tensor) -> Tensor:
        return y * self.k

    @property
    def computed(self) -> float:
        return self.k + self.rates[0]


class Degree(float):
    """A number of somebody's own."""


class Slotted:
    __slots__ = ("inner", "k")

    def __init__(self) -> None:
        self.k, self.inner = 2.0, Inner()


class Pair(collections.namedtuple("Pair", "k inner")):
    pass


CONFIG: dict[str, Any] = {"k": 2.0, "inner": Inner(), "scale": numpy.float64(2)}
NAMESPACE = types.SimpleNamespace(k=2.0, inner=types.SimpleNamespace(k=2.0))
K = 2.0


def shifted(y: Tensor) -> Tensor:
    return y + 1


BY_PARTIAL = functools.partial(torch.mul, other=2.0)


def closed_over(k: float, held: dict[str, float]) -> Callable[[Tensor], Tensor]:
    def inner(y: Tensor) -> Tensor:
        return y * k * held["k"]

    def change(value: float) -> None:
        nonlocal k
        k = value

    inner.change = change
    return inner


HELD = {"k": 2.0}
CLOSED = closed_over(2.0, HELD)


def with_defaults(
    y: Tensor, k: float = 2.0, *, other: float = 1.0, held: Any = ({"k": 1.0},)
) -> Tensor:
    return y * k * other * held[0]["k"]


def deep(y: Tensor) -> Tensor:
    return deeper(y) * K


def deeper(y: Tensor) -> Tensor:
    return elsewhere.by_global(y)


class Base(nn.Module):
    """A pyramid; ``last`` reads what a case is about."""

    from_elsewhere = NAMESPACE.inner

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(16, 4, 3, padding=r, dilation=r) for r in (1, 2, 3))
        self.mix = nn.Conv2d(12, 4, 1)
        self.bn, self.act, self.drop = nn.BatchNorm2d(4), nn.LeakyReLU(0.25), nn.Dropout(0.5)
        self.cfg = types.SimpleNamespace(model=Inner(), extra={"k": [Inner()]})
        self.slotted, self.pair = Slotted(), Pair(2.0, Inner())
        self.number, self.fraction = numpy.float64(2), fractions.Fraction(1, 2)
        self.mode, self.size, self.chosen = Mode.ONCE, torch.Size([2, 3]), {1, 2}
        self.range, self.array = range(3), numpy.array([2.0])
        self.object_, self.parents, self.idle = self.cfg, [Parent()], [nn.Dropout()]
        self.queue, self.degree = collections.deque([2.0]), Degree(2)
        self.functions = types.SimpleNamespace(act=F.relu, size=self.pair.count, own=shifted)
        self.functions.bound = self.cfg.model.scaled

    @property
    def by_property(self) -> float:
        return NAMESPACE.k

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(torch.cat([b(x) for b in self.branches], 1)))


def norm_by_function(self: Any, y: Tensor) -> Tensor:
    bn = self.bn
    mean, var = bn.running_mean, bn.running_var
    return F.batch_norm(self.bn(y), mean, var, bn.weight, bn.bias, False, bn.momentum, bn.eps)


def set_(owner: Any, name: str, value: Any) -> Callable[[Any], None]:
    """Of the module's own, ``owner`` is a path from it."""

    def change(module: nn.Module) -> None:
        found = functools.reduce(getattr, owner.split("."), module) if owner else module
        object.__setattr__(found, name, value)

    return change


LAST = Callable[[Any, Tensor], Tensor]
# What the forward does, what happens to the instance, and what is said of it.
OWN: dict[str, tuple[LAST, Callable[[Any], object], str]] = {
    "nested": (lambda s, y: y * s.cfg.model.k, set_("cfg.model", "k", 3.0), "cfg.model.k"),
    "in a dict": (
        lambda s, y: y * s.cfg.extra["k"][0].k,
        lambda m: setattr(m.cfg.extra["k"][0], "k", 3.0),
        "cfg.extra['k'][0].k",
    ),
    "in a list": (
        lambda s, y: y * s.cfg.model.computed,
        lambda m: m.cfg.model.rates.__setitem__(0, 7),
        "cfg.model.rates[0]",
    ),
    "a parent's": (
        lambda s, y: y * s.parents[0].k,
        lambda m: setattr(m.parents[0], "k", 3.0),
        "parents[0].k",
    ),
    "mode of what is no part": (
        lambda s, y: y * 2 if s.idle[0].training else y,
        lambda m: m.idle[0].eval(),
        "idle[0].training",
    ),
    "slots": (lambda s, y: y * s.slotted.k, set_("slotted", "k", 3.0), "slotted.k"),
    "behind slots": (
        lambda s, y: y * s.slotted.inner.k,
        set_("slotted.inner", "k", 3.0),
        "slotted.inner.k",
    ),
    "namedtuple": (
        lambda s, y: y * s.pair.k,
        lambda m: setattr(m, "pair", m.pair._replace(k=3.0)),
        "pair[0]",
    ),
    "numpy's": (lambda s, y: y * s.number, set_("", "number", numpy.float64(3)), "number"),
    "fraction": (
        lambda s, y: y * float(s.fraction),
        set_("", "fraction", fractions.Fraction(1, 3)),
        "fraction",
    ),
    "number of its own": (
        lambda s, y: y * s.degree,
        set_("", "degree", Degree(3)),
        "degree",
    ),
    "function": (
        lambda s, y: s.functions.own(y),
        set_("functions", "own", F.relu),
        "functions.own",
    ),
    "method's object": (
        lambda s, y: s.functions.bound(y),
        set_("cfg.model", "k", 3.0),
        "cfg.model.k",
    ),
    "enum": (lambda s, y: y * s.mode.value, set_("", "mode", Mode.TWICE), "mode"),
    "size": (lambda s, y: y * s.size[0], set_("", "size", torch.Size([3, 3])), "size"),
    "set": (lambda s, y: y * len(s.chosen), lambda m: m.chosen.add(3), "chosen"),
    "range": (lambda s, y: y * len(s.range), set_("", "range", range(4)), "range"),
    "array": (lambda s, y: y * float(s.array[0]), lambda m: m.array.fill(3), "array"),
    "deque": (lambda s, y: y * s.queue[0], lambda m: m.queue.appendleft(3.0), "queue"),
    "a zero's sign": (
        lambda s, y: y * (1.0 if str(getattr(s, "zero", 0.0)) == "0.0" else 2.0),
        set_("", "zero", -0.0),
        "zero",
    ),
    "set later": (lambda s, y: y * getattr(s, "late", 1.0), set_("", "late", 3.0), "late"),
    "set later on a layer": (
        lambda s, y: 2 * y if hasattr(s.mix, "late") else y,
        set_("mix", "late", True),
        "late of mix",
    ),
    "set later in an object": (
        lambda s, y: y * getattr(s.cfg.model, "late", 1.0),
        set_("cfg.model", "late", 3.0),
        "cfg.model",
    ),
    "a norm's eps": (norm_by_function, set_("bn", "eps", 1.0), "eps of bn"),
    "a slope": (
        lambda s, y: F.leaky_relu(s.act(y), s.act.negative_slope),
        set_("act", "negative_slope", 0.9),
        "negative_slope of act",
    ),
    "a momentum": (
        lambda s, y: s.bn(y) * s.bn.momentum,
        set_("bn", "momentum", 0.5),
        "momentum of bn",
    ),
    "a class's object": (
        lambda s, y: y * s.from_elsewhere.k,
        set_("", "from_elsewhere", Inner(3.0)),
        "from_elsewhere",
    ),
}


def twins(last: LAST) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    kind = type("Case", (Base,), {"last": last, "__module__": __name__})
    original = kind().double().eval()
    ours = fuse(copy.deepcopy(original))
    assert [e.reason for e in fuse_report(ours)] == [None]
    return original, ours


def agree(original: nn.Module, ours: nn.Module) -> Tensor:
    x = features()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected := original(x), rtol=1e-9, atol=1e-10)
    return expected


def same_after_all(ours: nn.Module) -> None:
    """Copies and conversions leave it fused."""
    ours.train().eval().float().double()
    ours.load_state_dict(ours.state_dict())
    for module in (copy.deepcopy(ours), ours):
        assert [e.reason for e in fuse_report(module)] == [None]


def fused_again(original: nn.Module, ours: nn.Module, said: str) -> None:
    (entry,) = fuse_report(ours)
    assert said in entry.reason, entry.reason
    assert "has changed: fuse it again" in entry.reason
    fuse(ours)
    assert [e.reason for e in fuse_report(ours)] == [None]
    agree(original, ours)


@pytest.mark.parametrize("case", OWN)
def test_what_an_instance_holds(case: str) -> None:
    last, change, said = OWN[case]
    original, ours = twins(last)
    x = features()
    before = original(x)
    agree(original, ours)
    same_after_all(ours)
    for module in (original, ours):
        change(module)
    assert not torch.allclose(original(x), before, rtol=1e-6)
    agree(original, ours)
    fused_again(original, ours, said)


def test_what_is_deleted() -> None:
    original, ours = twins(lambda s, y: y * getattr(s, "number", 1.0))
    for module in (original, ours):
        del module.number
    agree(original, ours)
    fused_again(original, ours, "number")


Patch = pytest.MonkeyPatch
# The same of what is one for all.
SHARED: dict[str, tuple[LAST, Callable[[Patch], object], str]] = {
    "global": (lambda s, y: y * K, lambda p: p.setitem(globals(), "K", 3.0), "K"),
    "dict": (lambda s, y: y * CONFIG["k"], lambda p: p.setitem(CONFIG, "k", 3.0), "CONFIG['k']"),
    "numpy's in a dict": (
        lambda s, y: y * float(CONFIG["scale"]),
        lambda p: p.setitem(CONFIG, "scale", numpy.float64(3)),
        "CONFIG['scale']",
    ),
    "object in a dict": (
        lambda s, y: y * CONFIG["inner"].k,
        lambda p: p.setattr(CONFIG["inner"], "k", 3.0),
        "CONFIG['inner'].k",
    ),
    "object": (
        lambda s, y: y * NAMESPACE.inner.k,
        lambda p: p.setattr(NAMESPACE.inner, "k", 3.0),
        "NAMESPACE.inner.k",
    ),
    "property": (
        lambda s, y: y * s.by_property,
        lambda p: p.setattr(NAMESPACE, "k", 3.0),
        "NAMESPACE.k",
    ),
    "class's object": (
        lambda s, y: y * s.from_elsewhere.k,
        lambda p: p.setattr(NAMESPACE.inner, "k", 3.0),
        "Base.from_elsewhere.k",
    ),
    "class's new": (
        lambda s, y: y * getattr(s, "new", 1.0),
        lambda p: p.setattr(Base, "new", 3.0, raising=False),
        "Base.new",
    ),
    "partial": (
        lambda s, y: BY_PARTIAL(y),
        lambda p: p.setitem(BY_PARTIAL.keywords, "other", 3.0),
        "BY_PARTIAL.keywords['other']",
    ),
    "closure": (lambda s, y: CLOSED(y), lambda p: CLOSED.change(3.0), "k of closed_over"),
    "in a closure": (lambda s, y: CLOSED(y), lambda p: p.setitem(HELD, "k", 3.0), "held of closed"),
    "default": (
        lambda s, y: with_defaults(y),
        lambda p: p.setattr(with_defaults, "__defaults__", (3.0,)),
        "a default of with_defaults",
    ),
    "keyword's default": (
        lambda s, y: with_defaults(y),
        lambda p: p.setitem(with_defaults.__kwdefaults__, "other", 3.0),
        "a default of with_defaults",
    ),
    "in a default": (
        lambda s, y: with_defaults(y),
        lambda p: p.setitem(with_defaults.__kwdefaults__["held"][0], "k", 3.0),
        "a default of with_defaults",
    ),
    "helper's global": (lambda s, y: deep(y), lambda p: p.setitem(globals(), "K", 3.0), "K"),
    "another module's": (lambda s, y: deep(y), lambda p: p.setattr(elsewhere, "K", 3.0), "K"),
    "another module's object": (
        lambda s, y: elsewhere.by_object(y),
        lambda p: p.setattr(elsewhere.CONFIG, "k", 3.0),
        "CONFIG.k",
    ),
    "by its module": (
        lambda s, y: y * elsewhere.K,
        lambda p: p.setattr(elsewhere, "K", 3.0),
        "elsewhere.K",
    ),
    "imported in it": (
        lambda s, y: elsewhere.importing(y),
        lambda p: p.setattr(elsewhere.other(), "K", 3.0),
        "constants_imported.K",
    ),
    "static method": (
        lambda s, y: elsewhere.Static.scaled(y),
        lambda p: p.setattr(elsewhere, "K", 3.0),
        "K",
    ),
    "cached": (
        lambda s, y: y * elsewhere.cached()["k"],
        lambda p: p.setitem(elsewhere.KEPT, "k", 3.0),
        "KEPT['k']",
    ),
    "a module's": (
        lambda s, y: y * PARENT.k,
        lambda p: p.setattr(PARENT, "k", 3.0),
        "PARENT.k",
    ),
    "function of PyTorch's": (
        lambda s, y: F.gelu(y),
        lambda p: p.setattr(F, "gelu", torch.tanh),
        "gelu",
    ),
    "torch's own": (
        lambda s, y: torch.sigmoid(y),
        lambda p: p.setattr(torch, "sigmoid", torch.tanh),
        "sigmoid",
    ),
    "method of a tensor": (
        lambda s, y: y.sigmoid(),
        lambda p: p.setattr(Tensor, "sigmoid", Tensor.tanh),
        "Tensor.sigmoid",
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_what_is_one_for_all(case: str, monkeypatch: Patch) -> None:
    last, change, said = SHARED[case]
    original, ours = twins(last)
    x = features()
    before = original(x)
    same_after_all(ours)
    with monkeypatch.context() as patch:
        change(patch)
        assert not torch.allclose(original(x), before, rtol=1e-6)
        agree(original, ours)
        fused_again(original, ours, said)
    CLOSED.change(2.0)
    agree(original, ours)


def test_a_default_of_forward(monkeypatch: Patch) -> None:
    class Scaled(Base):
        def forward(self, x: Tensor, k: float = 2.0) -> Tensor:
            return self.mix(torch.cat([b(x) for b in self.branches], 1)) * k

    original = Scaled().double().eval()
    ours = fuse(copy.deepcopy(original))
    agree(original, ours)
    monkeypatch.setattr(Scaled.forward, "__defaults__", (3.0,))
    agree(original, ours)
    fused_again(original, ours, "a default of")


class Pickled(Base):
    def last(self, y: Tensor) -> Tensor:
        return y * self.cfg.model.k * self.slotted.k * self.number * CONFIG["k"] * self.pair.inner.k


def test_pickles_know_what_they_held() -> None:
    original = Pickled().double().eval()
    ours = pickle.loads(pickle.dumps(fuse(copy.deepcopy(original))))
    assert [e.reason for e in fuse_report(ours)] == [None]
    for module in (original, ours):
        module.slotted.k = 3.0
    agree(original, ours)
    fused_again(original, ours, "slotted.k")


def test_what_no_forward_names_may_change() -> None:
    _, ours = twins(lambda s, y: s.act(s.bn(y)) * s.cfg.model.k)
    ours.note, ours.bn.momentum = "seen", 0.5
    CONFIG["new"] = 1
    try:
        assert [e.reason for e in fuse_report(ours)] == [None]
    finally:
        del CONFIG["new"]


LARGE = list(range(10_000))
COUNTED = iter([1, 2, 3])


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (lambda s, y: y * LARGE[2], "it reads LARGE, which is too large to be watched"),
        (lambda s, y: y * s.large[2], "it reads large, which is too large to be watched"),
        (lambda s, y: y * next(COUNTED, 1), "it reads COUNTED, which is an iterator"),
    ],
    ids=["a global", "an attribute", "an iterator"],
)
def test_what_cannot_be_watched(last: LAST, said: str) -> None:
    module = type("Case", (Base,), {"last": last, "__module__": __name__})()
    module.large = LARGE
    with pytest.warns(UserWarning, match=said):
        fuse(module)


def test_compiled(fresh_compiler: None) -> None:
    original, ours = twins(
        lambda s, y: with_defaults(y) * s.cfg.model.k * s.number * s.cfg.extra["k"][0].k
    )

    def compiled() -> Any:
        torch.compiler.reset()
        return torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)

    run = compiled()
    agree(original, run)
    for module in (original, ours):
        module.cfg.model.k = 3.0
    agree(original, run)
    agree(original, compiled())
