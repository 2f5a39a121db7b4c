# SPDX-License-Identifier: BSD-3-Clause
"""How many FLOPs ``torch.utils.flop_counter.FlopCounterMode`` counts for our operators.

Those of the convolutions that they replace, by PyTorch's own formula, which counts products with
padding: a fused model has as many as it had before. What is never multiplied, is in
:func:`aspp_ext.explain`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from . import _native
from .ops.family import FAMILIES

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _formulas(counter: ModuleType) -> dict[str, Callable[..., int]]:
    """Per operator a function of its arguments, in which tensors are shapes."""

    def conv(x: Shape, weight: Shape) -> int:
        """As large as its input."""
        return counter.conv_flop_count(x, weight, x)

    def conv_backward(x: Shape, weight: Shape, of_x: bool, of_weight: bool) -> int:
        grad, mask = [x[0], weight[0], *x[2:]], [of_x, of_weight, False]
        between = (grad, x, weight, *[None] * 4, False, None, None, mask)
        return counter.conv_backward_flop(*between, out_val=(x, weight, None))

    def pyramid(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
        return sum(conv(x, w) for w in weights)

    def grad_weight(grad: Shape, x: Shape, kernels: Shape, outs: Shape, *_: Any, **__: Any) -> int:
        sizes = zip(outs, kernels[::2], kernels[1::2], strict=True)
        return sum(conv_backward(x, [o, x[1], *k], False, True) for o, *k in sizes)

    def grad_input(grad: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
        x = [[grad[0], w[1], *grad[2:]] for w in weights]
        return sum(conv_backward(s, w, True, False) for s, w in zip(x, weights, strict=True))

    def separable(x: Shape, depthwise: Any, pointwise: Any, *_: Any, **__: Any) -> int:
        return pyramid(x, [d for d in depthwise if d[0]]) + pyramid(x, pointwise)

    def separable_backward(
        grad: Shape, x: Shape, depthwise: Any, pointwise: Any, *rest: Any, **named: Any
    ) -> int:
        _, _, _, _, of_x, of_depthwise, of_pointwise, of_between = rest[:8]
        total = 0
        for d, p in zip(depthwise, pointwise, strict=True):
            inner = of_x or (bool(d[0]) and (of_depthwise or of_between))
            total += conv_backward(x, p, inner, of_pointwise)
            total += conv_backward(x, d, of_x, of_depthwise) if d[0] else 0
        return total

    def head(x: Shape, depthwise: Any, weights: Any, *rest: Any, **_: Any) -> int:
        pool, project = rest[2], rest[4]
        pooled = conv([*x[:2], 1, 1], [*pool, 1, 1]) if pool is not None else 0
        projected = conv(x, [*project, 1, 1]) if project is not None else 0
        return separable(x, depthwise, weights) + pooled + projected

    return {
        "atrous_pyramid": pyramid,
        "atrous_pyramid_statistics": pyramid,
        "atrous_pyramid_grad_input": grad_input,
        "atrous_pyramid_grad_weight": grad_weight,
        "atrous_separable_pyramid": separable,
        "atrous_separable_pyramid_backward": separable_backward,
        "aspp_inference": head,
    }


def _register(counter: ModuleType) -> None:
    for name, formula in _formulas(counter).items():
        for family in FAMILIES if name != "aspp_inference" else FAMILIES[:1]:
            counter.flop_registry.pop(family.op(name), None)  # of an earlier import
            counter.register_flop_formula(family.op(name))(formula)


class _Finder:
    """Registers the formulas where the counter is imported: it imports Triton, and we do not."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        # A spec that is only looked up changes nothing: the next one is asked for, too.
        found = (f.find_spec(name, path, target) for f in list(sys.meta_path) if f is not self)
        spec = next((s for s in found if s is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Now, or when PyTorch's counter is imported."""
    if _native.cpu_missing is not None:
        return
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__module__ != __name__]
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
