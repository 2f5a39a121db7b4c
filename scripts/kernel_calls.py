# SPDX-License-Identifier: BSD-3-Clause
"""Few small calls in every pass, dtype and tile, and what each has to return.

Inputs are drawn on the CPU and copied, results are copied back and compared there, bit for bit (the
values are small integers), so that the device runs nothing but aspp_ext's own kernels. Statistics,
which are divided, may be off by rounding.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aspp_ext import reference, testing
from aspp_ext.ops.family import NATIVE, TRITON, Family
from aspp_ext.testing import OPS, Branch, Op, Problem, Values

FAMILIES = {"cuda": NATIVE, "triton": TRITON}
STATISTICS, SEPARABLE = "atrous_pyramid_statistics", "atrous_separable_pyramid"
WAY = "ASPP_EXT_SEPARABLE"


@dataclass(frozen=True)
class Shape:
    """A problem: x [N, C, H, W] and branches (out_channels, kernel, rate)."""

    x: tuple[int, int, int, int]
    branches: tuple[tuple[int, int, int], ...]
    layout: str

    @property
    def rates(self) -> list[int]:
        return [rate for _, _, rate in self.branches]

    @property
    def pairs(self) -> list[int]:
        return [rate for rate in self.rates for _ in range(2)]

    @property
    def problem(self) -> Problem:
        branches = tuple(Branch(o, (k, k), (rate, rate)) for o, k, rate in self.branches)
        layout = self.layout.removesuffix("_format")
        return Problem(self.layout, self.x, branches, layout, layout)


# Wide enough for the widest tile, long enough in k for sums in slices, channels read in place; and
# narrow, with channels to be padded, NCHW, a dead tap and an empty rectangle.
WIDE = Shape((2, 160, 17, 13), ((144, 1, 1), (136, 3, 4), (136, 3, 9)), "channels_last")
NARROW = Shape((3, 43, 9, 11), ((21, 3, 2), (8, 1, 1), (3, 3, 20)), "contiguous_format")
# Of few tiles, whose sums over pixels and over taps Triton's plan cuts into slices.
LARGE = Shape((4, 32, 40, 40), ((40, 1, 1), (40, 3, 12), (40, 3, 4)), "channels_last")
SMALL = Shape((1, 64, 9, 9), ((40, 5, 1), (40, 5, 2), (40, 3, 3)), "channels_last")


class Variant(NamedTuple):
    """A shape in a dtype; float32 products in TF32 or not."""

    shape: Shape
    dtype: torch.dtype
    tf32: bool = False

    @property
    def name(self) -> str:
        dtype = "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")
        return f"{dtype}, {list(self.shape.x)}"


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EVERY = [Variant(*each) for each in itertools.product((WIDE, NARROW), _DTYPES)]
# Of Triton's, which are compiled on the spot, each kernel, each kind of product and each way to
# read and to finish; float16 differs from bfloat16 in the name of an instruction.
VARIANTS = {
    "cuda": [*_EVERY, *(Variant(shape, torch.float32, True) for shape in (WIDE, NARROW))],
    "triton": [
        *(Variant(shape, torch.bfloat16) for shape in (WIDE, NARROW, LARGE, SMALL)),
        Variant(NARROW, torch.float32),
        Variant(WIDE, torch.float32, True),
    ],
}


class Call(NamedTuple):
    """An operator's call and what it has to return, in float64; of `rounded` results nearly."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    expected: list[Tensor]
    rounded: tuple[int, ...] = ()


@contextlib.contextmanager
def separable_way(way: str) -> Iterator[None]:
    """Which way CUDA's separable forward takes inside: "fused", "stored", "" for its own choice."""
    before = os.environ.get(WAY)
    os.environ[WAY] = way
    try:
        yield
    finally:
        if before is None:
            del os.environ[WAY]
        else:
            os.environ[WAY] = before


def integers(generator: torch.Generator, most: int, *size: int) -> Tensor:
    return torch.randint(-most, most + 1, size, generator=generator).double()


def _separable_calls() -> dict[str, Op]:
    """Those of the table; and, in one dtype, what is between without an epilogue, an epilogue per
    sample without that, and each gradient alone."""
    calls = {name: op for name, op in OPS.items() if name.startswith("separable")}
    plain, both = calls["separable"], calls["separable_between_epilogue"]
    backward = calls["separable_backward_between"]

    def with_between(p: Problem, v: Values) -> tuple[Any, ...]:
        return (*both.arguments(p, v)[:-3], None, None, False)

    def with_epilogue(p: Problem, v: Values) -> tuple[Any, ...]:
        vectors = v(p.out_channels), v(p.shape[0], p.out_channels)
        return (*plain.arguments(p, v)[:-3], *vectors, True)

    calls["separable_between"] = replace(both, arguments=with_between)
    calls["separable_epilogue"] = replace(plain, arguments=with_epilogue)
    for place, need in enumerate(("x", "depthwise", "pointwise", "between")):

        def alone(p: Problem, v: Values, place: int = place) -> tuple[Any, ...]:
            return (*backward.arguments(p, v)[:-4], *(i == place for i in range(4)))

        calls[f"separable_backward_of_{need}"] = replace(backward, arguments=alone)
    return calls


SEPARABLE_CALLS = _separable_calls()


def has_kernel(family: Family, name: str, device: str) -> bool:
    schema = family.op(name).default._schema.name
    return torch._C._dispatch_has_kernel_for_dispatch_key(schema, device.upper())


@dataclass(frozen=True)
class Drawn:
    """Arguments in float64, and what comes of them."""

    x: Tensor
    weights: list[Tensor]
    grad: Tensor
    scale: Tensor
    shift: Tensor
    y: Tensor
    grad_x: Tensor
    grad_weights: list[Tensor]


@functools.cache
def drawn(shape: Shape) -> Drawn:
    draw = torch.Generator().manual_seed(0)
    outputs = sum(out for out, _, _ in shape.branches)
    x = integers(draw, 2, *shape.x)
    weights = [integers(draw, 1, o, shape.x[1], k, k) for o, k, _ in shape.branches]
    grad = integers(draw, 1, shape.x[0], outputs, *shape.x[2:])
    leaves = [t.clone().requires_grad_() for t in (x, *weights)]
    y = reference.atrous_pyramid(leaves[0], leaves[1:], shape.rates)
    grad_x, *grad_weights = torch.autograd.grad(y, leaves, grad)
    vectors = integers(draw, 2, outputs), integers(draw, 9, outputs)
    return Drawn(x, weights, grad, *vectors, y.detach(), grad_x, grad_weights)


@functools.cache
def drawn_separable(shape: Shape, name: str) -> tuple[Any, list[Tensor]]:
    """Arguments of one of SEPARABLE_CALLS, and its results."""
    op = SEPARABLE_CALLS[name]
    arguments = op.make(shape.problem, torch.float64, integer=True)
    return arguments, testing.outputs(op.expected(*arguments))


class Case:
    """A shape's tensors on the device in a dtype."""

    def __init__(self, variant: Variant, device: str, family: Family) -> None:
        self.shape, self.dtype, self.tf32 = variant
        self.device, self.family = device, family

    def there(self, t: Tensor) -> Tensor:
        layout = {"memory_format": getattr(torch, self.shape.layout)} if t.dim() == 4 else {}
        return t.to(self.dtype).contiguous(**layout).to(self.device)

    def calls(self) -> Iterator[Call]:
        yield from self.dense()
        if has_kernel(self.family, SEPARABLE, self.device):
            yield from self.separable()

    def dense(self) -> Iterator[Call]:
        given, tf32 = drawn(self.shape), self.tf32
        x, grad, scale, shift = map(self.there, (given.x, given.grad, given.scale, given.shift))
        weights = [self.there(w) for w in given.weights]
        rates, kernels = self.shape.pairs, [k for w in weights for k in w.shape[2:]]
        outputs = [w.shape[0] for w in weights]
        op = self.family.op

        affine = given.y * given.scale[:, None, None] + given.shift[:, None, None]
        forward = op("atrous_pyramid")
        yield Call(
            "forward", lambda: [forward(x, weights, rates, None, None, False, tf32)], [given.y]
        )
        yield Call(
            "forward with epilogue",
            lambda: [forward(x, weights, rates, scale, shift, True, tf32)],
            [affine.relu()],
        )
        yield Call(
            "grad_input",
            lambda: [op("atrous_pyramid_grad_input")(grad, weights, rates, tf32)],
            [given.grad_x],
        )
        yield Call(
            "grad_weight",
            lambda: op("atrous_pyramid_grad_weight")(grad, x, kernels, outputs, rates, tf32),
            given.grad_weights,
        )
        if has_kernel(self.family, STATISTICS, self.device):
            seen = given.y.to(self.dtype).double()
            mean = seen.mean((0, 2, 3))
            squares = (seen - mean[:, None, None]).square().sum((0, 2, 3))
            yield Call(
                "statistics",
                lambda: op(STATISTICS)(x, weights, rates, tf32),
                [given.y, mean, squares],
                rounded=(1, 2),
            )

    def separable(self) -> Iterator[Call]:
        for name, op in SEPARABLE_CALLS.items():
            if name not in OPS and self.dtype != torch.bfloat16:
                continue
            arguments, expected = drawn_separable(self.shape, name)
            here = testing.converted(arguments, self.dtype)
            there = (*testing.converted(here, self.dtype, self.device), self.tf32)
            run = op.operator(self.family)

            def call(way: str = "", run: Any = run, there: Any = there) -> list[Tensor]:
                with separable_way(way):
                    return testing.outputs(run(*there))

            name = name.replace("_", " ")
            yield Call(name, call, expected)
            if self.family is NATIVE and op.name == SEPARABLE and self.dtype == torch.bfloat16:
                yield Call(f"{name}, stored", functools.partial(call, "stored"), expected)


def calls_of(variant: Variant, implementation: str, device: str) -> list[Call]:
    """A variant's calls: those of every operator that has a kernel on the device."""
    case = Case(variant, device, FAMILIES[implementation])
    return [call._replace(name=f"{call.name}, {variant.name}") for call in case.calls()]


def difference(results: Sequence[Tensor], call: Call, dtype: torch.dtype) -> str | None:
    """What is wrong in one sentence, or None."""
    if len(results) != len(call.expected):
        return f"expected {len(call.expected)} results, got {len(results)}"
    for place, (got, want) in enumerate(zip(results, call.expected, strict=True)):
        if got.shape != want.shape:
            return f"result {place}: expected {list(want.shape)}, got {list(got.shape)}"
        if place in call.rounded:
            right = (got.cpu().double() - want).abs() <= 1e-5 * want.abs().max()
        else:
            right = got.cpu() == want.to(dtype)
        if not right.all():
            return f"result {place}: {int((~right).sum())} of {want.numel()} elements differ"
    return None
