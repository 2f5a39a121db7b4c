# SPDX-License-Identifier: BSD-3-Clause
"""The text of :func:`aspp_ext.explain`: who runs a pyramid, the plan, its least cost."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _gpu, _native, _triton
from .dispatch import IMPLEMENTATIONS, Implementation, Problem, device_name, select
from .evidence import rulings
from .ops import checks
from .ops.polyphase_choice import describe, polyphase_choices, why_never
from .ops.precision import allows_tf32
from .ops.separable_choice import fused_choice

if TYPE_CHECKING:
    from . import _plan


def _kernels(name: str, problem: Problem) -> str:
    """Which of an implementation's kernels run, in brackets; empty where there is no choice."""
    if name == "cpu" and _native.cpu_missing is None:
        return f" ({torch.ops.aspp_ext.cpu_isa()})"
    if name == "triton" and _triton.interpreted:
        return " (interpreted)"
    if name in ("cuda", "triton"):
        products = ["in TF32"] if allows_tf32(problem.x) else []
        return f" ({', '.join([_gpu.architecture(problem.x.device), *products])})"
    return ""


def _evidence(candidate: Implementation, problem: Problem) -> str:
    """What was seen of it on this device, for such a call."""
    device = problem.x.device
    where, cell = device_name(device.type, device.index), problem.cell(candidate.name)
    return rulings.in_favour(where, cell, problem.size_class)


def _candidates(problem: Problem) -> list[str]:
    chosen = select(problem).name
    lines = []
    for candidate in IMPLEMENTATIONS[problem.op]:
        verdict, unproven = "could run", None
        if (reason := candidate.why_not(problem)) is not None:
            verdict = f"cannot: {reason}"
        elif (unproven := candidate.unproven(problem)) is not None:
            verdict = f"not unasked: {unproven}"
        if candidate.name == chosen:
            why = f"asked for by name: {unproven}" if unproven else _evidence(candidate, problem)
            verdict = f"runs this{_kernels(chosen, problem)}{f', {why}' if why else ''}"
        lines.append(f"  {candidate.name:<10} {verdict}")
    return lines


def _branches(
    kernels: Sequence[tuple[int, int]], rates: Sequence[int], outs: Sequence[int]
) -> list[Any]:
    from . import _plan

    return [
        _plan.Branch(kernel=k, rate=(rates[2 * b], rates[2 * b + 1]), out_channels=outs[b])
        for b, k in enumerate(kernels)
    ]


def _plan_lines(
    x: Tensor, kernels: Sequence[tuple[int, int]], rates: Sequence[int], outs: Sequence[int]
) -> list[str]:
    try:
        from . import _plan
    except ImportError as error:
        return [f"  no plan: the planner was not built ({error})"]
    n, c, h, w = (int(s) for s in x.shape)
    problem = _plan.Problem(n, h, w, _branches(kernels, rates, outs), in_channels=c)
    lines = ["  branch  kernel  rate      regions  live taps"]
    for b, kernel in enumerate(kernels):
        rate = f"{rates[2 * b]}x{rates[2 * b + 1]}"
        size = f"{kernel[0]}x{kernel[1]}"
        regions = [r for r in problem.regions(b) if r.tap_count]
        lines.append(
            f"  {b:<6}  {size:<6}  {rate:<8}  {len(regions):<7}  {problem.live_share(b):6.1%}"
        )
    return lines


def _tile_lines(
    x: Tensor,
    separable: bool,
    kernels: Sequence[tuple[int, int]],
    rates: Sequence[int],
    outs: Sequence[int],
) -> list[str]:
    """What Triton's forward kernel runs with: its tile, and the units of the plan for it."""
    from . import _plan
    from .triton import target as targets
    from .triton import tuning
    from .triton.configurations import gather_candidates
    from .triton.separable_configurations import separable_candidates

    target = targets.target_of(x.device)
    products = "tf32" if allows_tf32(x) else "ieee"
    if separable:
        candidates = separable_candidates(target, x.dtype, products, max(outs), False)
    else:
        candidates = gather_candidates(target, "forward", x.dtype, products, max(outs))
    tile = candidates[0]
    n, c, h, w = (int(s) for s in x.shape)
    problem = _plan.Problem(n, h, w, _branches(kernels, rates, outs), in_channels=c)
    planned = _plan.work_list(
        problem,
        "separable" if separable else "forward",
        tile=_plan.Tile(*tile.tile, tail=max(tile.m // 2, 1)),
        workers=target.processors,
    )
    units = len(planned.launch_order) // 4
    cut = f", {planned.partials} of them slices of a sum" if planned.partials else ""
    tuned = ", unless a record names another tile" if tuning.mode() and candidates[1:] else ""
    return [f"  tile    {tile}: {units} units on {target.processors} processors{cut}{tuned}"]


def _separable_on_cuda(
    x: Tensor, kernels: Sequence[tuple[int, int]], rates: Sequence[int], outs: Sequence[int]
) -> str:
    """How CUDA's forward of a separable pyramid is computed: fused, or through memory."""
    return describe_choice(fused_choice(x, kernels, rates, outs)) if x.is_cuda else ""


def describe_choice(choice: _plan.FusedChoice) -> str:
    """In words; costs count taps of depthwise work on a pixel, of all branches."""

    def way(first: bool, names: tuple[str, str], costs: tuple[float, float]) -> str:
        chosen, other = (0, 1) if first else (1, 0)
        against = f"{costs[chosen]:.1f} taps a pixel against {costs[other]:.1f} {names[other]}"
        return f"{names[chosen]}, {against}"

    plain = f"through memory: {choice.why_not}"
    if not choice.why_not:
        costs = (choice.fused, choice.stored)
        plain = way(choice.is_fused, ("fused", "through memory"), costs)
    costs = (choice.recomputed_batch_norm, choice.stored_batch_norm)
    names = ("depthwise results computed again", "stored")
    normed = way(choice.recomputes_in_batch_norm, names, costs)
    return f"{plain}; with a training batch norm between: {normed}"


def _polyphase_lines(
    x: Tensor,
    kernels: Sequence[tuple[int, int]],
    rates: Sequence[int],
    outs: Sequence[int],
    polyphase: bool,
) -> list[str]:
    """The CPU's way through each branch of this call, which combines the weights' taps itself, and
    of a module in eval mode, which keeps them combined."""
    if (reason := why_never(x, polyphase)) is not None:
        return ["this call", f"  all     directly: {reason}"]
    item = 8 if x.dtype == torch.float64 else 4
    lines = []
    for who, prepared in (
        ("this call", False),
        ("a module in eval mode, whose weights are prepared", True),
    ):
        choices = polyphase_choices(x, kernels, rates, outs, prepared=prepared)
        lines.append(who)
        for b, choice in enumerate(choices):
            lines.append(f"  {b:<6}  {describe(choice, item * int(x.shape[1]) * outs[b])}")
    return lines


def _work(
    x: Tensor, kernels: Sequence[tuple[int, int]], rates: Sequence[int], outs: Sequence[int | None]
) -> tuple[float, float]:
    """(useful, dense) FLOPs of the spatial convolutions; an out of None is depthwise."""
    n, c, h, w = (int(s) for s in x.shape)
    useful = dense = 0.0
    for b, (kh, kw) in enumerate(kernels):
        live = 1
        for size, kernel, rate in ((h, kh, rates[2 * b]), (w, kw, rates[2 * b + 1])):
            live *= sum(max(0, size - abs(t - kernel // 2) * rate) for t in range(kernel))
        products = 2.0 * n * c * (outs[b] or 1)
        useful += products * live
        dense += products * kh * kw * h * w
    return useful, dense


def _check_lists(op: str, weights: Any, depthwise: Any) -> None:
    lists = {"weights" if depthwise is None else "pointwise_weights": weights}
    if depthwise is not None:
        lists["depthwise_weights"] = depthwise
    for name, tensors in lists.items():
        checks.check_list(op, name, tensors)
        for b, t in enumerate(tensors):
            if t is not None or name != "depthwise_weights":
                checks.check_tensor(op, f"{name}[{b}]", t)


def explain_pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    atrous_rates: Sequence[int | tuple[int, int]],
    depthwise_weights: Sequence[Tensor | None] | None,
    polyphase: bool = True,
) -> str:
    checks.check_flag("explain", "polyphase", polyphase)
    separable = depthwise_weights is not None
    op = "atrous_separable_pyramid" if separable else "atrous_pyramid"
    checks.check_tensor(op, "x", x)
    _check_lists(op, weights, depthwise_weights)
    rates = checks.flat_rates(op, atrous_rates)
    if depthwise_weights is not None:
        depthwise = [x.new_empty((0,)) if d is None else d for d in depthwise_weights]
        channels = checks.check_separable(op, x, depthwise, weights, rates)
        spatial = [d if d.numel() else p for d, p in zip(depthwise, weights, strict=True)]
        given = tuple(d for d in depthwise if d.numel())
    else:
        x, weights = checks.as_rows(op, x, weights)
        channels = checks.check_dense(op, x, weights, rates)
        spatial, given = list(weights), ()
    kernels = [(int(s.size(2)), int(s.size(3))) for s in spatial]
    outs = [int(w.size(0)) for w in weights]
    is_depthwise = [separable and s is not w for s, w in zip(spatial, weights, strict=True)]
    depthwise_outs = [None if d else o for d, o in zip(is_depthwise, outs, strict=True)]
    useful, dense = _work(x, kernels, rates, depthwise_outs)
    n, c, h, w = (int(s) for s in x.shape)
    pointwise = (
        2.0 * n * h * w * c * sum(o for o, d in zip(outs, depthwise_outs, strict=True) if d is None)
    )
    held = sum(t.numel() for t in (*given, *weights))
    moved = x.element_size() * (x.numel() + n * channels * h * w + held)
    dtype = checks.dtype_name(x.dtype)
    problem = Problem(op, x, tuple(weights), given)
    chosen = select(problem).name
    details = _tile_lines(x, separable, kernels, rates, outs) if chosen == "triton" and n else []
    if separable and n and IMPLEMENTATIONS[op][0].why_not(problem) is None:
        way = _separable_on_cuda(x, kernels, rates, outs)
        details += [f"  cuda    {way}"] if way else []
    if chosen == "cpu" and not (separable or _native.emulated) and n:
        with contextlib.suppress(ImportError):  # which the plan's lines tell
            details += _polyphase_lines(x, kernels, rates, outs, polyphase)
    lines = [
        f"{op}  {list(x.shape)} -> {channels} channels, {dtype}, {x.device}",
        "implementations",
        *_candidates(problem),
        "plan",
        *_plan_lines(x, kernels, rates, outs),
        *details,
        "work",
        f"  spatial    {useful / 1e9:.2f} GFLOP useful of {dense / 1e9:.2f} dense: "
        f"{1 - useful / dense if dense else 0:.1%} skipped",
    ]
    if pointwise:
        lines.append(f"  pointwise  {pointwise / 1e9:.2f} GFLOP")
    intensity = (useful + pointwise) / moved
    lines.append(f"  traffic    {moved / 1e6:.1f} MB at least: {intensity:.0f} FLOP per byte")
    return "\n".join(lines)
