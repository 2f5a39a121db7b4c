# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_pyramid_statistics`` and the training step of a dense head that is built on it.

By the CUDA kernels, emulated.
"""

from __future__ import annotations

import copy

import pytest
import statistics_checks as checks
import torch
from aspp_pairs import PAIRS, TIGHT, assert_all_close, features, train_step
from marks import on_emulated
from test_emulated_calls import ALLOWED, IN_PLACE, Emulation, kernels
from torch import nn

from aspp_ext.ops.pyramid_statistics import atrous_pyramid_statistics
from aspp_ext.testing import OPS, PROBLEMS

pytestmark = on_emulated
DENSE = [name for name in PAIRS if "separable" not in name]


@checks.each_precision
@checks.each_filled
def test_statistics(problem, dtype, tf32) -> None:
    checks.check_statistics(problem, dtype, tf32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_mean_costs_no_digits(dtype) -> None:
    checks.check_large_mean(dtype, "cpu")


@pytest.mark.parametrize("name", checks.CHECKED)
def test_opcheck(name) -> None:
    checks.check_operator(name, torch.bfloat16, "cpu")
    checks.check_operator(name, torch.float64, "cpu", grad=True)


def test_derivatives() -> None:
    checks.check_derivatives("cpu")


def test_autocast() -> None:
    checks.check_autocast("cpu")


def test_batching() -> None:
    checks.check_batching("cpu")


def test_refusals() -> None:
    checks.check_refusals("cpu")


def test_two_launches_and_no_pass_over_the_result() -> None:
    """The second call of a shape: the pyramid, and what puts the tiles' sums together."""
    emulation = Emulation()
    made = OPS["pyramid"].make(IN_PLACE, torch.bfloat16)[:3]
    emulation.calls_of(checks.operator(), *made)
    _, events = emulation.calls_of(checks.operator(), *made)
    assert {e["call"] for e in events} <= ALLOWED
    found = kernels(events)
    assert found.pop("pyramid_kernel") == 1
    assert list(found.values()) == [1]


def test_only_kernels_that_have_them_give_statistics(monkeypatch) -> None:
    x, weights, rates = OPS["pyramid"].make(PROBLEMS["one_branch"], torch.float32)[:3]
    y, *statistics = atrous_pyramid_statistics(x, weights, [tuple(rates)])
    checks.assert_statistics(y, *statistics)
    monkeypatch.setenv("ASPP_EXT_BACKEND", "reference")
    y, *statistics = atrous_pyramid_statistics(x, weights, [tuple(rates)])
    assert y.shape[0] == x.shape[0]
    assert statistics == [None, None]


@pytest.fixture
def given(monkeypatch) -> list[tuple]:
    return checks.spied(monkeypatch)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", DENSE)
def test_training(name, layout, given) -> None:
    original, ours = PAIRS[name].build()
    for module in (original, ours):
        module.project[3].eval()  # which elements it drops depends on the memory format
    for seed in range(2):
        x = features(seed=seed).contiguous(memory_format=layout)
        got, expected = (train_step(m, x, seed) for m in (ours, original))
        assert_all_close(got, expected, **TIGHT)
    assert len(given) == 2
    assert all(squares is not None for _, _, squares in given)


def test_training_under_autocast(given) -> None:
    original, ours = (m.float() for m in PAIRS["ours dense"].build())
    for module in (original, ours):
        module.project[3].eval()
    x = features().float()
    exact = copy.deepcopy(original).double()(features())
    with torch.autocast("cpu", torch.bfloat16):
        low, got = original(x), ours(x)
    assert given[0][0].dtype == got.dtype == torch.bfloat16
    allowed = 2 * (low - exact).abs().max() + 2**-7 * exact.abs().max()
    assert (got - exact).abs().max() <= allowed
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    for module in (original, ours):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.num_batches_tracked == 1


def test_compiled_training_step(fresh_compiler) -> None:
    original, ours = PAIRS["ours dense"].build()
    for module in (original, ours):
        module.project[3].eval()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for x in (features(2), features(3, height=8, width=5)):
        got, expected = train_step(compiled, x), train_step(original, x)
        got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
        assert_all_close(got, expected, **TIGHT)
        ours.zero_grad()
        original.zero_grad()
