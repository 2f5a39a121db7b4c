# SPDX-License-Identifier: BSD-3-Clause
"""The fuzzer's problems of operators, each with its oracle and the door by which it is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fuzz_oracles as oracles
import torch
from fuzz_draws import (
    DTYPES,
    FAR_FROM_OVERFLOW,
    INTEGERS,
    KERNELS,
    NORMAL,
    RANGES,
    Draws,
    smaller,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import aspp_ext
from aspp_ext.ops import polyphase_weights

EXACT_SUM = 2**13
"""Sums of integers below it are exact in float32, also those of minimal filtering."""


@dataclass
class Problem:
    """``call(**arguments)`` is ours, ``plain(**arguments)`` PyTorch's."""

    says: str
    kind: str
    dtype: torch.dtype
    arguments: dict[str, Any]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    relu_inside: bool = False
    """Before the last operation: its kinks are in unknown places."""
    relu: bool = False
    separable: bool = False
    differentiable_twice: bool = True
    autocast: bool = False
    factor: float = 2.0

    def __str__(self) -> str:
        return f"{self.says}, {self.kind} in {self.dtype}"

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in tree_leaves(self.arguments) if isinstance(t, Tensor)]


@dataclass
class Shapes:
    n: int
    c: int
    plane: list[int]
    kernels: list[tuple[int, int]]
    rates: list[Any]
    outs: list[int]

    @property
    def total(self) -> int:
        return sum(self.outs)


def shapes(d: Draws, separable: bool = False, filtered: bool = False) -> Shapes:
    """Some cost as much as minimal filtering has to, most next to nothing."""
    if filtered:
        side = d.randint(16, 36)
        count, rate = d.randint(1, 2), d.randint(max(side // 5, 2), side // 2 + 1)
        return Shapes(
            *(d.choice([1, 1, 2]), d.choice([48, 64, 72, 96]), [side, side + d.randint(-3, 3)]),
            *([(3, 3)] * count, [rate + i for i in range(count)], [d.randint(24, 70)] * count),
        )
    count = d.choice([1, 1, 2, 2, 3, 3, 4, 5])
    kernels = [d.choice(KERNELS) for _ in range(count)]
    names = ["n", "c", "h", "w", *(f"o{b}" for b in range(count))]
    drawn = [d.batch(), d.channels(), *d.plane(), *(d.channels(70) for _ in range(count))]
    size = dict(zip(names, drawn, strict=True))

    def cost() -> int:
        taps = [1 if separable else kh * kw for kh, kw in kernels]
        products = sum(size[f"o{b}"] * taps[b] for b in range(count))
        return size["n"] * size["c"] * size["h"] * size["w"] * products

    smaller(d, size, cost, d.choice([10**6] * 6 + [10**7]))
    n, c, h, w, *outs = size.values()
    return Shapes(n, c, [h, w], kernels, [d.rates() for _ in range(count)], outs)


def kind_and_dtype(d: Draws) -> tuple[str, torch.dtype]:
    return d.choice([INTEGERS, INTEGERS, NORMAL, NORMAL, RANGES]), d.choice(DTYPES)


def epilogue(d: Draws, kind: str, n: int, channels: int) -> dict[str, Any]:
    drawn: dict[str, Any] = {name: None for name in ("bias", "scale", "shift")}
    if d.maybe(0.5):
        for name in drawn:
            shape = (n, channels) if name == "shift" and d.maybe(0.4) else (channels,)
            drawn[name] = d.values(kind, *shape) if d.maybe(0.6) else None
    return drawn


def settled(d: Draws, dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Any]:
    """In their dtype, and in memory as drawn."""
    return tree_map_only(Tensor, lambda t: d.laid_out(t.to(dtype)), arguments)


def activation(d: Draws) -> str | None:
    return d.choice([None, None, "relu"])


def dense(d: Draws, filtered: bool = False) -> Problem:
    kind, dtype = kind_and_dtype(d)
    s = shapes(d, filtered=filtered)
    if filtered:
        dtype = d.choice([torch.float32] * 4 + [torch.float64])
    line = d.maybe(0.06)
    if line:
        s.plane, s.kernels = s.plane[:1], [k[:1] for k in s.kernels]
        s.rates = [r if isinstance(r, int) else r[0] for r in s.rates]
    weights = [
        d.values(kind, o, s.c, *k, terms=s.c * k[0] * k[-1])
        for o, k in zip(s.outs, s.kernels, strict=True)
    ]
    x, relu = d.image(kind, s.n, s.c, *s.plane), activation(d)
    drawn = {"x": x, "weights": weights, **epilogue(d, kind, s.n, s.total)}
    keywords = {"polyphase": d.maybe(0.75), "activation": relu}
    call: Callable[..., Tensor] = functools.partial(
        aspp_ext.atrous_pyramid, atrous_rates=s.rates, **keywords
    )
    door = "atrous_pyramid"
    bare = relu is None and all(drawn[name] is None for name in ("bias", "scale", "shift"))
    if bare and not line and d.maybe(0.3):
        door = "autograd.AtrousPyramid"

        def call(x: Tensor, weights: list[Tensor], **_: Any) -> Tensor:
            apply = aspp_ext.autograd.AtrousPyramid.apply
            return apply(flat(s.rates), False, keywords["polyphase"], x, *weights)

    elif d.maybe(0.1):
        door = "cpu"
        call = functools.partial(call, backend="cpu")
    elif kind != INTEGERS and d.maybe(0.05):
        door = "reference"
        call = functools.partial(
            aspp_ext.reference.atrous_pyramid, atrous_rates=s.rates, activation=relu
        )
    return Problem(
        *(f"{door} {s} {keywords}", kind, dtype, settled(d, dtype, drawn), call),
        functools.partial(oracles.pyramid, rates=s.rates, activation=relu),
        relu=relu == "relu",
    )


def flat(rates: list[Any]) -> list[int]:
    """(rate_h, rate_w) per branch."""
    return [r for rate in rates for r in ((rate, rate) if isinstance(rate, int) else rate)]


def adjoint(d: Draws) -> Problem:
    """The gradients, as functions of their own."""
    kind, dtype = d.choice([INTEGERS, NORMAL]), d.choice([torch.float32, torch.float64])
    s, of_x, polyphase = shapes(d), d.maybe(0.5), d.maybe(0.75)
    if not of_x:
        s.kernels, s.rates, s.outs = s.kernels[:1], s.rates[:1], s.outs[:1]
    weights = [
        d.values(kind, o, s.c, *k, terms=s.c * k[0] * k[1])
        for o, k in zip(s.outs, s.kernels, strict=True)
    ]
    grad, x = d.values(kind, s.n, s.total, *s.plane), d.values(kind, s.n, s.c, *s.plane)

    def call(grad: Tensor, other: Any) -> Tensor:
        if of_x:
            apply = aspp_ext.autograd.AtrousPyramidGradInput.apply
            return apply(flat(s.rates), False, polyphase, grad, *other)
        apply = aspp_ext.autograd.AtrousPyramidGradWeight.apply
        (found,) = apply(flat(s.rates), False, polyphase, [*s.kernels[0]], s.outs, grad, other)
        return found

    def plain(grad: Tensor, other: Any) -> Tensor:
        if of_x:
            wanted = torch.zeros(x.shape, dtype=grad.dtype, requires_grad=True)
            y = oracles.pyramid(wanted, other, s.rates)
        else:
            wanted = torch.zeros(weights[0].shape, dtype=grad.dtype, requires_grad=True)
            y = oracles.pyramid(other, [wanted], s.rates)
        return torch.autograd.grad(y, wanted, grad, create_graph=True)[0]

    drawn = {"grad": grad, "other": weights if of_x else x}
    says = f"adjoint {s} {of_x=} {polyphase=}"
    return Problem(says, kind, dtype, settled(d, dtype, drawn), call, plain, factor=3.0)


def separable(d: Draws) -> Problem:
    kind, dtype = kind_and_dtype(d)
    s = shapes(d, separable=True)
    plain = [d.maybe(0.15) for _ in s.kernels]
    depthwise = [
        None if bare else d.values(kind, s.c, 1, *k, terms=k[0] * k[1])
        for bare, k in zip(plain, s.kernels, strict=True)
    ]
    pointwise = [d.values(kind, o, s.c, 1, 1, terms=s.c) for o in s.outs]
    between: list[Any] = [None for _ in s.outs]
    if d.maybe(0.4):
        for b, bare in enumerate(plain):
            if not bare and d.maybe(0.8):
                between[b] = (d.values(kind, s.c), d.values(kind, s.c))
    inner = d.choice([None, "relu"])
    relu = activation(d)
    drawn = {
        "x": d.image(kind, s.n, s.c, *s.plane, most=FAR_FROM_OVERFLOW),
        "depthwise": depthwise,
        "pointwise": pointwise,
        "between": between,
        **epilogue(d, kind, s.n, s.total),
    }
    keywords = {"between_activation": inner, "activation": relu}
    if d.maybe(0.1):
        keywords["backend"] = "cpu" if kind == INTEGERS else d.choice(["cpu", "reference"])
    epilogued = any(drawn[name] is not None for name in ("bias", "scale", "shift"))
    bare = relu is None and not epilogued and not any(plain) and not any(between)
    door = bare and d.maybe(0.3)
    one = len(s.outs) == 1 and depthwise[0] is not None and d.maybe(0.7)

    def call(x: Tensor, depthwise: Any, pointwise: Any, between: Any, **rest: Any) -> Tensor:
        if door:
            apply = aspp_ext.autograd.AtrousSeparablePyramid.apply
            count = len(s.outs)
            return apply(count, flat(s.rates), False, False, x, *depthwise, *pointwise)
        if one:
            return aspp_ext.atrous_separable_conv2d(
                *(x, depthwise[0], pointwise[0], s.rates[0]),
                **{"between": between[0], **keywords, **rest},
            )
        given = None if all(b is None for b in between) else between
        return aspp_ext.atrous_separable_pyramid(
            x, depthwise, pointwise, s.rates, between=given, **keywords, **rest
        )

    kink = inner == "relu" and any(b is not None for b in between)
    return Problem(
        *(f"separable {s} {plain=} {keywords} {door=}", kind, dtype),
        *(settled(d, dtype, drawn), call),
        functools.partial(
            oracles.separable_pyramid, rates=s.rates, between_activation=inner, activation=relu
        ),
        relu_inside=kink,
        relu=relu == "relu",
        separable=True,
        differentiable_twice=not kink,
    )


def head(d: Draws) -> Problem:
    kind, dtype = kind_and_dtype(d)
    apart = d.maybe(0.5)
    s = shapes(d, separable=apart)
    pooled = d.maybe(0.7)
    if kind == INTEGERS and pooled:  # their mean has to be exact, too
        s.plane = [1 << min(size.bit_length() - 1, 4) for size in s.plane]
    depthwise = [
        d.values(kind, s.c, 1, *k, terms=k[0] * k[1]) if apart and d.maybe(0.8) else None
        for k in s.kernels
    ]
    weights = [
        d.values(kind, o, s.c, *(k if w is None else (1, 1)), terms=s.c * k[0] * k[1])
        for o, k, w in zip(s.outs, s.kernels, depthwise, strict=True)
    ]
    q, p = d.channels(40) if pooled else 0, d.channels(70)
    drawn = {
        "x": d.image(kind, s.n, s.c, *s.plane, most=FAR_FROM_OVERFLOW),
        "depthwise": depthwise,
        "weights": weights,
        "shift": d.values(kind, s.total),
        "pool_weight": d.values(kind, q, s.c, terms=s.c) if pooled else None,
        "pool_shift": d.values(kind, q) if pooled else None,
        "project_weight": d.values(kind, p, s.total + q, terms=s.total + q),
        "project_shift": d.values(kind, p),
    }
    keywords: dict[str, Any] = {"polyphase": d.maybe(0.75)}
    prepare = keywords["polyphase"] and not any(w is not None for w in depthwise) and d.maybe(0.5)

    projects = pooled or d.maybe(0.4)
    if not projects:
        drawn |= {"project_weight": None, "project_shift": None}
    elif d.maybe(0.3):
        drawn["project_shift"] = d.values(kind, s.n, p)
    relus = {
        name: d.choice([None, "relu", "relu"]) for name in ("activation", "project_activation")
    }
    keywords |= relus

    def call(x: Tensor, depthwise: Any, weights: Any, shift: Tensor, **rest: Any) -> Tensor:
        prepared = None
        constant = not any(w.requires_grad for w in weights)
        if prepare and constant and not torch.is_autocast_enabled("cpu"):
            prepared = polyphase_weights(weights, s.rates, *x.shape[2:])
        return aspp_ext.aspp_inference(
            x, depthwise, weights, s.rates, shift, prepared=prepared, **keywords, **rest
        )

    return Problem(
        *(f"head {s} {pooled=} {projects=} {prepare=} {keywords}", kind, dtype),
        *(settled(d, dtype, drawn), call),
        functools.partial(oracles.head, rates=s.rates, **relus),
        relu_inside=projects and relus["activation"] == "relu",
        relu=relus["project_activation" if projects else "activation"] == "relu",
        separable=apart,
    )
