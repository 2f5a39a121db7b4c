# SPDX-License-Identifier: BSD-3-Clause
"""How CUDA computes a separable pyramid: fused or through memory, stored or computed again.

The costs are those of csrc/cuda/fused_choice.h, worked out here from the live taps.
"""

from __future__ import annotations

import pytest

from aspp_ext import _plan
from aspp_ext.explanation import describe_choice

POINTWISE, STORED = 4, 4  # what 256 outputs, and a round trip through memory, cost in taps
HOPPER, AMPERE, CONSUMER = (kib << 10 for kib in (227, 163, 99))
EASY = {"65x65": (65, (12, 24, 36)), "33x33": (33, (6, 12, 18))}


def problem(size: int, rates: tuple[int, ...], outs: int = 256, kernel: int = 3) -> _plan.Problem:
    """A plain branch and one per rate, on a square map of 2048 channels."""
    branches = [_plan.Branch(out_channels=outs)]
    branches += [_plan.Branch(kernel, rate, outs) for rate in rates]
    return _plan.Problem(8, size, size, branches, in_channels=2048)


def live_taps(size: int, rates: tuple[int, ...], kernel: int = 3) -> float:
    """Of all branches, of an average pixel."""

    def share(rate: int) -> float:
        offsets = [abs(t - kernel // 2) * rate for t in range(kernel)]
        return sum(max(0, size - o) for o in offsets) / size

    return sum(share(rate) ** 2 for rate in rates)


@pytest.mark.parametrize("math", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("name", EASY)
def test_a_pyramid_of_256_outputs_on_227_kib(name, math) -> None:
    """Fused; and a batch norm's statistics are not worth storing what they are made of."""
    size, rates = EASY[name]
    live, products = live_taps(size, rates), len(rates) * POINTWISE
    choice = _plan.choose_fused(problem(size, rates), math, HOPPER)
    assert (choice.shape, choice.most_taps, choice.why_not) == (0, 9, "")
    assert choice.fused == pytest.approx(live + products)
    assert choice.stored == pytest.approx(live + products + len(rates) * STORED)
    assert choice.recomputed_batch_norm == pytest.approx(2 * live + products)
    assert choice.stored_batch_norm == pytest.approx(live + products + 2 * len(rates) * STORED)
    assert choice.is_fused
    assert choice.recomputes_in_batch_norm


def test_narrow_tiles_compute_the_taps_twice() -> None:
    """In 163 KiB the halo of 65x65 leaves room for 128 columns of 256; that of 33x33 for all."""
    size, rates = EASY["65x65"]
    live, products = live_taps(size, rates), len(rates) * POINTWISE
    choice = _plan.choose_fused(problem(size, rates), "bfloat16", AMPERE)
    assert choice.shape == 1
    assert choice.fused == pytest.approx(2 * live + products)
    assert not choice.is_fused
    again = 2 * live + products + len(rates) * STORED
    assert choice.recomputed_batch_norm == pytest.approx(again)
    assert not choice.recomputes_in_batch_norm
    assert _plan.choose_fused(problem(*EASY["33x33"]), "bfloat16", AMPERE).is_fused


def test_float32_has_narrow_tiles_alone() -> None:
    choice = _plan.choose_fused(problem(*EASY["65x65"]), "float32", HOPPER)
    assert choice.shape == 1
    assert not choice.is_fused
    assert _plan.choose_fused(problem(*EASY["65x65"], outs=128), "float32", HOPPER).is_fused


HALO, TAPS = (
    "a tile's halo of {} pixels does not fit in a block's 101376 bytes of shared memory".format,
    "a branch has {} live taps, the fused kernel takes 32".format,
)
IMPOSSIBLE = {
    "65x65 in 99 KiB": (problem(65, (12, 24, 36)), "bfloat16", CONSUMER, HALO(330)),
    "33x33 in 99 KiB": (problem(33, (6, 12, 18)), "float16", CONSUMER, HALO(230)),
    "49 live taps": (problem(65, (1,), kernel=7), "tf32", HOPPER, TAPS(49)),
    "float64": (problem(9, (1,)), "float64", HOPPER, "float64 has no fused kernel"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_fused(name) -> None:
    """Says why, and is still chosen about: with a batch norm it is computed twice by memory."""
    given, math, shared, why_not = IMPOSSIBLE[name]
    choice = _plan.choose_fused(given, math, shared)
    assert choice.why_not == why_not
    assert (choice.shape, choice.halo_pixels, choice.most_taps, choice.fused) == (-1, 0, 0, 0)
    assert not choice.is_fused
    kernels = [(b.kernel[0], b.rate[0]) for b in given.branches if b.kernel != (1, 1)]
    live = sum(live_taps(given.height, (rate,), kernel) for kernel, rate in kernels)
    assert choice.recomputed_batch_norm == pytest.approx(choice.stored + live)
    assert choice.stored_batch_norm == pytest.approx(choice.stored + len(kernels) * STORED)
    assert describe_choice(choice).startswith(f"through memory: {why_not}; with a training batch")


def test_taps_beyond_the_map_do_not_count() -> None:
    assert _plan.choose_fused(problem(9, (3,), kernel=7), "bfloat16", HOPPER).most_taps == 25
    lonely = _plan.choose_fused(problem(9, (9,)), "float64", HOPPER)
    assert lonely.recomputes_in_batch_norm  # one tap costs less than a pass over memory


def test_wide_outputs() -> None:
    """Fused, each tile's width of 256 has its own taps: four times for 1024 outputs."""
    size, rates = EASY["65x65"]
    live, products = live_taps(size, rates), 4 * len(rates) * POINTWISE
    choice = _plan.choose_fused(problem(size, rates, outs=1024), "bfloat16", HOPPER)
    assert choice.why_not == ""
    assert choice.fused == pytest.approx(4 * live + products)
    assert not choice.is_fused
    assert choice.recomputed_batch_norm == pytest.approx(2 * live + products + 3 * STORED)
    assert not choice.recomputes_in_batch_norm


def test_many_live_taps_are_stored_for_a_batch_norm() -> None:
    """Nearly nine of them at small rates: fused, but not computed twice."""
    choice = _plan.choose_fused(problem(65, (1, 2)), "bfloat16", HOPPER)
    assert choice.is_fused
    assert not choice.recomputes_in_batch_norm


def test_plain_branches_cost_nothing() -> None:
    choice = _plan.choose_fused(problem(33, ()), "bfloat16", HOPPER)
    assert (choice.fused, choice.stored, choice.stored_batch_norm) == (0, 0, 0)
    assert choice.is_fused


def test_it_is_described() -> None:
    assert describe_choice(_plan.choose_fused(problem(*EASY["65x65"]), "tf32", HOPPER)) == (
        "fused, 27.6 taps a pixel against 39.6 through memory; with a training batch norm between: "
        "depthwise results computed again, 43.2 taps a pixel against 51.6 stored"
    )
    assert describe_choice(_plan.choose_fused(problem(65, (1, 2), 1024), "tf32", HOPPER)) == (
        "through memory, 57.5 taps a pixel against 101.8 fused; with a training batch norm "
        "between: stored, 65.5 taps a pixel against 74.9 depthwise results computed again"
    )


def test_another_math_is_refused() -> None:
    with pytest.raises(ValueError, match="but is 'int8'"):
        _plan.choose_fused(problem(9, (1,)), "int8", HOPPER)  # type: ignore[arg-type]
