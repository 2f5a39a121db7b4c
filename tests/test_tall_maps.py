# SPDX-License-Identifier: BSD-3-Clause
"""Maps of many rows of a pixel or two, which the CPU computes with their axes exchanged: exact in
every layout, with and without minimal filtering and prepared weights, and the same as flat maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import on_cpu
from table import each_dtype
from torch import Tensor

from aspp_ext.ops import polyphase_weights
from aspp_ext.ops.family import NATIVE
from aspp_ext.ops.polyphase_choice import ALWAYS, NEVER
from aspp_ext.testing import OPS, Branch, Problem, laid_out, oracle_of, outputs
from aspp_ext.testing.checks import check_integers

pytestmark = [on_cpu, pytest.mark.settings("isa", "filtered", "sanitized")]
SIZES = ((40, 1), (37, 2), (64, 1), (700, 1), (30, 3))
BRANCHES = (
    *(Branch(12, (1, 1)), Branch(16, (3, 3), (2, 3)), Branch(20, (3, 3), (11, 1))),
    *(Branch(8, (5, 5), (1, 1)), Branch(4, (3, 1), (30, 2))),
)
LAYOUTS = ("contiguous", "channels_last", "transposed")


def tall(size: tuple[int, int], layout: str = "contiguous") -> Problem:
    weights = "channels_last" if layout == "channels_last" else "contiguous"
    return Problem(f"tall {size} {layout}", (2, 20, *size), BRANCHES, layout, weights)


@pytest.mark.quick(when=lambda layout: layout == "contiguous")
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_integers_are_exact(name, size, layout, dtype) -> None:
    op = OPS[name]
    problem = tall(size, layout)
    if op.exact(problem):
        check_integers(op.native, op, op.make(problem, dtype, integer=True))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["head", "head_no_projection"])
def test_a_head_with_what_is_prepared(name, size, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    op = OPS[name]
    arguments = op.make(tall(size), torch.float64)
    _, _, weights, rates, *_ = arguments
    pairs = list(zip(rates[::2], rates[1::2], strict=True))
    prepared = polyphase_weights(weights, pairs, *size)
    assert any(p.numel() for p in prepared)
    (expected,) = oracle_of(op, arguments)
    operator = op.operator(NATIVE)
    for given in ((NEVER,), (ALWAYS,), (ALWAYS, prepared)):
        torch.testing.assert_close(operator(*arguments, *given), expected, rtol=1e-9, atol=1e-9)


def turned(arguments: Any) -> Any:
    if isinstance(arguments, Tensor):
        return arguments.mT.contiguous() if arguments.dim() == 4 else arguments
    if isinstance(arguments, list) and arguments and isinstance(arguments[0], int):
        return [value for i in range(0, len(arguments), 2) for value in arguments[i : i + 2][::-1]]
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(turned(a) for a in arguments)
    return arguments


@pytest.mark.parametrize("name", [n for n in OPS if "grad_" not in n])
def test_a_column_gives_the_bits_of_a_row(name) -> None:
    op = OPS[name]
    arguments = op.make(tall((700, 1)), torch.float32)
    down, across = outputs(op.native(*arguments)), outputs(op.native(*turned(arguments)))
    for a, b in zip(down, across, strict=True):
        assert torch.equal(a, laid_out(turned(b), "contiguous"))
