# SPDX-License-Identifier: BSD-3-Clause
"""The instruments themselves: the error law finds planted errors, poison is NaN, layouts differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from aspp_ext.testing import (
    OPS,
    PROBLEMS,
    Values,
    assert_no_worse_than_torch,
    laid_out,
    nan_poison,
    oracle_of,
    outputs,
)
from aspp_ext.testing.oracle import ShiftedProducts


def low_precision_problem(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(inputs multiplied exactly enough, PyTorch's own result, oracle)."""
    x, w = torch.randn(1, 64, 24, 24).to(dtype), (torch.randn(32, 64, 3, 3) / 24).to(dtype)
    oracle = F.conv2d(x.double(), w.double(), padding=1)
    return oracle.to(dtype), F.conv2d(x, w, padding=1), oracle


def truncated(t: torch.Tensor) -> torch.Tensor:
    """float64 -> bfloat16 towards zero, as a kernel that forgets to round."""
    return (t.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_law_accepts_the_rounded_oracle_and_pytorch(dtype) -> None:
    best, baseline, oracle = low_precision_problem(dtype)
    assert_no_worse_than_torch(best, baseline, oracle)
    assert_no_worse_than_torch(baseline, baseline, oracle)


def one_wrong(t):
    t[0, 3, 5, 7] += 0.25
    return t


PLANTED = {
    "one wrong element": (one_wrong, "max"),
    "offset": (lambda t: t + 0.002, "mean:"),
    "nan": (lambda t: t.index_fill_(1, torch.tensor([2]), torch.nan), "not finite"),
    "dtype": (lambda t: t.double(), "dtype"),
    "shape": (lambda t: t[:, 1:], "expected"),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED.keys())
def test_law_refuses(planted) -> None:
    plant, word = planted
    _, baseline, oracle = low_precision_problem(torch.bfloat16)
    with pytest.raises(AssertionError, match=word):
        assert_no_worse_than_torch(plant(baseline.clone()), baseline, oracle)


def test_law_refuses_many_errors_below_the_largest() -> None:
    """PyTorch's one large error hides two hundred from the maximum, not from the percentile."""
    _, baseline, oracle = low_precision_problem(torch.bfloat16)
    got = baseline.clone()
    got.view(-1)[::90] += 0.06
    with pytest.raises(AssertionError, match=r"99\.9 %"):
        assert_no_worse_than_torch(got, one_wrong(baseline), oracle)


def test_law_refuses_truncation_towards_zero() -> None:
    """Each error is below one unit in the last place, the values are symmetric: only a bias."""
    _, baseline, oracle = low_precision_problem(torch.bfloat16)
    with pytest.raises(AssertionError, match="mean along the sign"):
        assert_no_worse_than_torch(truncated(oracle), baseline, oracle)


def test_law_refuses_low_precision_accumulation() -> None:
    """A sum over channels that is rounded to bfloat16 after each."""
    x, w = torch.randn(1, 64, 24, 24).bfloat16(), (torch.randn(32, 64, 3, 3) / 24).bfloat16()
    oracle, baseline = F.conv2d(x.double(), w.double()), F.conv2d(x, w)
    sloppy = sum(F.conv2d(x[:, c : c + 1], w[:, c : c + 1]) for c in range(64))
    with pytest.raises(AssertionError, match="above 2"):
        assert_no_worse_than_torch(sloppy, baseline, oracle)


def test_poison_is_nan_and_ends() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with nan_poison():
        assert torch.empty(1000).isnan().all()
        x, weight = torch.zeros(1, 4, 3, 3), torch.zeros(4, 4, 3, 3)
        grad_x = torch.ops.aspp_ext.atrous_pyramid_grad_input(x, [weight], [1, 1])
        assert not grad_x.isnan().any()
    assert torch.are_deterministic_algorithms_enabled() == before


@pytest.mark.parametrize(
    "layout", ["channels_last", "offset", "sliced", "strided", "transposed", "outputs_last"]
)
def test_layout_keeps_values(layout) -> None:
    t = torch.randn(2, 3, 4, 5)
    other = laid_out(t, layout)
    assert torch.equal(other, t)
    assert other.stride() != t.stride() or other.storage_offset() > 0


def test_layout_surrounds_with_nan() -> None:
    view = laid_out(torch.zeros(2, 3, 4, 5), "sliced")
    whole = torch.as_strided(view, (view.untyped_storage().size() // 4,), (1,), 0)
    assert whole.isnan().sum() == whole.numel() - view.numel()


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_a_planted_bug_shows(op) -> None:
    """Each operator's check fails when one integer of one argument is another."""
    arguments = op.make(PROBLEMS["aspp"], torch.float64, integer=True)
    wrong = (arguments[0].clone(), *arguments[1:])
    wrong[0][1, 2, 8, 8] += 1
    pairs = zip(outputs(op.expected(*arguments)), outputs(op.native(*wrong)), strict=True)
    assert not all(torch.equal(e, g) for e, g in pairs)


def test_values_depend_on_the_draw_only() -> None:
    op, problem = OPS["pyramid"], PROBLEMS["aspp"]
    x, again, other = (op.make(problem, torch.float32, draw=d)[0] for d in (0, 0, 1))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert Values(torch.float16, True, "seed")(100, fan_in=9).abs().max() == 1


class NoConvolution(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "conv" not in function.name()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPS)
def test_the_oracle_is_pytorch_s_convolution(name) -> None:
    """Which it does not call: its own sums of shifted products agree bit for bit on integers."""
    op = OPS[name]
    for problem in PROBLEMS.values():
        arguments = op.make(problem, torch.float64, integer=True)
        with NoConvolution():
            oracle = oracle_of(op, arguments)
        for own, torchs in zip(oracle, outputs(op.expected(*arguments)), strict=True):
            torch.testing.assert_close(own, torchs, rtol=1e-12, atol=1e-14)


def test_the_oracle_refuses_what_it_has_not() -> None:
    x, w = torch.ones(1, 2, 3, 3), torch.ones(1, 2, 1, 1)
    with ShiftedProducts(), pytest.raises(NotImplementedError, match="no conv1d"):
        F.conv1d(x[0], w[0])
    with ShiftedProducts(), pytest.raises(ValueError, match="of stride 1"):
        F.conv2d(x, w, stride=2)
