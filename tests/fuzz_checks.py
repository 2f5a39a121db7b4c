# SPDX-License-Identifier: BSD-3-Clause
"""What the fuzzer asks of a problem of an operator."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import fuzz_oracles as oracles
import torch
from fuzz_draws import INTEGERS, NORMAL, RANGES, Draws, kept, same_bits
from fuzz_operators import EXACT_SUM, Problem
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

LOW = {torch.bfloat16: 2**8, torch.float16: 2**11}
"""Up to where they hold every integer."""
NOT_CAST = ("reference", "adjoint")
"""Of what autocast and memory formats promise nothing."""
MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def rule(problem: Problem, magnitude: Tensor, gradient: bool = False) -> dict[str, Any]:
    """A pixel is few sums, whose luck differs. float64 is its own oracle, which sums up pixels in a
    single chain: 30 roundings off where ours was 6, by extended precision."""
    roundings = (16 if problem.dtype == torch.float64 else 2) * (2 if gradient else 1)
    if gradient and os.environ.get("ASPP_EXT_POLYPHASE") == "always":
        roundings *= 8  # of single channels that are zero in places, as ReLU leaves them
    whole = is_representative(problem)
    return {"magnitude": magnitude, "roundings": roundings, "as_a_whole": whole}


def check(problem: Problem, d: Draws) -> None:
    """Values, gradients, memory, and the same twice."""
    mode = d.choice(["grad", "grad", "no_grad", "inference"])
    casts = problem.dtype == torch.float32 and problem.says.split()[0] not in NOT_CAST
    problem.autocast = casts and d.maybe(0.1)
    result = torch.bfloat16 if problem.autocast else problem.dtype
    wanted = [t for t in problem.leaves if mode == "grad" and d.maybe(0.4)]
    for t in wanted:
        t.requires_grad_()
    before = kept(problem.leaves)
    with MODES[mode](), torch.autocast("cpu", torch.bfloat16, enabled=problem.autocast):
        got = problem.call(**problem.arguments)
        again = problem.call(**problem.arguments)
    assert same_bits(got.detach(), again.detach()), "other bits the second time"
    assert same_bits(kept(problem.leaves), before), "an argument was written to"
    assert got.dtype == result, f"dtype {got.dtype}, expected {result}"
    assert got.requires_grad == bool(wanted), f"requires_grad {got.requires_grad}"
    check_format(problem, got)
    check_values(problem, got, result)
    if wanted and got.numel() and not problem.autocast:
        check_gradients(problem, d, got, wanted)


def check_format(problem: Problem, got: Tensor) -> None:
    """channels_last where an operand of the products is, contiguous where all are."""
    promised = problem.says.split()[0] not in NOT_CAST
    if got.dim() != 4 or got.numel() == 0 or not promised:
        return
    operands = [t for t in problem.leaves if t.dim() == 4]
    if "pointwise" in problem.arguments:
        operands = [problem.arguments["x"], *problem.arguments["pointwise"]]
    elif "project_weight" in problem.arguments:
        operands = [problem.arguments["x"]]
    kinds = [memory_format_of(t) for t in operands]
    if kinds.count(torch.contiguous_format) == len(kinds):
        assert got.is_contiguous(), f"strides {got.stride()} though all is contiguous"
    elif torch.channels_last in kinds:
        last = got.is_contiguous(memory_format=torch.channels_last)
        assert last, f"strides {got.stride()} though an operand is channels_last"


def memory_format_of(t: Tensor) -> torch.memory_format | None:
    """None of what is neither or both."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return None if t.is_contiguous() else torch.channels_last
    return torch.contiguous_format if t.is_contiguous() else None


def contiguous(arguments: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.detach().to(dtype).contiguous(), arguments)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def is_exact(problem: Problem, dtype: torch.dtype, magnitude: Tensor) -> bool:
    """Whether every sum of integers is one that is held without rounding."""
    if problem.kind != INTEGERS or "reference" in problem.says:
        return False
    finite = magnitude[magnitude.isfinite()]
    inner = LOW.get(dtype, EXACT_SUM)
    if problem.arguments.get("pool_weight") is not None and dtype in LOW:
        return False  # the mean is a fraction
    projected = problem.arguments.get("project_weight") is not None
    rounded_inside = problem.separable or projected
    limit = inner if rounded_inside else EXACT_SUM
    return not finite.numel() or finite.max().item() <= limit


def is_representative(problem: Problem) -> bool:
    """Of many values that are drawn, not repeated, nor all moved by one that is the plane's."""
    once = all(0 not in t.stride() for t in problem.leaves)
    pooled = problem.arguments.get("pool_weight") is not None
    return once and not pooled and problem.kind == NORMAL and problem.dtype != torch.float64


def check_values(problem: Problem, got: Tensor, dtype: torch.dtype) -> None:
    arguments = oracles.wide(problem.arguments, dtype)
    exact = problem.plain(**arguments)
    assert got.shape == exact.shape, f"shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    magnitude = problem.plain(**oracles.sizes(arguments))
    if is_exact(problem, dtype, magnitude):
        # An infinity that is multiplied by zero on the way is another matter than one result.
        wanted = exact.to(dtype)
        assert same_bits(got.detach(), wanted), where_different(got, wanted)
        return
    given = contiguous(problem.arguments, dtype)
    eager = problem.plain(**given)
    law = {"factor": problem.factor, **rule(problem, magnitude)}
    why = oracles.why_wrong(got, eager, exact, **law)
    if why is not None:  # PyTorch's kernels of the other format are another yardstick
        eager = problem.plain(**tree_map_only(Tensor, channels_last, given))
        why = oracles.why_wrong(got, eager, exact, **law)
    assert why is None, why


def where_different(got: Tensor, wanted: Tensor) -> str:
    wrong = (got != wanted) & ~(got.isnan() & wanted.isnan())
    place = tuple(wrong.nonzero()[0].tolist())
    count = f"{int(wrong.sum())} of {wrong.numel()}"
    return f"{count} integers, at {place}: {got[place]} for {wanted[place]}"


def gradients(
    problem: Problem, arguments: Any, wanted: list[int], grad: Tensor
) -> tuple[Tensor, ...]:
    """PyTorch's, of those leaves."""
    flat, spec = tree_flatten(arguments)
    leaves = [i for i, t in enumerate(flat) if isinstance(t, Tensor)]
    chosen = [flat[leaves[i]].requires_grad_() for i in wanted]
    y = problem.plain(**tree_unflatten(flat, spec))
    return torch.autograd.grad(y, chosen, grad, materialize_grads=True)


def check_gradients(problem: Problem, d: Draws, got: Tensor, wanted: list[Tensor]) -> None:
    arguments = oracles.wide(problem.arguments)
    if not all(t.isfinite().all() for t in tree_leaves(arguments) if isinstance(t, Tensor)):
        return  # PyTorch's own multiply padding, so that a NaN reaches more than it has to
    if problem.kind == RANGES and problem.dtype == torch.float16:
        return  # whose gradients vanish
    places = [i for i, t in enumerate(problem.leaves) if any(t is w for w in wanted)]
    grad = d.values(problem.kind, *got.shape)
    magnitude = problem.plain(**oracles.sizes(arguments))
    if problem.relu and problem.kind != INTEGERS:
        unsure = torch.finfo(problem.dtype).eps * 16 * magnitude
        grad[problem.plain(**arguments) <= unsure] = 0
    if grad.numel() and d.maybe(0.2):  # a channel is zero but for one line
        part = grad.movedim(1, 0)[d.randrange(grad.size(1))].movedim(d.choice([1, -1]), 0)
        part[part.size(0) // 2 + 1 :] = 0
        part[: part.size(0) // 2] = 0
    grad = d.laid_out(grad.to(problem.dtype))
    ours = torch.autograd.grad(got, wanted, grad, materialize_grads=True)
    exact = gradients(problem, arguments, places, grad.double())
    sizes = gradients(problem, oracles.sizes(arguments), places, grad.double().abs())
    eager = exact
    if problem.dtype != torch.float64:
        eager = gradients(
            problem, contiguous(problem.arguments, problem.dtype), places, grad.contiguous()
        )
    promised = problem.says.split()[0] not in NOT_CAST
    named = [problem.arguments.get(name) for name in ("weights", "depthwise", "pointwise")]
    parameters = [t for t in tree_leaves(named) if isinstance(t, Tensor)]
    kept_inside = not problem.separable and problem.arguments.get("scale") is None
    for i, (leaf, g, e, want, size) in enumerate(
        zip(wanted, ours, eager, exact, sizes, strict=True)
    ):
        name = f"gradient {i} of {tuple(leaf.shape)}"
        assert g.shape == leaf.shape, f"{name}: shape {tuple(g.shape)}"
        assert g.dtype == leaf.dtype, f"{name}: dtype {g.dtype}"
        if any(leaf is w for w in parameters) and promised and memory_format_of(leaf):
            as_made = max(leaf.stride()) < 2**40
            assert g.stride() == leaf.stride() or not as_made, (
                f"{name}: strides {g.stride()} of {leaf.stride()}"
            )
        exactly = all(is_exact(problem, problem.dtype, m) for m in (size, magnitude))
        if exactly and (problem.dtype not in LOW or kept_inside):
            rounded = want.to(g.dtype)
            assert same_bits(g, rounded), f"{name}: {where_different(g, rounded)}"
            continue
        if problem.relu_inside and problem.dtype != torch.float64:
            continue  # rounding moves values across the kinks
        e = e if e.isfinite().all() else want.to(g.dtype)
        why = oracles.why_wrong(g, e, want, factor=3, **rule(problem, size, gradient=True))
        assert why is None, f"{name}: {why}"
    if problem.dtype == torch.float64 and problem.differentiable_twice and problem.kind != RANGES:
        check_second_order(problem, d, wanted, places, grad)


def check_second_order(
    problem: Problem, d: Draws, wanted: list[Tensor], places: list[int], grad: Tensor
) -> None:
    """Of a product of the gradients with a direction, by what they were taken and by ``grad``."""
    if not d.maybe(0.3):
        return
    along = [torch.randn_like(t) for t in wanted]
    results = []
    for call, given in (
        (problem.call, problem.arguments),
        (problem.plain, oracles.wide(problem.arguments)),
    ):
        leaves = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        chosen = [leaves[i].requires_grad_() for i in places]
        back = grad.detach().requires_grad_()
        first = torch.autograd.grad(
            *(call(**given), chosen, back), create_graph=True, materialize_grads=True
        )
        total = sum((g * v).sum() for g, v in zip(first, along, strict=True))
        results.append(torch.autograd.grad(total, [back, *chosen], materialize_grads=True))
    for i, (g, want) in enumerate(zip(*results, strict=True)):
        size = want.abs().max().item() + 1
        off = (g - want).abs().max().item()
        assert off <= 1e-10 * size, f"second order, {i}: off by {off:.3g} of {size:.3g}"
