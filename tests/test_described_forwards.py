# SPDX-License-Identifier: BSD-3-Clause
"""Forwards of other kinds than a function of one map that gives maps."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aspp_pairs import TIGHT
from test_described import Head, features
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from aspp_ext.fuse import fuse, fuse_report


class Base(Head):
    def core(self, x: Tensor) -> Tensor:
        return Head.forward(self, x)

    def scaled(self, scale: float, x: Tensor) -> Tensor:
        return scale * self.core(x)


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def of_anything(*arguments: Any, **keywords: Any) -> Tensor:
        return 2 * forward(*arguments, **keywords)

    return of_anything


class Bound:
    """A descriptor."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return functools.partial(self.function, owner)


class Called(Base):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Partial(Base):
    forward = functools.partialmethod(Base.scaled, 2.0)


class Sized(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        y = self.core(x)
        return y, y.shape[2]


def kind_of(forward: Any) -> type[nn.Module]:
    return type("Kind", (Base,), {"forward": forward, "__module__": __name__})


def relu_first(self: Any, x: Tensor) -> Tensor:
    x.relu_()
    return self.core(x)


def add_first(self: Any, x: Tensor) -> Tensor:
    x += 1
    return self.core(x)


ONE, TWO = (features(),), (features(), None)
READ, SIBLINGS, LEFT = "structure", "siblings", None
FORWARDS: dict[str, tuple[type[nn.Module], Any, str | None, str]] = {
    "an own __call__": (Called, ONE, SIBLINGS, "its class has a __call__ of its own"),
    "a partialmethod": (Partial, ONE, SIBLINGS, "its forward is a partialmethod, not a function"),
    "a descriptor": (
        kind_of(Bound(Head.forward)),
        *(ONE, SIBLINGS, "its forward is a Bound, not a function"),
    ),
    "decorated": (kind_of(doubled(Head.forward)), ONE, READ, "mul"),
    "a size": (Sized, ONE, READ, ""),
    "None": (
        kind_of(lambda self, x: {"y": self.core(x), "aux": None}),
        *(ONE, SIBLINGS, "its forward returns something else than maps"),
    ),
    "a dict": (kind_of(lambda self, d: self.core(d["x"])), ({"x": features()},), READ, ""),
    "an argument that is None": (
        kind_of(lambda self, x, mask: self.core(x) if mask is None else mask),
        *(TWO, SIBLINGS, "its forward takes a NoneType"),
    ),
    "a label": (
        kind_of(lambda self, x, label: self.core(x) + label[:, None, None, None]),
        *((features(), torch.ones(2, dtype=torch.long)), SIBLINGS),
        "its forward takes something else than maps",
    ),
    "any number of arguments": (kind_of(lambda self, *xs: self.core(xs[0])), ONE, READ, ""),
    "a keyword": (kind_of(lambda self, x, *, scale=2.0: scale * self.core(x)), ONE, READ, "mul"),
    "relu_ of the input": (kind_of(relu_first), ONE, READ, "relu"),
    "the input plus one": (kind_of(add_first), ONE, READ, "add"),
    "no argument": (
        kind_of(lambda self: self.core(self.branches[0][0].weight.new_ones(2, 16, 9, 9))),
        *((), LEFT, "its forward takes no map by place"),
    ),
}


def steps(module: Any, arguments: Any) -> list[Any]:
    """Results, the arguments afterwards and gradients, in both modes."""
    found: list[Any] = []
    for training in (True, False):
        torch.manual_seed(0)
        given = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)
        leaves = [
            x.requires_grad_()
            for x in tree_leaves(given)
            if isinstance(x, Tensor) and x.is_floating_point()
        ]
        copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
        results = tree_leaves(module.train(training)(*copied))
        next(r for r in results if isinstance(r, Tensor)).square().sum().backward()
        found += [results, tree_leaves(copied), [x.grad for x in leaves]]
        found.append([p.grad for p in module.parameters()])
    return tree_leaves(found)


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str) -> None:
    kind, arguments, recognised, said = FORWARDS[name]
    torch.manual_seed(0)
    original = kind().double()
    ours = copy.deepcopy(original)
    if recognised is LEFT:
        with pytest.warns(UserWarning, match=said):
            fuse(ours, example_inputs=arguments)
        assert fuse_report(ours)[0].reason == said
    else:
        fuse(ours, example_inputs=arguments)
        (entry,) = fuse_report(ours)
        assert (entry.reason, entry.recognised) == (None, recognised)
        assert said in entry.left
    for expected, got in zip(steps(original, arguments), steps(ours, arguments), strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(got, expected, **TIGHT)
        else:
            assert got == expected
