# SPDX-License-Identifier: BSD-3-Clause
"""The table ``OPS``: every operator, its arguments on a problem and what PyTorch makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _triton, reference
from ..dispatch import IMPLEMENTATIONS
from ..ops.family import NATIVE, TRITON, Family
from ..ops.polyphase_choice import BY_COST, policy
from .problems import Pair, Problem, Values

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _image(p: Problem, v: Values, channels: int | None = None) -> Tensor:
    n, c, h, w = p.shape
    return v(n, c if channels is None else channels, h, w, layout=p.layout)


def _dense(p: Problem, v: Values) -> list[Tensor]:
    c, layout = p.shape[1], p.weight_layout
    return [
        v(b.out_channels, c, *b.kernel, fan_in=c * b.kernel[0] * b.kernel[1], layout=layout)
        for b in p.branches
    ]


def _depthwise(p: Problem, v: Values) -> list[Tensor]:
    c, layout = p.shape[1], p.weight_layout
    return [
        v(0) if b.plain else v(c, 1, *b.kernel, fan_in=b.kernel[0] * b.kernel[1], layout=layout)
        for b in p.branches
    ]


def _pointwise(p: Problem, v: Values) -> list[Tensor]:
    c, layout = p.shape[1], p.weight_layout
    return [v(b.out_channels, c, 1, 1, fan_in=c, layout=layout) for b in p.branches]


def _between(p: Problem, v: Values) -> list[Tensor]:
    return [v(0) if b.plain else v(p.shape[1]) for b in p.branches]


def _head(
    p: Problem,
    v: Values,
    separable: bool,
    pool: bool,
    project: bool = True,
    per_sample: bool = False,
) -> tuple[Any, ...]:
    depthwise = _depthwise(p, v) if separable else [v(0) for _ in p.branches]
    weights = _pointwise(p, v) if separable else _dense(p, v)
    c, pooled, projected = p.shape[1], 6 if pool else 0, 19
    of_pool = (v(pooled, c, fan_in=c), v(pooled)) if pool else (None, None)
    of_project: tuple[Any, ...] = (None, None)
    if project:
        shift = v(p.shape[0], projected) if per_sample else v(projected)
        of_project = (v(projected, p.out_channels + pooled, fan_in=p.out_channels), shift)
    return (_image(p, v), depthwise, weights, p.rates, v(p.out_channels), *of_pool, *of_project)


def outputs(result: Any) -> list[Tensor]:
    """The tensors of an operator's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in outputs(part)]


def converted(arguments: Any, dtype: torch.dtype, device: str | torch.device | None = None) -> Any:
    """A copy of an operator's arguments in another dtype, and on another device if one is given."""
    if isinstance(arguments, Tensor):
        return arguments.detach().to(device or arguments.device, dtype)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(converted(a, dtype, device) for a in arguments)
    return arguments


def has_triton(device: str) -> bool:
    """Whether Triton's kernels can run on "cpu" or "cuda"."""
    return _triton.why_not(torch.empty(1, 1, 1, 1, device=device), 1) is None


def _by_reference(name: str) -> Callable[..., Any]:
    return next(i.call for i in IMPLEMENTATIONS[name] if i.name == "reference")


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def _pairs(rates: Sequence[int]) -> list[Pair]:
    return list(zip(rates[::2], rates[1::2], strict=True))


def _expected_grad_input(grad: Tensor, weights: list[Tensor], rates: list[int]) -> Tensor:
    n, _, h, w = grad.shape
    x = grad.new_zeros(n, weights[0].size(1), h, w).requires_grad_()
    return torch.autograd.grad(reference.atrous_pyramid(x, weights, _pairs(rates)), x, grad)[0]


def _expected_grad_weight(
    grad: Tensor, x: Tensor, kernels: list[int], out_channels: list[int], rates: list[int]
) -> list[Tensor]:
    shapes = zip(out_channels, _pairs(kernels), strict=True)
    weights = _leaves([x.new_zeros(o, x.size(1), *kernel) for o, kernel in shapes])
    y = reference.atrous_pyramid(x, weights, _pairs(rates))
    return list(torch.autograd.grad(y, weights, grad))


def _expected_separable_backward(grad: Tensor, x: Tensor, *rest: Any) -> Any:
    depthwise, pointwise, rates, scale, shift, relu, *needs = rest
    (x,), depthwise, pointwise = _leaves([x]), _leaves(depthwise), _leaves(pointwise)
    scale, shift = _leaves(scale), _leaves(shift)
    y = _by_reference("atrous_separable_pyramid")(
        x, depthwise, pointwise, rates, scale, shift, relu, None, None, False
    )
    given = ([x], depthwise, pointwise, scale, shift)
    flat = [t for tensors in given for t in tensors]
    # What no output depends on is an empty tensor: a plain branch's depthwise weight.
    of = iter(torch.autograd.grad(y, flat, grad, materialize_grads=True))
    grads = [[next(of) for _ in tensors] for tensors in given]
    wanted = [*needs, needs[-1]]
    lists = [g if need else [] for g, need in zip(grads, wanted, strict=True)]
    return (*(lists[0] or [x.new_empty(0)]), *lists[1:])


def _always(problem: Problem) -> bool:
    return True


def _power_of_two_pixels(problem: Problem) -> bool:
    """Where the mean of integers over the plane is exact."""
    return (problem.shape[2] * problem.shape[3]).bit_count() == 1


@dataclass(frozen=True)
class Op:
    """An operator with a choice of arguments.

    ``arguments(problem, values)`` are the native operator's; ``expected(*arguments)`` is the same
    in plain PyTorch; ``exact(problem)``: with integers nothing is rounded before the last step.
    """

    name: str
    arguments: Callable[[Problem, Values], tuple[Any, ...]]
    expected: Callable[..., Any]
    exact: Callable[[Problem], bool] = _always

    @property
    def native(self) -> Callable[..., Any]:
        """The native operator, told of the environment what public functions tell it."""
        operator, wish = self.operator(NATIVE), policy()
        names = [a.name for a in operator.default._schema.arguments]
        if wish == BY_COST or "polyphase" not in names:
            return operator
        at = names.index("polyphase")

        def told(*arguments: Any, **named: Any) -> Any:
            if len(arguments) <= at:
                return operator(*arguments, polyphase=wish, **named)
            return operator(*arguments[:at], wish, *arguments[at + 1 :], **named)

        return told

    def operator(self, family: Family) -> Any:
        return family.op(self.name)

    def implementations(self, device: str = "cpu") -> dict[str, Callable[..., Any]]:
        """What computes this operator on a device: for gradients the families' operators.

        Triton's are there where they can run: on a GPU, and under the interpreter on the CPU.
        """
        names = [device, *(["triton"] if has_triton(device) else []), "reference"]
        if self.name in IMPLEMENTATIONS:
            found = {i.name: i.call for i in IMPLEMENTATIONS[self.name] if i.name in names}
        else:
            both = {device: self.native, "triton": self.operator(TRITON)}
            found = {name: call for name, call in both.items() if name in names}
        return found | ({"cpu": self.native} if device == "cpu" else {})

    def make(
        self,
        problem: Problem,
        dtype: torch.dtype,
        integer: bool = False,
        draw: int = 0,
        device: str | torch.device = "cpu",
    ) -> tuple[Any, ...]:
        """The same values for the same problem and ``draw``, whatever the dtype and the device."""
        seed = f"{self.name} {problem.name} {draw}"
        return self.arguments(problem, Values(dtype, integer, seed, device))


def _forward(name: str, arguments: Callable[..., Any], exact: Any = _always) -> Op:
    return Op(name, arguments, _by_reference(name), exact)


def _separable(p: Problem, v: Values, between: bool = False, grad: bool = False) -> tuple[Any, ...]:
    first = (_image(p, v, p.out_channels),) if grad else ()
    scale, shift = (_between(p, v), _between(p, v)) if between else ([], [])
    return (
        *first,
        _image(p, v),
        _depthwise(p, v),
        _pointwise(p, v),
        p.rates,
        scale,
        shift,
        between,
    )


OPS: dict[str, Op] = {
    "pyramid": _forward(
        "atrous_pyramid", lambda p, v: (_image(p, v), _dense(p, v), p.rates, None, None, False)
    ),
    "pyramid_epilogue": _forward(
        "atrous_pyramid",
        lambda p, v: (
            *(_image(p, v), _dense(p, v), p.rates),
            *(v(p.out_channels), v(p.shape[0], p.out_channels), True),
        ),
    ),
    "pyramid_grad_input": Op(
        "atrous_pyramid_grad_input",
        lambda p, v: (_image(p, v, p.out_channels), _dense(p, v), p.rates),
        _expected_grad_input,
    ),
    "pyramid_grad_weight": Op(
        "atrous_pyramid_grad_weight",
        lambda p, v: (
            *(_image(p, v, p.out_channels), _image(p, v)),
            *([k for b in p.branches for k in b.kernel], [b.out_channels for b in p.branches]),
            p.rates,
        ),
        _expected_grad_weight,
    ),
    "separable": _forward(
        "atrous_separable_pyramid", lambda p, v: (*_separable(p, v), None, None, False)
    ),
    "separable_between_epilogue": _forward(
        "atrous_separable_pyramid",
        lambda p, v: (*_separable(p, v, True), v(p.out_channels), v(p.out_channels), True),
    ),
    "separable_backward": Op(
        "atrous_separable_pyramid_backward",
        lambda p, v: (*_separable(p, v, grad=True), True, True, True, False),
        _expected_separable_backward,
    ),
    "separable_backward_between": Op(
        "atrous_separable_pyramid_backward",
        lambda p, v: (*_separable(p, v, True, grad=True), True, True, True, True),
        _expected_separable_backward,
    ),
    "head": _forward("aspp_inference", lambda p, v: _head(p, v, False, True), _power_of_two_pixels),
    "head_separable": _forward(
        "aspp_inference", lambda p, v: _head(p, v, True, True), _power_of_two_pixels
    ),
    "head_without_pool": _forward("aspp_inference", lambda p, v: _head(p, v, True, False)),
    "head_no_projection": _forward(
        "aspp_inference", lambda p, v: _head(p, v, False, False, project=False)
    ),
    # What a pool adds is rounded once for a whole plane, too seldom for the law's means.
    "head_linear": _forward(
        "aspp_inference",
        lambda p, v: (
            *_head(p, v, False, False, per_sample=True),
            *(BY_COST, None, None, False, False),
        ),
    ),
}
