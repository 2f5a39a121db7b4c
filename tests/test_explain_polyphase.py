# SPDX-License-Identifier: BSD-3-Clause
"""What explain says of minimal filtering, beside what the kernel does."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

import aspp_ext
from aspp_ext.ops import polyphase_weights
from aspp_ext.ops.polyphase_choice import blocks

SIZE, KERNELS, RATES = (1, 64, 33, 33), (1, 3, 3, 5), (1, 12, 6, 6)
CALL, MODULE = "this call", "a module in eval mode, whose weights are prepared"


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return torch.empty(SIZE, dtype=dtype), [torch.empty(64, 64, k, k, dtype=dtype) for k in KERNELS]


def said(x: torch.Tensor, weights: list[torch.Tensor], **options: bool) -> dict[str, list[str]]:
    """Of a call and of a module the lines about their branches."""
    found: dict[str, list[str]] = {}
    for line in aspp_ext.explain(x, weights, RATES, **options).splitlines():
        if not line.startswith(" "):
            found[line] = []
        else:
            found[next(reversed(found))].append(line[2:].partition("  ")[2].strip())
    return {who: found[who] for who in (CALL, MODULE) if who in found}


@pytest.mark.parametrize("policy", ["", "1", "always"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_it_says_what_the_kernel_does(dtype, policy, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", policy)
    x, weights = operands(dtype)
    prepared = polyphase_weights(weights, RATES, *SIZE[2:])
    lines = said(x, weights)
    if MODULE not in lines:
        assert dtype == torch.bfloat16
        assert torch.ops.aspp_ext.cpu_isa() == "isa_avx512bf16"
        assert not any(p.numel() for p in prepared)
        return
    for line, p, weight in zip(lines[MODULE], prepared, weights, strict=True):
        found = re.search(r"(\d+) matrices \((\S+) MB\)", line)
        assert bool(found) == line.startswith("minimal filtering") == bool(p.numel())
        if found:
            assert int(found[1]) == p.numel() // weight[:, :, 0, 0].numel()
            assert float(found[2]) == pytest.approx(p.nbytes / 1e6, rel=0.01)


def test_it_says_why(monkeypatch) -> None:
    """Which forms are the cheapest is the planner's to say, and may change with its costs."""
    x, weights = operands()
    plain, cheaper, _, wide = said(x, weights)[MODULE]
    assert plain == "directly: minimal filtering saves nothing of a 1x1 kernel"
    assert re.fullmatch(
        r"minimal filtering: \d+x\d+ products of [a-z+ ]+ blocks, \d+ matrices \([\d.]+ MB\): "
        r"\d+ GEMM rows against \d+ directly",
        cheaper,
    )
    assert wide.startswith("directly: minimal filtering needs 1 or 3 taps")
    x, weights = x[:, :4], [w[:4, :4] for w in weights]
    assert said(x, weights)[CALL][1].startswith("directly: minimal filtering would cost ")
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    assert said(x, weights)[CALL][1].endswith(" directly, by ASPP_EXT_POLYPHASE=always")


def test_it_names_the_blocks() -> None:
    kinds = {"pair": False, "triple": True, "overlapped": True}
    form = SimpleNamespace(rows=kinds, columns=kinds)
    assert blocks(form) == "one+triple+overlapped"
    form.columns = dict.fromkeys(kinds, False)
    assert blocks(form) == "one+triple+overlapped x one"


def test_it_says_what_switches_it_off(monkeypatch) -> None:
    x, weights = operands()
    assert said(x, weights, polyphase=False) == {CALL: ["directly: polyphase=False"]}
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "0")
    assert said(x, weights) == {CALL: ["directly: ASPP_EXT_POLYPHASE=0"]}
    with pytest.raises(TypeError, match="explain: polyphase must be True or False, got 1"):
        aspp_ext.explain(x, weights, RATES, polyphase=1)


def test_it_refuses_what_the_kernel_refuses(monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "yes")
    x, weights = operands()
    words = "ASPP_EXT_POLYPHASE must be 0, 1 or always, got 'yes'"
    for call in (aspp_ext.explain, aspp_ext.atrous_pyramid):
        with pytest.raises((ValueError, RuntimeError), match=words):
            call(x, weights, RATES)


def test_it_is_silent_where_nothing_filters(monkeypatch) -> None:
    x, weights = operands()
    monkeypatch.setenv("ASPP_EXT_BACKEND", "reference")
    assert said(x, weights) == {}
    monkeypatch.delenv("ASPP_EXT_BACKEND")
    pointwise = [torch.empty(4, 64, 1, 1)] * 4
    depthwise = [None, *(torch.empty(64, 1, 3, 3) for _ in range(3))]
    text = aspp_ext.explain(x, pointwise, RATES, depthwise_weights=depthwise)
    assert CALL not in text
    assert CALL not in aspp_ext.explain(x[:0], weights, RATES)
