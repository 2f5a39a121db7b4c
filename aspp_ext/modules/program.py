# SPDX-License-Identifier: BSD-3-Clause
"""What a module was seen to compute, as data: pyramids, and the steps around them.

Values are numbered. Modules and parameters are named by their paths, so that a program outlives
copies and pickles of its module, and a run reads the live ones.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .head import Branch, Conv, Head, Pool, RawConv
from .stages import Function, Stage


class Ref(NamedTuple):
    """A value, by its number."""

    number: int


class Param(NamedTuple):
    """A parameter or buffer."""

    path: str


class Training(NamedTuple):
    """The training flag of a module."""

    path: str


class Dtype(NamedTuple):
    """The dtype of a value that comes in."""

    number: int


class Device(NamedTuple):
    """The device of a value that comes in."""

    number: int


class Layer(NamedTuple):
    """The call of a module with one value."""

    path: str
    source: int
    out: int


class Operator(NamedTuple):
    """The call of an operator of PyTorch, or of a function of Python's ``operator``."""

    target: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    out: int


class ConvSpec(NamedTuple):
    """A convolution: a module, or where that is None a call with parameters."""

    path: str | None
    weight: str
    bias: str | None
    dilation: tuple[int, int]
    groups: int
    shape: tuple[int, ...]  # of the weight


class BranchSpec(NamedTuple):
    """:class:`Branch`, by paths."""

    depthwise: ConvSpec | None
    between: tuple[Layer | Operator, ...]
    conv: ConvSpec
    stages: tuple[Layer | Operator, ...]


class PoolSpec(NamedTuple):
    """:class:`Pool`, by paths."""

    conv: ConvSpec
    stages: tuple[Layer | Operator, ...]
    place: int


class Pyramid(NamedTuple):
    """:class:`Head`, by paths, of the value ``source``."""

    source: int
    branches: tuple[BranchSpec, ...]
    pool: PoolSpec | None
    join: str
    joined: tuple[Layer | Operator, ...]
    project: ConvSpec | None
    stages: tuple[Layer | Operator, ...]
    outs: tuple[int, ...]  # one, or where nobody joins the branches one of each


Step = Layer | Operator | Pyramid


class Program(NamedTuple):
    """The steps of a forward, and after each the values that nobody reads again."""

    arguments: tuple[Any, ...]  # nested as the arguments are, of Refs
    channels: tuple[int, ...]  # of each of the values that come in, which are the first
    steps: tuple[Step, ...]
    dead: tuple[tuple[int, ...], ...]
    result: Any  # nested as the result is, of Refs
    values: int


class Changed(Exception):
    """A part that a program names is not there."""


def find(module: nn.Module, path: str) -> Any:
    """A submodule, parameter or buffer."""
    found: Any = module
    for name in path.split(".") if path else ():
        owner, found = found, found._modules.get(name)
        if found is None:
            found = owner._parameters.get(name)
            found = owner._buffers.get(name) if found is None else found
        if found is None:
            raise Changed(f"{path} is gone")
    return found


@functools.cache
def function_of(target: str) -> Callable[..., Any]:
    """``"aten.relu.default"``, ``"operator.mul"``."""
    package, _, rest = target.partition(".")
    if package == "operator":
        return getattr(operator, rest)
    name, overload = rest.split(".")
    return getattr(getattr(getattr(torch.ops, package), name), overload)


def head_of(module: nn.Module, spec: Pyramid) -> Head:
    """The live parts; raises Changed."""

    def conv(spec: ConvSpec) -> Conv:
        if spec.path is not None:
            return find(module, spec.path)
        weight = find(module, spec.weight)
        if tuple(weight.shape) != spec.shape:
            raise Changed(f"{spec.weight} has the shape {list(weight.shape)}")
        bias = None if spec.bias is None else find(module, spec.bias)
        return RawConv(weight, bias, spec.dilation, spec.groups)

    def stages(steps: Sequence[Layer | Operator]) -> list[Stage]:
        return [stage(module, step) for step in steps]

    branches = [
        Branch(
            None if b.depthwise is None else conv(b.depthwise),
            stages(b.between),
            conv(b.conv),
            stages(b.stages),
        )
        for b in spec.branches
    ]
    pool, project = spec.pool, spec.project
    return Head(
        branches,
        None if pool is None else Pool(conv(pool.conv), stages(pool.stages), pool.place),
        spec.join,
        stages(spec.joined),
        None if project is None else conv(project),
        stages(spec.stages),
    )


def stage(module: nn.Module, step: Layer | Operator) -> Any:
    """A step of one value as a function of it, by what is live."""
    if isinstance(step, Layer):
        return find(module, step.path)
    read = functools.partial(_live, module, (), ())
    keywords = tuple((name, read(value)) for name, value in step.keywords)
    return Function(function_of(step.target), tuple(map(read, step.arguments[1:])), keywords)


def bind(expected: Any, given: Any) -> list[Tensor] | None:
    """The tensors in the arguments of a call, if those are nested as a program's are."""
    if isinstance(expected, Ref):
        return [given] if isinstance(given, Tensor) else None
    if type(expected) is not type(given) or len(expected) != len(given):
        return None
    found: list[Tensor] = []
    for e, g in zip(expected, given, strict=True):
        if (inner := bind(e, g)) is None:
            return None
        found += inner
    return found


def run(
    program: Program,
    module: nn.Module,
    inputs: Sequence[Tensor],
    pyramid: Callable[[int, Tensor], Any],
) -> Any:
    """The result for ``inputs``; ``pyramid(i, x)`` computes the i-th pyramid of x."""
    values: list[Any] = [*inputs, *[None] * (program.values - len(inputs))]
    kinds = [(x.dtype, x.device) for x in inputs]
    pyramids = 0
    for step, dead in zip(program.steps, program.dead, strict=True):
        if isinstance(step, Layer):
            values[step.out] = find(module, step.path)(values[step.source])
        elif isinstance(step, Operator):
            arguments = [_live(module, values, kinds, a) for a in step.arguments]
            keywords = {name: _live(module, values, kinds, value) for name, value in step.keywords}
            values[step.out] = function_of(step.target)(*arguments, **keywords)
        else:
            made = pyramid(pyramids, values[step.source])
            pyramids += 1
            results = made if step.join == "none" else [made]
            for out, result in zip(step.outs, results, strict=True):
                values[out] = result
        for index in dead:
            values[index] = None
    return _live(module, values, kinds, program.result)


def _live(module: nn.Module, values: Sequence[Any], kinds: Sequence[Any], given: Any) -> Any:
    """What is given with the values, parameters and flags that it names."""
    if isinstance(given, Ref):
        return values[given.number]
    if isinstance(given, Dtype):
        return kinds[given.number][0]
    if isinstance(given, Device):
        return kinds[given.number][1]
    if isinstance(given, Param):
        return find(module, given.path)
    if isinstance(given, Training):
        return find(module, given.path).training
    if isinstance(given, (list, tuple)):
        return type(given)([_live(module, values, kinds, item) for item in given])
    if isinstance(given, dict):
        return {key: _live(module, values, kinds, item) for key, item in given.items()}
    return given
