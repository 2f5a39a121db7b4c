# SPDX-License-Identifier: BSD-3-Clause
"""Classes that look at themselves, are copied in ways of their own, or are registered."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
from test_described import Head, agree, features
from torch import Tensor, nn

from aspp_ext import freeze
from aspp_ext.fuse import fuse, fuse_report, unfuse
from aspp_ext.modules.described import DescribedForward
from aspp_ext.modules.fused import FROZEN

FACTORS = {"Named": 2.0}


class Named(Head):
    """Looks itself up by its name."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return FACTORS[type(self).__name__] * super().forward(x, scale)

    def anew(self) -> Named:
        return self.__class__()


class OfItsClass(Head):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super(self.__class__, self).forward(x, scale)


class OfItsType(Head):
    def train(self, mode: bool = True) -> OfItsType:
        super(type(self), self).train(mode)
        return self


class Exactly(Head):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return (1 if type(self) is Exactly else -1) * super().forward(x, scale)


def fused(original: nn.Module) -> Any:
    return fuse(pickle.loads(pickle.dumps(original)))


def test_a_class_that_asks_for_its_name() -> None:
    original = Named().double()
    ours = fused(original)
    assert [(e.fused, e.reason) for e in fuse_report(ours)] == [(True, None)]
    assert repr(ours) == repr(original)
    x = features()
    torch.testing.assert_close(ours.eval()(x, 3.0), original.eval()(x, 3.0))
    agree(original, ours)


def test_what_it_makes_of_its_own_class() -> None:
    ours = fused(Named().double())
    made = ours.anew().double()
    made.load_state_dict(ours.state_dict())
    agree(unfuse(copy.deepcopy(ours)), made)
    assert "made by its class" in fuse_report(made)[0].reason
    assert [e.reason for e in fuse_report(fuse(made))] == [None]
    agree(unfuse(copy.deepcopy(made)), made)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OfItsClass, "its forward calls super of the class of its object"),
        (OfItsType, "its train calls super of the class of its object"),
        (Exactly, "its own forward computes something else in a subclass"),
    ],
)
def test_a_class_that_a_subclass_cannot_stand_for(kind: type[nn.Module], said: str) -> None:
    original = kind().double()
    ours = fused(original)
    assert type(ours) is kind
    (entry,) = fuse_report(ours)
    assert entry.recognised == "siblings"
    assert said in entry.left
    x = features()
    torch.testing.assert_close(ours.eval()(x, 3.0), original.eval()(x, 3.0))
    agree(original, ours)


def rebuilt(state: dict[str, Any]) -> nn.Module:
    module = Reduced()
    module.load_state_dict(state)
    module.mark = "rebuilt"
    return module


class Reduced(Head):
    def __reduce__(self) -> Any:
        return rebuilt, (self.state_dict(),)


class ByItsType(Head):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), ((1, 2, 4),), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark = "set"


class Filled(Head):
    """Copies what it has into an object of its class."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Filled:
        twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        twin.mark = "filled"
        return twin

    def __copy__(self) -> Filled:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        twin.mark = "shallow"
        return twin


class Given(Head):
    """Takes an argument where it is made."""

    def __new__(cls, word: str = "none") -> Given:
        module = super().__new__(cls)
        module.__dict__["mark"] = word
        return module

    def __init__(self, word: str = "none") -> None:
        super().__init__()

    def __getnewargs__(self) -> tuple[str]:
        return ("given",)


COPIES = {
    "deep copy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "old pickle": lambda m: pickle.loads(pickle.dumps(m, 2)),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", [Reduced, ByItsType, Filled, Given])
def test_ways_of_being_copied(kind: type[nn.Module], way: str) -> None:
    original, ours = kind().double(), kind().double()
    ours.load_state_dict(original.state_dict())
    if kind is Reduced:
        with pytest.warns(UserWarning, match="copied in a way of its own"):
            fuse(ours)
    else:
        assert [e.reason for e in fuse_report(fuse(ours))] == [None]
    twins = [COPIES[way](m) for m in (original, ours)]
    marks = [getattr(m, "mark", None) for m in twins]
    assert marks[0] == marks[1]
    twins = [m.double() for m in twins]
    agree(*twins)
    if kind in (Filled, Given):
        assert isinstance(twins[1], DescribedForward)
        assert [e.reason for e in fuse_report(twins[1])] == [None]


class Registered(Head):
    """A registry by name, which refuses what is there already."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key: str, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        assert cls.__name__ not in Registered.known
        Registered.known[cls.__name__] = cls


class OfARegistry(Registered, key="here"):
    pass


class Meta(type):
    made: ClassVar[list[str]] = []

    def __init__(cls, name: str, bases: Any, body: Any) -> None:
        super().__init__(name, bases, body)
        Meta.made.append(name)


class OfAMeta(Head, metaclass=Meta):
    pass


def test_registries_do_not_hear_of_fused_classes() -> None:
    for kind in (OfARegistry, OfAMeta):
        original = kind().double()
        ours = fused(original)
        assert [e.reason for e in fuse_report(ours)] == [None]
        agree(original, ours)

    class Later(type(ours)):  # somebody's own
        pass

    assert Registered.known == {"OfARegistry": OfARegistry}
    assert Meta.made == ["OfAMeta", "Later"]


class Around(nn.Module):
    """A pyramid that reads a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Head()
        self.convs = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=r, dilation=r) for r in (2, 3))
        self.mix = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.mix(torch.cat([conv(y) for conv in self.convs], 1))


def test_a_fused_pyramid_inside_a_fused_module() -> None:
    original = Around().double()
    ours = fused(original)
    for module in (original, ours):
        module.inner.branches[0][2] = nn.Tanh()
    reasons = [(e.name, e.reason is None) for e in fuse_report(ours)]
    assert reasons == [("", True), ("inner", False)]
    agree(original, fuse(ours))
    assert [(e.name, e.fused, e.reason) for e in fuse_report(ours)] == [
        ("", True, None),
        ("inner", True, None),
    ]
    freeze(ours)
    assert all(FROZEN in vars(module) for module in (ours, ours.inner))
    assert not any(isinstance(m, DescribedForward) for m in unfuse(ours).modules())
