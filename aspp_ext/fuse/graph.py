# SPDX-License-Identifier: BSD-3-Clause
"""Who reads what among the steps of a forward, and which of them are convolutions and stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from aspp_ext.modules.head import is_atrous, same_padding
from aspp_ext.modules.program import (
    ConvSpec,
    Device,
    Dtype,
    Layer,
    Operator,
    Param,
    Pyramid,
    Ref,
    Step,
    find,
)
from aspp_ext.modules.stages import (
    ACTIVATIONS,
    BATCH_NORMS,
    DROPOUTS,
    OTHER_NORMS,
    WEIGHTED_ACTIVATIONS,
)

from .observe import pair
from .trace import Traced

_ACTIVATIONS = {
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish"),
    *("hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus", "softsign"),
}
_DROPOUTS = {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}


class Graph:
    """The steps of a forward by their places, and the module that they are of."""

    def __init__(self, traced: Traced, module: nn.Module) -> None:
        self.traced, self.module = traced, module
        self.steps = traced.steps
        self.in_result = set(_refs(traced.result))
        self._users: dict[int, list[int]] = {}
        self._producers: dict[int, int] = {}
        for i, step in enumerate(self.steps):
            self._producers[step.out] = i
            for value in dict.fromkeys(self.reads(step)):
                self._users.setdefault(value, []).append(i)
        self._calls = Counter(s.path for s in self.steps if isinstance(s, Layer))

    def sources(self) -> list[int]:
        """Values that two steps or more read."""
        return [value for value, users in self._users.items() if len(users) > 1]

    def users(self, value: int) -> list[int]:
        """The places of the steps that read it."""
        return self._users.get(value, [])

    def only_user(self, value: int) -> int | None:
        """The one step that reads it, once, if there is no other and it is no result."""
        users = self.users(value)
        if len(users) != 1 or value in self.in_result:
            return None
        return users[0] if list(self.reads(self.steps[users[0]])).count(value) == 1 else None

    def producer(self, value: int) -> int | None:
        """The place of the step that gives it; None of what comes in."""
        return self._producers.get(value)

    def reads(self, step: Step) -> Iterator[int]:
        """The values that it reads."""
        if isinstance(step, Layer | Pyramid):
            yield step.source
        else:
            yield from _refs(step.arguments)
            yield from _refs([value for _, value in step.keywords])

    def source_of(self, place: int) -> int | None:
        """What a step reads that reads one map before all."""
        step = self.steps[place]
        if isinstance(step, Layer):
            return step.source
        first = step.arguments[0] if step.arguments else None
        return first.number if isinstance(first, Ref) else None

    def shape(self, value: int) -> tuple[str, ...]:
        """Its sizes, as symbols or numbers."""
        shape = self.traced.shapes[value]
        return () if shape is None else tuple(map(str, shape))

    def operator(self, place: int | None) -> tuple[str, Operator] | None:
        """The name of a PyTorch operator, without its overload, and the step."""
        step = None if place is None else self.steps[place]
        if not isinstance(step, Operator):
            return None
        return step.target.split(".")[1], step

    def layer(self, place: int | None) -> nn.Module | None:
        """The module that a step calls."""
        step = None if place is None else self.steps[place]
        return find(self.module, step.path) if isinstance(step, Layer) else None

    def kind(self, place: int) -> str | None:
        """What a stage has to have in common with the stages beside it; None of no stage."""
        step, layer = self.steps[place], self.layer(place)
        if isinstance(step, Layer):
            kind = type(layer)
            if kind is nn.ReLU:
                return "relu"
            if kind in (*BATCH_NORMS, *OTHER_NORMS):
                # What serves more than once has to see its maps in their order.
                once = self._calls[step.path] == 1
                return ("batch norm" if kind in BATCH_NORMS else "other") if once else None
            if kind in DROPOUTS:
                return "dropout"
            return "other" if kind in (*ACTIVATIONS, *WEIGHTED_ACTIVATIONS) else None
        name = step.target.split(".")[1].removesuffix("_")
        first, *others = step.arguments or (None,)
        if not isinstance(first, Ref) or any(_is_read(a) for a in others):
            return None
        if any(_is_read(value) for _, value in step.keywords):
            return None
        if name in _DROPOUTS:
            return "dropout"
        return "relu" if name == "relu" else "other" if name in _ACTIVATIONS else None

    def conv(self, place: int) -> ConvSpec | None:
        """The convolution that a step is, if it keeps the size of the map as branches do."""
        step = self.steps[place]
        if isinstance(step, Layer):
            conv = self.layer(place)
            if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
                return None
            if not conv.weight.is_floating_point():
                return None
            bias = None if conv.bias is None else f"{step.path}.bias"
            shape = tuple(conv.weight.shape)
            spec = ConvSpec(
                step.path, f"{step.path}.weight", bias, pair(conv.dilation), conv.groups, shape
            )
            return spec if _keeps_size(spec, conv.stride, conv.padding) else None
        if step.target not in ("aten.conv2d.default", "aten.conv2d.padding") or step.keywords:
            return None
        defaults: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)
        _, weight, *others = step.arguments
        rest: tuple[Any, ...] = tuple(others)
        bias, stride, padding, dilation, groups = rest + defaults[len(rest) :]
        if not isinstance(weight, Param) or not (bias is None or isinstance(bias, Param)):
            return None
        shape = tuple(find(self.module, weight.path).shape)
        path = None if bias is None else bias.path
        spec = ConvSpec(None, weight.path, path, pair(dilation), groups, shape)
        return spec if _keeps_size(spec, stride, padding) else None

    def is_depthwise(self, conv: ConvSpec) -> bool:
        """One filter per channel."""
        return conv.groups > 1 and conv.shape[0] == conv.groups and conv.shape[1] == 1

    def looks_around(self, conv: ConvSpec) -> bool:
        """Whether it is atrous."""
        return is_atrous(conv.shape[2:], conv.dilation)

    def is_written(self, value: int, first: int, last: int, apart: set[int]) -> bool:
        """Whether a step from ``first`` to ``last``, but for those apart, writes to its memory."""
        root = self.traced.roots[value]
        for i in range(first, last + 1):
            written = self.traced.mutated.get(self.steps[i].out)
            if written is not None and self.traced.roots[written] == root and i not in apart:
                return True
        return False

    def is_size(self, step: Step) -> bool:
        """Whether it only reckons with sizes."""
        if not isinstance(step, Operator):
            return False
        return step.target == "aten.sym_size.int" or step.target.startswith("operator.")


def _refs(given: Any) -> Iterator[int]:
    if isinstance(given, Ref):
        yield given.number
    elif isinstance(given, Param | Dtype | Device):
        return
    elif isinstance(given, (list, tuple)):
        for item in given:
            yield from _refs(item)
    elif isinstance(given, dict):
        yield from _refs(list(given.values()))


def _is_read(given: Any) -> bool:
    return isinstance(given, Param | Dtype | Device) or any(True for _ in _refs(given))


def _keeps_size(conv: ConvSpec, stride: Any, padding: Any) -> bool:
    kernel, rate = conv.shape[2:], conv.dilation
    if pair(stride) != (1, 1) or any(k % 2 == 0 for k in kernel):
        return False
    same = same_padding(kernel, rate)
    if isinstance(padding, str):
        return padding == "same" or same == (0, 0)
    return pair(padding) == same
