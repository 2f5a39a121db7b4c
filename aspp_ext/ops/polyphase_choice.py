# SPDX-License-Identifier: BSD-3-Clause
"""How the CPU computes each branch of a dense pyramid: tap by tap or by minimal filtering.

The planner weighs the two (csrc/plan/polyphase.h); this file tells it, and the reader, what the
kernel does (csrc/cpu/minimal_forms.cpp).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .. import _plan

POLICY = "ASPP_EXT_POLYPHASE"

NEVER, BY_COST, ALWAYS = range(3)
"""The operators' argument ``polyphase``; True and False mean the same in its place."""

_NAMES = {"": BY_COST, "0": NEVER, "1": BY_COST, "always": ALWAYS}


class Decided(int):
    """What :func:`policy` has said, for the other functions of a call, in place of the keyword."""


def policy(polyphase: bool | Decided = True) -> int:
    """What a call's operators are told, of its keyword and of ``ASPP_EXT_POLYPHASE``.

    Read once in a call, so that its gradients keep it, as a trace does. No kernel reads the
    environment, which another thread may be writing.

    Raises:
        ValueError: the environment has another value than 0, 1 or always.
    """
    if isinstance(polyphase, Decided):
        return int(polyphase)
    name = os.environ.get(POLICY, "")
    if name not in _NAMES:
        raise ValueError(f"{POLICY} must be 0, 1 or always, got '{name}'")
    return _NAMES[name] if polyphase else NEVER


def polyphase_choices(
    x: Tensor,
    kernels: Sequence[tuple[int, int]],
    rates: Sequence[int],
    outs: Sequence[int],
    *,
    prepared: bool,
) -> list[_plan.PolyphaseChoice]:
    """Per branch what each way costs on x ``[N, C, H, W]``, N at least 1.

    Args:
        kernels: per branch the kernel's (kh, kw).
        rates: (rate_h, rate_w) of every branch, flat.
        outs: per branch its output channels.
        prepared: the weights' combinations outlive the call, as in a module in eval mode.

    Raises:
        ImportError: the planner was not built.
    """
    from .. import _plan

    n, c, h, w = (int(s) for s in x.shape)
    branches = [
        _plan.Branch(kernel=kernel, rate=(rates[2 * b], rates[2 * b + 1]), out_channels=outs[b])
        for b, kernel in enumerate(kernels)
    ]
    # What is prepared serves batches of any size, and is chosen for one image.
    problem = _plan.Problem(1 if prepared else n, h, w, branches, in_channels=c)
    return [_plan.choose_polyphase(problem, b, prepared=prepared) for b in range(len(branches))]


def why_never(x: Tensor, polyphase: bool) -> str | None:
    """Why no branch of this call is filtered minimally, whatever it costs; None if one may be."""
    if not polyphase:
        return "polyphase=False"
    if policy() == NEVER:
        return f"{POLICY}=0"
    if x.dtype == torch.bfloat16 and torch.ops.aspp_ext.cpu_isa() == "isa_avx512bf16":
        return "products are in bfloat16, in which combinations of inputs lose too many digits"
    return None


def is_minimal(choice: _plan.PolyphaseChoice) -> bool:
    """Whether the kernel filters a branch minimally, where nothing forbids it."""
    return choice.is_polyphase or (choice.form is not None and policy() == ALWAYS)


def describe(choice: _plan.PolyphaseChoice, matrix_bytes: int) -> str:
    """In words; costs count GEMM rows, a row being C * O multiply-adds."""
    if choice.form is None:
        return f"directly: {choice.why_not}"
    costs = f"{choice.polyphase:.0f} GEMM rows against {choice.direct:.0f} directly"
    if not is_minimal(choice):
        return f"directly: minimal filtering would cost {costs}"
    form = choice.form
    megabytes = form.matrices * matrix_bytes / 1e6
    asked = "" if choice.is_polyphase else f", by {POLICY}=always"
    return (
        f"minimal filtering: {form.row_products}x{form.column_products} products of "
        f"{blocks(form)} blocks, {form.matrices} matrices ({megabytes:.3g} MB): {costs}{asked}"
    )


def blocks(form: _plan.PolyphaseForm) -> str:
    """What sequences are cut into; rows x columns where these differ."""
    rows, columns = (
        "+".join(["one", *(kind for kind, used in side.items() if used)])
        for side in (form.rows, form.columns)
    )
    return rows if rows == columns else f"{rows} x {columns}"
