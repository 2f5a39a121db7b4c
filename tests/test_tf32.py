# SPDX-License-Identifier: BSD-3-Clause
"""TF32 where an operator is told that it may: as exact as operands of eleven bits allow.

A CPU has no such products and stays more exact; the emulated CUDA kernels, Triton's interpreted
ones and the GPU round.
"""

from __future__ import annotations

import pytest
import torch
from marks import on_interpreted, on_native, proven_interpreted, quick_emulated
from table import PYRAMIDS, SEPARABLE, call_of, check_error_law
from torch import Tensor
from torch.utils._pytree import tree_map_only

from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem, outputs
from aspp_ext.testing.checks import check_integers, is_representative
from aspp_ext.testing.law import of_eleven_bits

pytestmark = on_native

each_name = pytest.mark.parametrize("name", [*PYRAMIDS, *SEPARABLE])
each_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=lambda p: p.name)
STATISTICS = [p for p in PROBLEMS.values() if is_representative(p)]


def in_tf32(name: str):
    return lambda *arguments: call_of(OPS[name])(*arguments, True)


@each_problem
@each_name
def test_integers_are_exact(name, problem) -> None:
    arguments = OPS[name].make(problem, torch.float32, integer=True)
    check_integers(in_tf32(name), OPS[name], arguments)


@quick_emulated(lambda problem: problem.name == "prime_sizes")
@pytest.mark.parametrize("problem", STATISTICS, ids=lambda p: p.name)
@each_name
def test_error_law(name, problem) -> None:
    check_error_law(in_tf32(name), OPS[name], problem, torch.float32, "cpu", rounded=of_eleven_bits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@each_name
def test_other_dtypes_are_not_concerned(name, dtype) -> None:
    arguments = OPS[name].make(PROBLEMS["aspp"], dtype)
    expected = outputs(call_of(OPS[name])(*arguments))
    assert all(map(torch.equal, outputs(in_tf32(name)(*arguments)), expected))


@pytest.mark.kernels("emulated", "interpreted")
@proven_interpreted
@each_name
def test_products_are_rounded(name) -> None:
    arguments = OPS[name].make(PROBLEMS["aspp"], torch.float32)
    exact, low = outputs(call_of(OPS[name])(*arguments)), outputs(in_tf32(name)(*arguments))
    pairs = [(e, t) for e, t in zip(exact, low, strict=True) if e.numel() > 0]
    assert not any(torch.equal(e, t) for e, t in pairs)


PLAIN = Problem("plain", (2, 40, 5, 7), (Branch(20, (1, 1)), Branch(33, (1, 1))))


@on_interpreted
@pytest.mark.parametrize(
    "name", ["pyramid", "pyramid_grad_input", "pyramid_grad_weight", "separable"]
)
def test_operands_are_rounded_to_nearest(name) -> None:
    """Also halfway between two, away from zero; the sums are the same."""

    def near_a_tie(t: Tensor) -> Tensor:
        bits = t.view(torch.int32)
        return ((bits & ~0x1FFF) + 0xFFF + torch.randint_like(bits, 3)).view(torch.float32)

    arguments = tree_map_only(Tensor, near_a_tie, OPS[name].make(PLAIN, torch.float32))
    expected = outputs(call_of(OPS[name])(*of_eleven_bits(arguments)))
    assert all(map(torch.equal, outputs(in_tf32(name)(*arguments)), expected))


@on_interpreted
def test_no_nan_and_no_infinity_is_rounded() -> None:
    x, *rest = OPS["pyramid"].make(PLAIN, torch.float32)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000], dtype=torch.int32)
    x[0, 0, 0, :4] = bits.view(torch.float32)
    got, expected = (call(x, *rest) for call in (in_tf32("pyramid"), call_of(OPS["pyramid"])))
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    assert got.isinf().any()
