# SPDX-License-Identifier: BSD-3-Clause
"""Whole ASPP heads on CUDA: the fused module against the one it replaces, by our kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from aspp_pairs import PAIRS, TIGHT, Pair, assert_all_close, features, randomise, train_step
from gpu_cases import BY_TRITON, DEVICE, IMPLEMENTATIONS, Kernels
from torch import nn

import aspp_ext
from aspp_ext import reference
from aspp_ext.modules import ASPP, fused, inference
from aspp_ext.testing import OPS, PROBLEMS, assert_no_worse_than_torch

pytestmark = pytest.mark.gpu
LAYOUTS = [torch.contiguous_format, torch.channels_last]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


@pytest.fixture(params=PAIRS)
def pair(request) -> Pair:
    return PAIRS[request.param]


@pytest.fixture(autouse=True)
def forced(monkeypatch) -> None:
    """Our kernels, whatever is known of them here."""
    monkeypatch.setenv("ASPP_EXT_BACKEND", "cuda")


HEADS = [(by, separable) for by in IMPLEMENTATIONS for separable in (False, True)]
each_head = pytest.mark.parametrize(
    ("by", "separable"), HEADS, ids=[f"{by}-{'separable' if s else 'dense'}" for by, s in HEADS]
)


def force(by: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASPP_EXT_BACKEND", by.backend)


def on_device(pair: Pair) -> tuple[nn.Module, nn.Module]:
    """Without dropout: which elements it drops depends on the memory format, and for float64
    PyTorch's convolution has one format only."""
    original, ours = pair.build()
    for module in (original, ours):
        module.project[3].p = 0.0
    return original.to(DEVICE), ours.to(DEVICE)


@each_layout
def test_eval(pair, layout) -> None:
    original, ours = (m.eval().to(memory_format=layout) for m in on_device(pair))
    with torch.no_grad():
        for n in (1, 2, 1):
            x = features(n).to(DEVICE).contiguous(memory_format=layout)
            got = ours(x)
            torch.testing.assert_close(got, original(x), **TIGHT)
            assert got.is_contiguous(memory_format=layout)


@each_layout
def test_training(pair, layout) -> None:
    original, ours = (m.to(memory_format=layout) for m in on_device(pair))
    for seed in range(2):
        x = features(seed=seed).to(DEVICE).contiguous(memory_format=layout)
        got, expected = (train_step(m, x, seed) for m in (ours, original))
        assert_all_close(got, expected, **TIGHT)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_head
def test_eval_in_low_precision(by, separable, dtype, layout, monkeypatch) -> None:
    """At a real width, where the sums are long."""
    force(by, monkeypatch)
    original = randomise(ASPP(512, [6, 12, 18], 64, separable=separable)).double().eval()
    original = original.to(DEVICE)
    x = torch.randn(2, 512, 33, 33).to(DEVICE, dtype)
    with torch.no_grad():
        plain = super(fused.FusedForward, original)
        oracle = plain.forward(x.double())
        original.to(dtype).to(memory_format=layout)
        x = x.contiguous(memory_format=layout)
        got, low = original(x), plain.forward(x)
    assert got.dtype == low.dtype == dtype
    assert_no_worse_than_torch(got.cpu(), low.cpu(), oracle.cpu())


OF_TRITON = [name for name in PAIRS if name.startswith("fused")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("by", "name"),
    [(by, name) for by in IMPLEMENTATIONS for name in (OF_TRITON if by is BY_TRITON else PAIRS)],
    ids=str,
)
def test_autocast(by, name, dtype, monkeypatch) -> None:
    force(by, monkeypatch)
    original, ours = (m.float().eval() for m in on_device(PAIRS[name]))
    x = features().to(DEVICE, torch.float32)
    with torch.no_grad():
        oracle = original.double()(x.double())
        original.float()
        with torch.autocast(DEVICE, dtype):
            got, low = ours(x), original(x)
    assert got.dtype == low.dtype == dtype
    allowed = 2 * (low - oracle).abs().max() + torch.finfo(dtype).eps * oracle.abs().max()
    assert (got - oracle).abs().max() <= allowed


@pytest.mark.parametrize("separable", [False, True], ids=["dense", "separable"])
def test_folded_weights_are_read_in_place(separable, monkeypatch) -> None:
    """channels_last with stride 1 over C, which neither kernel nor cuDNN has to copy."""
    calls = []
    real = inference.aspp_inference
    monkeypatch.setattr(
        inference, "aspp_inference", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    ours = randomise(ASPP(16, [2, 4], 8, separable=separable)).eval().to(DEVICE)
    with torch.no_grad():
        ours(torch.randn(1, 16, 9, 9, device=DEVICE))
    _, _, weights, _, _, pool, _, project, _ = calls[0]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    assert all(w.stride(1) == 1 for w in (*weights, pool, project))


@pytest.mark.triton
@pytest.mark.parametrize("name", PAIRS)
def test_training_by_triton(name, monkeypatch) -> None:
    """In float32, with products in float32: at most so many times as far off as PyTorch."""
    force(BY_TRITON, monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    original, ours = (m.float() for m in on_device(PAIRS[name]))
    exact = copy.deepcopy(original).double()
    x = features().to(DEVICE, torch.float32)
    got, low, oracle = (train_step(m, x.to(next(m.parameters()))) for m in (ours, original, exact))
    for key, want in oracle.items():
        if want.is_floating_point():
            error, own = ((t[key] - want).abs().max() for t in (got, low))
            # Gradients before a batch norm cancel: small ones are as far off as large ones.
            assert error <= 8 * own + 1e-4 * max(1.0, want.abs().max()), key


def test_the_cache_follows_changes_and_streams(pair) -> None:
    original, ours = (m.eval() for m in on_device(pair))
    x = features().to(DEVICE)
    with torch.no_grad():
        ours(x)
        for module in (original, ours):
            module.convs[0][0].weight.mul_(1.5)
            module.project[1].running_mean.add_(0.5)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = ours(x)
        stream.synchronize()
        torch.testing.assert_close(got, original(x), **TIGHT)


def test_inference_in_a_graph(pair) -> None:
    """Within a capture nothing may be kept: each replay folds what the parameters are then."""
    original, ours = (m.eval() for m in on_device(pair))
    x = features().to(DEVICE)
    with torch.no_grad():
        ours(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ours(x)
        for seed in range(3):
            x.copy_(features(seed=seed))
            graph.replay()
            torch.testing.assert_close(got, original(x), **TIGHT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in PAIRS if name.startswith("ours")])
def test_compile(name, training, fresh_compiler) -> None:
    original, ours = (m.train(training) for m in on_device(PAIRS[name]))
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for x in (features(2).to(DEVICE), features(3, height=8, width=5).to(DEVICE)):
        if training:
            got, expected = train_step(compiled, x), train_step(original, x)
            got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
            assert_all_close(got, expected, **TIGHT)
            ours.zero_grad()
            original.zero_grad()
        else:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), original(x), **TIGHT)


@pytest.mark.parametrize("name", ["ours separable", "fused smp separable"])
def test_separable_heads_run_unasked(name, monkeypatch) -> None:
    """By whatever runs unasked here."""
    monkeypatch.delenv("ASPP_EXT_BACKEND")
    original, ours = (m.eval() for m in on_device(PAIRS[name]))
    x = features().to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), original(x), **TIGHT)
    assert_all_close(train_step(ours.train(), x), train_step(original.train(), x), **TIGHT)


@pytest.mark.parametrize("pool", [True, False], ids=["pool", "no_pool"])
@pytest.mark.parametrize("head", ["head", "head_separable"])
@each_layout
def test_inference_operator(layout, head, pool) -> None:
    x, depthwise, weights, rates, shift, *rest = OPS[head].make(
        PROBLEMS["aspp"], torch.float64, device=DEVICE
    )
    depthwise = [d if d.numel() else None for d in depthwise]
    if not pool:
        rest = [None, None, rest[2][:, : shift.numel()], rest[3]]
    x = x.contiguous(memory_format=layout)
    pairs = [(rates[i], rates[i + 1]) for i in range(0, len(rates), 2)]
    arguments = (x, depthwise, weights, pairs, shift, *rest)
    got = aspp_ext.aspp_inference(*arguments, backend=DEVICE)
    torch.testing.assert_close(got, reference.aspp_inference(*arguments), **TIGHT)
    assert got.is_contiguous(memory_format=layout)
