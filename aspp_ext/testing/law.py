# SPDX-License-Identifier: BSD-3-Clause
"""The error law, and memory in which what nobody has written shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def _summary(error: Tensor, oracle: Tensor) -> dict[str, float]:
    size = error.abs()
    # A signed mean hides truncation towards zero where values are symmetric; the mean along the
    # value's own sign does not.
    return {
        "max": size.max().item(),
        "99.9 %": size.quantile(0.999).item() if size.numel() < 2**24 else size.max().item(),
        "mean": error.mean().abs().item(),
        "mean along the sign": (error * oracle.sign()).mean().abs().item(),
    }


def why_worse_than_torch(
    actual: Tensor, baseline: Tensor, reference64: Tensor, factor: float = 2.0
) -> str | None:
    """The error law: at most ``factor`` times PyTorch's own error, plus one rounding.

    Holds for the largest error and the 99.9 percentile. The mean error, as it is and along the
    sign of the value, may exceed ``factor`` times PyTorch's own only by what chance explains.

    Args:
        actual: the result under test.
        baseline: PyTorch's own result in the same dtype.
        reference64: the same from the same inputs in float64.

    Returns:
        None, or a sentence with both errors for each of the four measures that is too large.

    Raises:
        ValueError: the oracle is not float64, or not finite.
    """
    if reference64.dtype != torch.float64:
        raise ValueError(f"the oracle must be float64, got {reference64.dtype}")
    if actual.dtype != baseline.dtype:
        return f"dtype {actual.dtype}, expected {baseline.dtype}"
    if actual.shape != reference64.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(reference64.shape)}"
    if actual.numel() == 0:
        return None
    if not reference64.isfinite().all():
        raise ValueError("the oracle must be finite")
    if not actual.isfinite().all():
        return f"{(~actual.isfinite()).sum()} values are not finite"
    oracle = reference64.flatten()
    ours = _summary(actual.double().flatten() - oracle, oracle)
    theirs = _summary(baseline.double().flatten() - oracle, oracle)
    rounding = torch.finfo(actual.dtype).eps / 2 * oracle.abs().max().item()
    by_chance = 6 * max(theirs["99.9 %"], rounding) / oracle.numel() ** 0.5
    slack = {"max": rounding, "99.9 %": rounding}
    bad = [
        f"{measure}: {ours[measure]:.3g}, PyTorch's {theirs[measure]:.3g}"
        for measure in ours
        if not ours[measure] <= factor * theirs[measure] + slack.get(measure, by_chance)
    ]
    if not bad:
        return None
    return f"errors above {factor}x PyTorch's own plus one rounding: {'; '.join(bad)}"


def assert_no_worse_than_torch(
    actual: Tensor, baseline: Tensor, reference64: Tensor, factor: float = 2.0
) -> None:
    """:func:`why_worse_than_torch` as an assertion.

    Raises:
        AssertionError: with its sentence.
    """
    __tracebackhide__ = True
    if (why := why_worse_than_torch(actual, baseline, reference64, factor)) is not None:
        raise AssertionError(why)


def of_eleven_bits(arguments: Any) -> Any:
    """float32 tensors with the 13 last bits rounded away, ties away from zero: as TF32 has them."""

    def rounded(t: Tensor) -> Tensor:
        if t.dtype != torch.float32:
            return t
        return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return tree_map_only(Tensor, rounded, arguments)


@contextlib.contextmanager
def nan_poison() -> Iterator[None]:
    """Memory PyTorch hands out uninitialised, to C++ as well, is full of NaN inside."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
