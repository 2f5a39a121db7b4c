# SPDX-License-Identifier: BSD-3-Clause
"""What an implementation of an operator has to satisfy on a problem, whatever the device.

Each check takes ``call``, the operator as that implementation computes it, and raises
:class:`Wrong` with what it found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .. import _native
from .law import why_worse_than_torch
from .operators import Op, outputs
from .oracle import oracle_of
from .problems import Problem, laid_out

Call = Callable[..., Any]


class Wrong(AssertionError):
    """In a sentence what is wrong, and where there are such, the numbers."""

    def __init__(
        self, sentence: str, got: Tensor | None = None, expected: Tensor | None = None
    ) -> None:
        super().__init__(sentence)
        self.got, self.expected = got, expected


def _same_kind(got: list[Tensor], expected: list[Tensor], like: Tensor) -> None:
    if len(got) != len(expected):
        raise Wrong(f"{len(expected)} results expected, got {len(got)}")
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        kinds = [(tuple(e.shape), like.dtype, like.device), (tuple(g.shape), g.dtype, g.device)]
        if kinds[0] != kinds[1]:
            raise Wrong(f"result {i}: expected {kinds[0]}, got {kinds[1]}")


def check_integers(call: Call, op: Op, arguments: Any, name: str = "") -> None:
    """Bit for bit the oracle, rounded once; ``name`` is what a sentence calls the call."""
    like = arguments[0]
    expected = [t.to(like.dtype) for t in oracle_of(op, arguments)]
    got = outputs(call(*arguments))
    _same_kind(got, expected, like)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(g, e):
            count = int((g != e).sum())
            what = f"{name}: result {i}" if name else f"result {i}"
            raise Wrong(f"{what}: {count} of {e.numel()} numbers differ", g, e)


def check_float64(call: Call, op: Op, problem: Problem, device: str | torch.device) -> None:
    arguments = op.make(problem, torch.float64, device=device)
    got, expected = outputs(call(*arguments)), oracle_of(op, arguments)
    _same_kind(got, expected, arguments[0])
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if not torch.allclose(g, e, rtol=1e-12, atol=1e-12):
            raise Wrong(f"result {i}: off by {(g - e).abs().max().item():.3g}", g, e)


def check_repeats(call: Call, arguments: Any, times: int = 3) -> None:
    """The same bits every time, NaN among them."""
    first, *others = [outputs(call(*arguments)) for _ in range(times)]
    for again in others:
        for i, (a, b) in enumerate(zip(again, first, strict=True)):
            if not torch.equal(a.nan_to_num(), b.nan_to_num()):
                raise Wrong(f"result {i}: other bits when it is computed again", a, b)


def is_representative(problem: Problem) -> bool:
    """Enough outputs for statistics; other strides have been tested on integers.

    PyTorch, the yardstick, divides by zero at rates near 2**31 in low precision.
    """
    n, _, h, w = problem.shape
    plain = problem.layout == problem.weight_layout == "contiguous"
    return plain and max(problem.rates) < 2**20 and n * h * w * problem.out_channels >= 500


def is_gradient(op: Op) -> bool:
    return "grad" in op.name or "backward" in op.name


def worst(t: Tensor, exact: Tensor) -> float:
    return (t.double() - exact).abs().max().item() if t.numel() else 0.0


def baseline_of(op: Op, arguments: Any, oracle: list[Tensor]) -> list[Tensor]:
    """PyTorch's own results: of its two memory formats the one that is further off.

    They are different kernels, whose errors differ up to fivefold in either direction. In bfloat16
    PyTorch's gradient of a channels_last weight reads out of bounds on the CPU, depthwise or where
    the channels are no multiple of 16, so not that one.
    """
    contiguous = outputs(op.expected(*arguments))
    low = arguments[0].dtype != torch.float32
    if low and op.name in ("atrous_separable_pyramid_backward", "atrous_pyramid_grad_weight"):
        return contiguous
    last = tree_map_only(Tensor, lambda t: laid_out(t, "channels_last"), arguments)
    other = outputs(op.expected(*last))
    both = zip(contiguous, other, oracle, strict=True)
    return [a if worst(a, e) >= worst(b, e) else b for a, b, e in both]


def factor_for(op: Op, dtype: torch.dtype) -> float:
    """PyTorch's sums are blocked on the CPU; a CUDA core adds one product after the other.

    Minimal filtering subtracts sums to get a weight's gradient. Over few pixels, where it is not
    chosen, PyTorch's have no errors that would hide that.
    """
    sequential = _native.emulated and dtype == torch.float32
    filtered = os.environ.get("ASPP_EXT_POLYPHASE") == "always"
    forced = filtered and op.name == "atrous_pyramid_grad_weight"
    return (3 if is_gradient(op) else 2) * (2 if sequential or forced else 1)


def check_error_law(
    call: Call,
    op: Op,
    problem: Problem,
    dtype: torch.dtype,
    device: str | torch.device,
    draws: int = 1,
    rounded: Callable[[Any], Any] = lambda arguments: arguments,
) -> float:
    """At most so many times (:func:`factor_for`) as far from the oracle as PyTorch on the same
    device, plus one rounding.

    Args:
        draws: the gradients of small weights are few numbers, so that several are judged together.
        rounded: what PyTorch gets, where its products are of a lower precision.

    Returns:
        the largest error as a multiple of PyTorch's, or of one rounding if that is more.
    """
    drawn = []
    for draw in range(draws):
        arguments = op.make(problem, dtype, draw=draw, device=device)
        oracle = oracle_of(op, arguments)
        ours = outputs(call(*arguments))
        _same_kind(ours, oracle, arguments[0])
        base = baseline_of(op, rounded(arguments), oracle)
        drawn.append(list(zip(ours, base, oracle, strict=True)))
    return check_law_of_draws(list(zip(*drawn, strict=True)), factor_for(op, dtype))


def check_law_of_draws(results: Sequence[Sequence[Any]], factor: float) -> float:
    """The error law on results, each of several draws of (ours, PyTorch's, the oracle's)."""
    multiple = 0.0
    for i, draws in enumerate(results):
        got, torchs, exact = (torch.cat([t.flatten() for t in f]) for f in zip(*draws, strict=True))
        if (why := why_worse_than_torch(got, torchs, exact, factor)) is not None:
            raise Wrong(f"result {i}: {why}", draws[0][0], draws[0][2])
        if exact.numel():
            rounding = torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()
            own = max(worst(torchs, exact), rounding)
            multiple = max(multiple, worst(got, exact) / own if own else 0.0)
    return multiple


def assert_statistics(y: Tensor, mean: Tensor, squares: Tensor) -> None:
    """``mean`` and ``squares`` are those of y ``[N, sum O, H, W]`` as it is, up to the rounding of
    sums in mean's dtype."""
    kinds = {(t.dtype, t.device) for t in (mean, squares)}
    if kinds != {(torch.promote_types(y.dtype, torch.float32), y.device)}:
        raise Wrong(f"statistics beside {y.dtype} on {y.device} are {kinds}")
    exact = y.double()
    var, centre = torch.var_mean(exact, (0, 2, 3), correction=0)
    count = y.numel() // y.shape[1]
    eps = torch.finfo(mean.dtype).eps
    largest = exact.abs().amax((0, 2, 3))
    unit = (64 if y.dtype == torch.float64 else 4) * eps  # of float64 the oracle rounds as well
    if not ((mean - centre).abs() <= unit * largest).all():
        raise Wrong("the mean is off", mean, centre)
    # A difference from a mean that is rounded is as far off as the mean; sum(y^2) - n mean^2 would
    # be off by eps * n * largest^2.
    allowed = count * (unit * var.sqrt() * (var.sqrt() + largest) + (unit * largest) ** 2)
    if not ((squares - var * count).abs() <= allowed).all():
        raise Wrong("the sum of squares is off", squares, var * count)


def tensors_in(arguments: Any) -> list[int]:
    """Which of the leaves are tensors with elements."""
    leaves = tree_flatten(arguments)[0]
    return [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.numel() > 0]


def check_reach(
    call: Call,
    op: Op,
    problem: Problem,
    dtype: torch.dtype,
    device: str | torch.device,
    merged: bool = False,
    at_least: bool = False,
    values: Sequence[float] = (torch.nan,),
) -> None:
    """One value, NaN or Inf, in one argument: the outputs that depend on that element are not
    finite, all others are.

    Args:
        merged: a kernel may compute rectangles with different taps as one, in which dead taps
            multiply zeros. What is among the weights then reaches more of its channel, as in
            PyTorch.
        at_least: others may be hit, too, as where oneDNN multiplies the zero padding.
    """
    made = op.make(problem, dtype, device=device)
    for leaf in tensors_in(made):
        weight = merged and 1 <= leaf <= 2 * len(problem.branches)  # depthwise, and dense or 1x1
        for value, hit, seen in hit_and_seen(call, op, made, leaf, values):
            most = seen.any(3, True).any(2, True).any(0, True) if weight else seen
            if not hit[seen].all():
                raise Wrong(f"argument {leaf}: not all that depends on a {value} is hit", hit, seen)
            if not at_least and (hit & ~most).any():
                raise Wrong(f"argument {leaf}: a {value} hits more than depends on it", hit, seen)


def hit_and_seen(
    call: Call, op: Op, made: Any, leaf: int, values: Sequence[float] = (torch.nan,)
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Of each value and result: what is not finite, and what depends on the one element that has
    the value."""
    leaves, spec = tree_flatten(tree_map_only(Tensor, torch.ones_like, made))
    changed = leaves[leaf].clone()

    def with_element(value: float) -> Any:
        changed.flatten()[2 * changed.numel() // 3] = value
        return tree_unflatten([*leaves[:leaf], changed, *leaves[leaf + 1 :]], spec)

    before, after = (oracle_of(op, with_element(v)) for v in (1.0, 2.0))
    for value in values:
        got = outputs(call(*with_element(value)))
        for g, b, a in zip(got, before, after, strict=True):
            yield value, ~g.isfinite(), b != a
