# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_pyramid_statistics`` on CUDA, and the training step of a dense head built on it."""

from __future__ import annotations

import copy

import pytest
import statistics_checks as checks
import torch
from aspp_pairs import PAIRS, TIGHT, assert_all_close, features, train_step
from gpu_cases import BY_CUDA, DEVICE, IMPLEMENTATIONS, Kernels
from table import dtype_id
from test_joint_norm import make_norms, make_y, one_by_one, statistics_of, step

from aspp_ext.modules.joint_norm import joint_norm
from aspp_ext.testing import OPS, PROBLEMS

pytestmark = pytest.mark.gpu
DENSE = [name for name in PAIRS if "separable" not in name]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def by(request, monkeypatch) -> Kernels:
    """Their kernels, whatever is known of them here."""
    monkeypatch.setenv("ASPP_EXT_BACKEND", request.param.backend)
    monkeypatch.setattr(checks, "FAMILY", request.param.family)
    return request.param


@pytest.fixture
def by_cuda(monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_BACKEND", BY_CUDA.backend)


each_of = pytest.mark.parametrize(
    ("by", "dtype", "tf32"),
    [
        pytest.param(by, dtype, tf32, id=f"{by}-{dtype_id(dtype)}{'-tf32' * tf32}")
        for by in IMPLEMENTATIONS
        for dtype, tf32 in by.precisions("pyramid")
    ],
    indirect=["by"],
)


@each_of
@checks.each_filled
def test_statistics(problem, by, dtype, tf32) -> None:
    checks.check_statistics(problem, dtype, tf32, DEVICE)


def test_a_large_mean_costs_no_digits(by) -> None:
    for dtype in {torch.float32, by.widest}:
        checks.check_large_mean(dtype, DEVICE)


@pytest.mark.parametrize("name", checks.CHECKED)
def test_opcheck(by, name) -> None:
    checks.check_operator(name, torch.bfloat16, DEVICE)
    checks.check_operator(name, by.widest, DEVICE, grad=True)


def test_derivatives(by_cuda) -> None:
    checks.check_derivatives(DEVICE)


def test_autocast(by) -> None:
    checks.check_autocast(DEVICE)


def test_batching(by) -> None:
    checks.check_batching(DEVICE)


def test_refusals(by) -> None:
    checks.check_refusals(DEVICE)


def test_in_a_graph(by) -> None:
    x, weights, rates = checks.arguments(PROBLEMS["aspp"], torch.float32, DEVICE)
    checks.operator()(x, weights, rates)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = checks.operator()(x, weights, rates)
    for draw in range(3):
        x.copy_(OPS["pyramid"].make(PROBLEMS["aspp"], torch.float32, draw=draw)[0])
        graph.replay()
        assert all(map(torch.equal, got, checks.operator()(x, weights, rates)))


@each_layout
@pytest.mark.parametrize("affine", ["affine", "no_bias", "not_affine"])
def test_joint_norm(affine, layout) -> None:
    norms = make_norms(affine=affine != "not_affine", bias=affine == "affine").to(DEVICE)
    twin = copy.deepcopy(norms)
    y = make_y().to(DEVICE).contiguous(memory_format=layout)
    got = step(lambda norms, y: joint_norm(norms, y, *statistics_of(y)), norms, y)
    assert_all_close(got, step(one_by_one, twin, y), **TIGHT)


@each_layout
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_joint_norm_in_low_precision(dtype, layout) -> None:
    norms = make_norms(torch.float32).to(DEVICE)
    y = make_y(dtype).to(DEVICE).contiguous(memory_format=layout)
    oracle = step(one_by_one, copy.deepcopy(norms).double(), y.double())
    low = step(one_by_one, copy.deepcopy(norms), y)
    got = step(lambda norms, y: joint_norm(norms, y, *statistics_of(y)), norms, y)
    for name, want in oracle.items():
        assert got[name].dtype == low[name].dtype
        error = (got[name] - want).abs().max()
        rounding = torch.finfo(dtype).eps * want.abs().max()
        assert error <= 2 * (low[name] - want).abs().max() + rounding, name


@pytest.fixture
def given(monkeypatch) -> list[tuple]:
    """What the training steps are given."""
    return checks.spied(monkeypatch)


@each_layout
@pytest.mark.parametrize("name", DENSE)
def test_training(name, layout, given, by_cuda) -> None:
    original, ours = (m.to(DEVICE).to(memory_format=layout) for m in PAIRS[name].build())
    for module in (original, ours):
        module.project[3].eval()  # which elements it drops depends on the memory format
    for seed in range(2):
        x = features(seed=seed).to(DEVICE).contiguous(memory_format=layout)
        got, expected = (train_step(m, x, seed) for m in (ours, original))
        assert_all_close(got, expected, **TIGHT)
    assert len(given) == 2
    assert all(squares is not None for _, _, squares in given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast(by, dtype, given) -> None:
    original, ours = (m.float().to(DEVICE) for m in PAIRS["ours dense"].build())
    for module in (original, ours):
        module.project[3].eval()
    x = features().to(DEVICE)
    exact = copy.deepcopy(original).double()(x)
    with torch.autocast(DEVICE, dtype):
        low, got = original(x.float()), ours(x.float())
    assert given[0][0].dtype == got.dtype == dtype
    assert given[0][1].dtype == torch.float32
    allowed = 2 * (low - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= allowed
    got.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


def test_compiled_training_step(by_cuda, fresh_compiler) -> None:
    original, ours = (m.to(DEVICE) for m in PAIRS["ours dense"].build())
    for module in (original, ours):
        module.project[3].eval()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for x in (features(2), features(3, height=8, width=5)):
        got, expected = (train_step(m, x.to(DEVICE)) for m in (compiled, original))
        got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
        assert_all_close(got, expected, **TIGHT)
        ours.zero_grad()
        original.zero_grad()
