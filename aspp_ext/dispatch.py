# SPDX-License-Identifier: BSD-3-Clause
"""Which implementation runs a call, and in words why not another.

"On which device" is PyTorch's dispatcher; "by which implementation" is :func:`select`: the first in
the tuple that has no reason against it. Kernels that were not seen right and fast on the device
(:mod:`aspp_ext.evidence`) are passed by, unless they are asked for by name. Everything here is pure
Python on shapes, dtypes and devices, so ``torch.compile`` traces through it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _cuda, _native, _triton, reference
from ._autograd_key import unavailable as autograd_unavailable
from .evidence import rulings
from .evidence.entry import Cell

# The rest of `ops` is built on this module.
from .ops import head_composed
from .ops.checks import shown
from .ops.family import NATIVE, TRITON, Family
from .ops.formats import like
from .ops.precision import allows_tf32

MAX_CPU_KERNEL = 63
"""Largest kernel size of the CPU kernels (csrc/cpu/branches.h)."""


@dataclass(frozen=True)
class Problem:
    """One call: the operator, its input ``[N, C, H, W]``, a weight per branch, dense or pointwise,
    the depthwise weights that are there, and what else its kernels have gradients of."""

    op: str
    x: Tensor
    weights: tuple[Tensor, ...]
    depthwise: tuple[Tensor, ...] = ()
    others: tuple[Tensor, ...] = ()

    @property
    def precision(self) -> str:
        """Of products: x's dtype, or "tf32"."""
        return "tf32" if allows_tf32(self.x) else str(self.x.dtype).removeprefix("torch.")

    @property
    def mode(self) -> str:
        """ "training" where a gradient may be asked for."""
        # Tensors inside torch.func's transforms do not say so.
        transformed = not torch.compiler.is_compiling() and _is_transformed()
        tensors = (self.x, *self.weights, *self.depthwise, *self.others)
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        return "training" if wanted or transformed else "inference"

    @property
    def size_class(self) -> str:
        """One of :data:`aspp_ext.evidence.rulings.CLASSES`, or "" where sizes are symbolic."""
        n, c, h, w = self.x.shape
        size = n * h * w * c * sum(weight.size(0) for weight in self.weights)
        if torch.jit.is_tracing():  # for which sizes are tensors
            return ""
        if not torch.compiler.is_compiling() and isinstance(size, int):
            return rulings.size_class(size)
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return rulings.size_class(size, statically_known_true)

    def cell(self, implementation: str) -> Cell:
        return Cell(implementation, self.op, self.precision, self.mode)


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _nothing(problem: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """``why_not(problem)`` is None when it can run; ``call`` takes the operator's arguments.

    ``unproven(problem)``, asked where it can run, is the reason to run it only when it is named.
    ``statistics``, where it can, computes the call without an epilogue and the statistics that
    :func:`aspp_ext.ops.pyramid_statistics.atrous_pyramid_statistics` returns.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    call: Callable[..., Any]
    unproven: Callable[[Problem], str | None] = _nothing
    statistics: Callable[..., Any] | None = None

    def reason(self, problem: Problem) -> str | None:
        """What keeps it from being chosen unasked, or None."""
        reason = self.why_not(problem)
        return self.unproven(problem) if reason is None else reason


def _no_operators() -> str | None:
    return _native.cpu_missing or autograd_unavailable


def _cpu_why_not(problem: Problem) -> str | None:
    if (missing := _no_operators()) is not None:
        return missing
    if problem.x.device.type not in ("cpu", "meta"):
        return f"it runs on the CPU but x is on {problem.x.device.type}"
    for w in (*problem.depthwise, *problem.weights):
        if w.size(2) > MAX_CPU_KERNEL or w.size(3) > MAX_CPU_KERNEL:
            return f"kernel sizes go up to {MAX_CPU_KERNEL}, got {w.size(2)}x{w.size(3)}"
    return None


def _cuda_why_not(problem: Problem) -> str | None:
    return _cuda.why_not(problem.x, len(problem.weights))


def _triton_why_not(problem: Problem) -> str | None:
    return _triton.why_not(problem.x, len(problem.weights))


def _triton_unproven(problem: Problem) -> str | None:
    return _triton.only_for_tests() or _unproven("triton", problem)


def _unproven(implementation: str, problem: Problem) -> str | None:
    device = problem.x.device
    return against(device.type, device.index, *problem.cell(implementation), problem.size_class)


def against(kind: str, index: int | None, *asked: str) -> str | None:
    """:func:`aspp_ext.evidence.rulings.against`, of what is constant to ``torch.compile``."""
    *cell, size = asked
    return rulings.against(device_name(kind, index), Cell(*cell), size)


# What torch.compiler.assume_constant_result does, which imports the compiler for it.
against._dynamo_marked_constant = True  # type: ignore[attr-defined]


def device_name(kind: str, index: int | None) -> str:
    """As :mod:`aspp_ext.evidence` calls it, like "cuda:0"."""
    if kind != "cuda":
        return "cpu"
    return f"cuda:{torch.cuda.current_device() if index is None else index}"


def _operator(family: Family, name: str) -> Callable[..., Any]:
    return lambda *arguments: family.op(name)(*arguments)


def pairs(rates: Sequence[int]) -> list[tuple[int, int]]:
    """The operators' flat (h, w, h, w, ...) as one pair per branch."""
    return [(rates[i], rates[i + 1]) for i in range(0, len(rates), 2)]


def _or_none(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [t if t.numel() else None for t in tensors]


def _reference_pyramid(
    x: Tensor,
    weights: Any,
    rates: Any,
    scale: Any,
    shift: Any,
    relu: bool,
    tf32: bool = False,
    polyphase: int = 1,
) -> Tensor:
    return reference.atrous_pyramid(
        x, weights, pairs(rates), scale=scale, shift=shift, activation="relu" if relu else None
    )


def _reference_separable(
    x: Tensor,
    depthwise: Any,
    pointwise: Any,
    rates: Any,
    between_scale: Any,
    between_shift: Any,
    between_relu: bool,
    scale: Any,
    shift: Any,
    relu: bool,
    tf32: bool = False,
) -> Tensor:
    between = [
        (s, t) if s.numel() else None for s, t in zip(between_scale, between_shift, strict=True)
    ]
    return reference.atrous_separable_pyramid(
        x,
        _or_none(depthwise),
        pointwise,
        pairs(rates),
        between=between or None,
        between_activation="relu" if between_relu else None,
        scale=scale,
        shift=shift,
        activation="relu" if relu else None,
    )


def _reference_head(
    x: Tensor,
    depthwise: Any,
    weights: Any,
    rates: Any,
    shift: Tensor,
    pool_weight: Tensor | None,
    pool_shift: Tensor | None,
    project_weight: Tensor | None,
    project_shift: Tensor | None,
    polyphase: int = 1,
    prepared: Any = None,
    channels_last: bool | None = None,
    relu: bool = True,
    project_relu: bool = True,
) -> Tensor:
    y = reference.aspp_inference(
        *(x, _or_none(depthwise), weights, pairs(rates), shift),
        *(pool_weight, pool_shift, project_weight, project_shift),
        activation="relu" if relu else None,
        project_activation="relu" if project_relu else None,
    )
    return like(x, y, channels_last)


REFERENCE: dict[str, Callable[..., Any]] = {
    "atrous_pyramid": _reference_pyramid,
    "atrous_separable_pyramid": _reference_separable,
    "aspp_inference": _reference_head,
}


def _pyramids(family: Family, op: str) -> Callable[..., Any]:
    """``op`` by kernels of pyramids, of which the head is composed."""
    if op == "aspp_inference":
        return lambda *arguments: head_composed.aspp_inference(*arguments, family=family)
    return _operator(family, op)


def _statistics(family: Family, op: str) -> Callable[..., Any] | None:
    return _operator(family, "atrous_pyramid_statistics") if op == "atrous_pyramid" else None


def _implementations(op: str, by_reference: Callable[..., Any]) -> tuple[Implementation, ...]:
    statistics, native = _statistics(NATIVE, op), _operator(NATIVE, op)
    by_cuda = (partial(_unproven, "cuda"), statistics)
    by_triton = (_triton_unproven, _statistics(TRITON, op))
    by_cpu = (partial(_unproven, "cpu"), statistics if _native.emulated else None)
    return (
        Implementation("cuda", _cuda_why_not, _pyramids(NATIVE, op), *by_cuda),
        Implementation("triton", _triton_why_not, _pyramids(TRITON, op), *by_triton),
        Implementation("cpu", _cpu_why_not, native, *by_cpu),
        Implementation("reference", _nothing, by_reference),
    )


IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
    op: _implementations(op, by_reference) for op, by_reference in REFERENCE.items()
}
"""Per operator, every implementation in the order of preference."""


def select(problem: Problem, backend: str | None = None) -> Implementation:
    """The implementation that runs this call.

    Args:
        backend: a name to force; None reads ``ASPP_EXT_BACKEND``, and without it takes the first
            that can and is proven.

    Raises:
        ValueError: no implementation has that name.
        RuntimeError: the forced one cannot run this call; the message is its reason.
    """
    candidates = IMPLEMENTATIONS[problem.op]
    forced = os.environ.get("ASPP_EXT_BACKEND") or None if backend is None else backend
    if forced is None:
        for candidate in candidates:
            if candidate.reason(problem) is None:
                return candidate
    for candidate in candidates:
        if isinstance(forced, str) and candidate.name == forced:
            if (reason := candidate.why_not(problem)) is not None:
                raise RuntimeError(f"{problem.op}: backend '{forced}' cannot run this: {reason}")
            return candidate
    names = ", ".join(c.name for c in candidates)
    raise ValueError(f"{problem.op}: backend must be one of {names}, got {shown(forced)}")


def report(device: str = "cpu") -> list[tuple[str, str, str | None]]:
    """(operator, implementation, why not) for a plain float32 3x3 problem on ``device``."""
    rows: list[tuple[str, str, str | None]] = []
    for op, candidates in IMPLEMENTATIONS.items():
        try:
            x = torch.empty(1, 8, 9, 9, device=device)
            weight = torch.empty(8, 8, 3, 3, device=device)
        except (RuntimeError, AssertionError) as error:
            rows.extend((op, c.name, f"no {device} device: {error}") for c in candidates)
            continue
        rows.extend((op, c.name, c.reason(Problem(op, x, (weight,)))) for c in candidates)
    return rows


def explain(
    x: Tensor,
    weights: Sequence[Tensor],
    atrous_rates: Sequence[int | tuple[int, int]],
    *,
    depthwise_weights: Sequence[Tensor | None] | None = None,
    polyphase: bool = True,
) -> str:
    """Prints and returns who would compute a pyramid, why nobody else, and how much is skipped.

    Where the CPU computes a dense one, also which branches it filters minimally, and why.

    Args:
        x: ``[N, C, H, W]``, or ``[N, C, L]`` for dense branches in one dimension.
        weights: per branch ``[O_b, C, kh, kw]``; pointwise ``[O_b, C, 1, 1]`` with
            ``depthwise_weights``.
        atrous_rates: per branch an int or a pair.
        depthwise_weights: per branch ``[C, 1, kh, kw]`` or None; explains the separable operator.
        polyphase: as in :func:`aspp_ext.atrous_pyramid`.

    Raises:
        ValueError, TypeError: as the operator itself.
    """
    from .explanation import explain_pyramid

    text = explain_pyramid(x, weights, atrous_rates, depthwise_weights, polyphase)
    print(text)
    return text
