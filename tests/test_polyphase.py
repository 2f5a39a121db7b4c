# SPDX-License-Identifier: BSD-3-Clause
"""The CPU's minimal filtering, forced: exact on integers for every form, shape, layout, epilogue;
the same bits for every way to ask; what is not finite where it is directly."""

from __future__ import annotations

import itertools

import pytest
import torch
from marks import sanitized
from minimal_bound import assert_sums_are_exact, choice_of, problem_of
from table import dtype_id
from torch import Tensor
from torch.nn.grad import conv2d_weight

import aspp_ext
from aspp_ext import reference
from aspp_ext.ops import polyphase_weights
from aspp_ext.testing import OPS, PROBLEMS, laid_out

pytestmark = [sanitized, pytest.mark.settings("isa", "threads")]

EXACT = (torch.float32, torch.float64, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", EXACT, ids=dtype_id)
Rate = tuple[int, int]


@pytest.fixture(autouse=True)
def always(monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")


def integers(*shape: int, dense: float = 1.0) -> Tensor:
    """-1, 0 and 1, of which a part is zero so that sums over many channels stay small."""
    return torch.randint(-1, 2, shape) * (torch.rand(shape) < dense).float()


def operands(shape, out_channels: int, kernel: Rate = (3, 3)) -> tuple[Tensor, Tensor]:
    dense = min(1, 48 / shape[1])
    x, weight = integers(*shape, dense=dense), integers(out_channels, shape[1], *kernel)
    return x, weight


def check(x: Tensor, weights: list[Tensor], rates: list[Rate], dtype=torch.float32, **epilogue):
    """Bit for bit the reference in float64, rounded once."""
    for weight, rate in zip(weights, rates, strict=True):
        if max(weight.shape[2:]) == 3:
            assert_sums_are_exact(x, weight, rate)
    numbers = {k: v.double() if isinstance(v, Tensor) else v for k, v in epilogue.items()}
    double = [w.double() for w in weights]
    expected = reference.atrous_pyramid(x.double(), double, rates, **numbers)
    typed = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in epilogue.items()}
    got = aspp_ext.atrous_pyramid(x.to(dtype), [w.to(dtype) for w in weights], rates, **typed)
    assert torch.equal(got, expected.to(dtype))


def check_gradients(
    x: Tensor, weights: list[Tensor], rates: list[Rate], dtype=torch.float32, layout="contiguous"
) -> None:
    n, _, h, w = x.shape
    outs = [len(weight) for weight in weights]
    grad = integers(n, sum(outs), h, w, dense=min(1, 40 / (n * h * w), 48 / sum(outs)))
    grad = laid_out(grad, layout)  # one that expands changes the values
    for weight, rate, part in zip(weights, rates, grad.split(outs, 1), strict=True):
        if max(weight.shape[2:]) == 3:
            assert_sums_are_exact(x, weight, rate, part)

    def gradients(atrous_pyramid, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x, *weights)]
        y = atrous_pyramid(leaves[0], leaves[1:], rates)
        return list(torch.autograd.grad(y, leaves, laid_out(grad.to(dtype), layout)))

    got = gradients(aspp_ext.atrous_pyramid, dtype)
    expected = gradients(reference.atrous_pyramid, torch.float64)
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e.to(dtype))


def has_forms(weights: list[Tensor], rates: list[Rate], x: Tensor) -> list[bool]:
    return [p.numel() > 0 for p in polyphase_weights(weights, rates, *x.shape[2:])]


def directly(*arguments, **keywords) -> Tensor:
    return aspp_ext.atrous_pyramid(*arguments, **keywords, polyphase=False)


# --- Forms and sizes

REGIMES = [(1, 1, 1), (1, 4, 4), (2, 64, 20), (3, 20, 70), (40, 6, 5), (1, 300, 33)]
"""N, C and O: what products, matrices and combinations cost beside each other decides the form."""


def lines(n: int, c: int):
    """Every length of a sequence from 1 to 13, alone and beside shorter ones."""
    for length, rate in itertools.product(range(1, 14), (1, 2, 5)):
        for shorter in sorted({0, rate // 2, rate - 1}):
            if length * rate > shorter:
                yield (n, c, 1, length * rate - shorter), (1, rate)


@each_dtype
@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_every_length_of_a_line(regime, dtype) -> None:
    n, c, o = regime
    for shape, rate in lines(n, c):
        x, weight = operands(shape, o, (1, 3))
        check(x, [weight], [rate], dtype)
        check(x.mT, [weight.mT], [rate[::-1]], dtype)


@each_dtype
def test_every_pair_of_lengths(dtype) -> None:
    """Rows of one length, columns of another."""
    for height, width in itertools.product(range(1, 14), repeat=2):
        for rate in ((1, 1), (2, 3)):
            n = 1 + 3 * (height + width) % 5
            x, weight = operands((n, 4, height * rate[0], max(width * rate[1] - 1, 1)), 5)
            check(x, [weight], [rate], dtype)
            check_gradients(x, [weight], [rate], dtype)


def test_lines_take_every_form_that_can_pay() -> None:
    """In which sequences are cut into single positions, pairs, triples, overlapped pairs and what
    of these goes together."""
    forms = set()
    for n, c, o in REGIMES:
        for shape, rate in lines(n, c):
            form = choice_of(problem_of(torch.empty(shape), torch.empty(o, c, 1, 3), rate)).form
            forms.add(" ".join(kind for kind, allowed in form.columns.items() if allowed))
    assert forms == {
        *("", "pair", "triple", "overlapped"),
        *("pair triple", "triple overlapped"),
    }


SIZES = {
    "several column parts": ((1, 3, 3, 300), 5, (1, 1)),
    "column parts of many phases": ((1, 4, 2, 411), 3, (1, 100)),
    "several row parts": ((1, 3, 120, 30), 5, (7, 1)),
    "row and column parts": ((1, 2, 40, 300), 3, (3, 1)),
    "panels of 64 outputs": ((1, 3, 5, 6), 300, (2, 2)),
    "parts and panels": ((2, 3, 70, 65), 130, (12, 12)),
    "blocks of 128 channels": ((1, 301, 5, 6), 17, (2, 3)),
    "whole blocks and panels": ((2, 256, 6, 6), 128, (2, 2)),
    "rate above the map": ((2, 5, 4, 6), 3, (9, 4)),
    "largest rate": ((1, 3, 4, 5), 2, (1, 2**31 - 1)),
    "one pixel": ((3, 6, 1, 1), 5, (7, 7)),
    "usual": ((1, 32, 33, 33), 20, (6, 6)),
}


@each_dtype
@pytest.mark.parametrize("name", SIZES)
def test_sizes(name, dtype) -> None:
    shape, out_channels, rate = SIZES[name]
    x, weight = operands(shape, out_channels)
    assert has_forms([weight], [rate], x) == [True]
    check(x, [weight], [rate], dtype)
    check_gradients(x, [weight], [rate], dtype)


# --- Everything around a branch

LAYOUTS = ("channels_last", "offset", "sliced", "strided", "transposed", "expanded_batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("channels", [5, 64])
def test_layouts(channels, dtype) -> None:
    """Of x, of the weight and, which follows these, of the result: no bit depends on them."""
    x, weight = (t.to(dtype) for t in operands((2, channels, 9, 7), 37))
    noise = torch.randn(x.shape).to(dtype)
    for layout in LAYOUTS:
        check(laid_out(x, layout), [weight], [(2, 3)], dtype)
        check(x, [laid_out(weight, layout)], [(2, 3)], dtype)
        check_gradients(laid_out(x, layout), [weight], [(2, 3)], dtype, layout)
        check_gradients(x, [laid_out(weight, layout)], [(2, 3)], dtype)
        there = laid_out(noise, layout)
        got = aspp_ext.atrous_pyramid(there, [weight], [(2, 3)])
        assert torch.equal(got, aspp_ext.atrous_pyramid(there.contiguous(), [weight], [(2, 3)]))
        last = torch.channels_last
        assert got.is_contiguous(memory_format=last) == there.is_contiguous(memory_format=last)


@each_dtype
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shift", [None, "one", "per_sample"])
def test_epilogue(shift, activation, dtype) -> None:
    x, first = operands((3, 6, 9, 11), 21)
    _, second = operands(x.shape, 70)
    outs = len(first) + len(second)
    for scale in (None, integers(outs)):
        moved = {None: None, "one": integers(outs), "per_sample": integers(3, outs)}[shift]
        epilogue = {"scale": scale, "shift": moved, "activation": activation}
        check(x, [first, second], [(3, 3), (2, 4)], dtype, **epilogue)


@each_dtype
def test_other_branches_are_computed_directly(dtype) -> None:
    x = integers(2, 7, 12, 10)
    weights = [integers(o, 7, *k) for o, k in ((5, (1, 1)), (6, (3, 3)), (3, (5, 5)), (17, (1, 3)))]
    weights += [integers(70, 7, 3, 1), integers(4, 7, 3, 5)]
    rates = [(1, 1), (4, 3), (2, 2), (1, 6), (5, 1), (2, 1)]
    assert has_forms(weights, rates, x) == [False, True, False, True, True, False]
    check(x, weights, rates, dtype)
    check_gradients(x, weights, rates, dtype)
    for some in (slice(1, 2), slice(3, 5)):
        check(x, weights[some], rates[some], dtype)
        check_gradients(x, weights[some], rates[some], dtype)


def test_one_dimension() -> None:
    x, weight = integers(2, 6, 29), integers(5, 6, 3)
    got = aspp_ext.atrous_pyramid(x, [weight], [4])
    assert torch.equal(got, reference.atrous_pyramid(x, [weight], [4]))


def head(pool: bool, kernels: tuple[int, ...], project: bool = True) -> tuple:
    outs = [5, 17, 3][: len(kernels)]
    weights = [integers(o, 6, k, k) for o, k in zip(outs, kernels, strict=True)]
    before = integers(2, 6, 8, 4), [None] * len(outs), weights, [2, 3, 1][: len(outs)]
    of_pool = (integers(7, 6), integers(7)) if pool else (None, None)
    of_project = (integers(9, sum(outs) + 7 * pool), integers(9)) if project else (None, None)
    return *before, integers(sum(outs)), *of_pool, *of_project


@each_dtype
@pytest.mark.parametrize("kernels", [(1, 3, 3), (3, 3, 1), (3, 3), (3,)], ids=str)
@pytest.mark.parametrize("parts", [(True, True), (False, True), (False, False)], ids=str)
def test_head(parts, kernels, dtype) -> None:
    """Where every branch has a form and there is a pool, one is computed directly for its sums."""
    pool, project = parts
    arguments = head(pool, kernels, project)
    x, none, weights, rates, *rest = arguments
    typed = [None if t is None else t.to(dtype) for t in rest]
    given = x.to(dtype), none, [w.to(dtype) for w in weights], rates, *typed
    double = [None if t is None else t.double() for t in rest]
    prepared = polyphase_weights(given[2], rates, 8, 4)
    assert [p.numel() > 0 for p in prepared] == [k == 3 for k in kernels]
    for activation, last in (("relu", "relu"), (None, "relu"), (None, None)):
        ends = {"activation": activation, "project_activation": last}
        exact = reference.aspp_inference(
            x.double(), none, [w.double() for w in weights], rates, *double, **ends
        )
        assert torch.equal(aspp_ext.aspp_inference(*given, **ends), exact.to(dtype))
        got = aspp_ext.aspp_inference(*given, prepared=prepared, **ends)
        assert torch.equal(got, exact.to(dtype))


# --- Bits


def noise(channels: int = 20, size: Rate = (15, 11), n: int = 2) -> tuple[Tensor, list[Tensor]]:
    weights = [torch.randn(o, channels, k, k) for o, k in ((33, 3), (5, 1), (70, 3))]
    return torch.randn(n, channels, *size), weights


NOISE_RATES = [(3, 2), (1, 1), (6, 6)]


def branches(y: Tensor) -> tuple[Tensor, ...]:
    """The result for ``noise``, branch by branch."""
    return y.split([33, 5, 70], 1)


def test_it_is_not_the_direct_computation() -> None:
    """Else this file would test that one alone. The branch that has no form has its bits."""
    x, weights = noise()
    got, direct = (f(x, weights, NOISE_RATES) for f in (aspp_ext.atrous_pyramid, directly))
    assert list(map(torch.equal, branches(got), branches(direct))) == [False, True, False]
    torch.testing.assert_close(got, direct, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["pyramid", *(name for name in OPS if name.startswith("head"))])
def test_threads_and_repetition_change_no_bit(call) -> None:
    arguments = OPS[call].make(PROBLEMS["aspp"], torch.float32)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(OPS[call].native(*arguments))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("face", ["", "_grad_input", "_grad_weight"])
def test_threads_that_divide_a_branch_otherwise_change_no_bit(face) -> None:
    """A map of several chunks, whose number depends on that of the threads in a forward pass."""
    x, grad, weight = (
        torch.randn(1, 7, 90, 90),
        torch.randn(1, 20, 90, 90),
        torch.randn(20, 7, 3, 3),
    )
    form = choice_of(problem_of(x, weight, (12, 12))).form
    assert form.row_products * form.column_products > 3 * 3072
    arguments = {
        "": (x, [weight], [12, 12]),
        "_grad_input": (grad, [weight], [12, 12]),
        "_grad_weight": (grad, x, [3, 3], [20], [12, 12]),
    }[face]
    results: list[Tensor] = []
    plain: list[Tensor] = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        result = getattr(torch.ops.aspp_ext, f"atrous_pyramid{face}")(*arguments)
        results.append(result[0] if face == "_grad_weight" else result)
        if face == "_grad_weight":  # which is PyTorch's but for what is filtered minimally
            plain.append(conv2d_weight(x, weight.shape, grad, padding=12, dilation=12))
    if any(not torch.equal(plain[0], other) for other in plain):
        pytest.skip("on this processor the bits of PyTorch's own gradient are its threads'")
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_equal_forms_give_equal_bits_in_any_batch() -> None:
    x, weights = noise(n=3)
    forms = {repr(choice_of(problem_of(x[:n], weights[0], (3, 2))).form) for n in (1, 3)}
    assert len(forms) == 1
    whole = aspp_ext.atrous_pyramid(x, weights[:1], [(3, 2)])
    alone = [aspp_ext.atrous_pyramid(sample[None], weights[:1], [(3, 2)]) for sample in x]
    assert torch.equal(whole, torch.cat(alone))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is one value, zeros are two."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0).view(torch.int32), b.nan_to_num(0.0).view(torch.int32)
    )


LIMIT = torch.finfo(torch.float32).max
NOT_FINITE = [torch.nan, torch.inf, -torch.inf, LIMIT, -LIMIT / 2]


def agree(got: Tensor, direct: Tensor) -> bool:
    """The same where it is not finite, else to a rounding of what the pixel, or the weight, has."""
    finite = direct.isfinite()
    if not same_bits(got[~finite], direct[~finite]):
        return False
    values, expected = (torch.where(finite, t, 0).double() for t in (got, direct))
    dims = (1,) if got.shape[2:] == (15, 11) else (0, 1, 2, 3)
    error, size = ((t / LIMIT).square().sum(dims).sqrt() for t in (values - expected, expected))
    return bool((error <= 1e-5 * size).all())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["x", "weight", "both"])
def test_what_is_not_finite_is_where_it_is_directly(where, value, relu) -> None:
    """And other samples, and branches without such weights, keep their bits."""
    x, weights = noise()
    epilogue = {"activation": "relu" if relu else None, "shift": torch.randn(108)}
    clean = aspp_ext.atrous_pyramid(x, weights, NOISE_RATES, **epilogue)
    if where != "weight":
        x[-1, 3, -1, 1] = value
    if where != "x":
        weights[2][4, 3, 0, 2] = value
    got = aspp_ext.atrous_pyramid(x, weights, NOISE_RATES, **epilogue)
    direct = directly(x, weights, NOISE_RATES, **epilogue)
    assert all(map(agree, branches(got), branches(direct)))
    if where == "weight":
        assert torch.equal(got[:, :38], clean[:, :38])
    if where == "x":
        assert torch.equal(got[0], clean[0])


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("where", ["x", "weight", "grad"])
def test_what_is_not_finite_in_gradients_is_where_it_is_directly(where, value) -> None:
    x, weights = noise()
    grad = torch.randn(2, 108, *x.shape[2:])

    def gradients(polyphase: bool) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, *weights)]
        y = aspp_ext.atrous_pyramid(leaves[0], leaves[1:], NOISE_RATES, polyphase=polyphase)
        return list(torch.autograd.grad(y, leaves, grad))

    clean = gradients(True)
    {"x": x, "weight": weights[2], "grad": grad[:, 38:]}[where][-1, 3, -1, 1] = value
    got, direct = gradients(True), gradients(False)
    assert all(map(agree, got, direct))
    same = {"x": [0], "weight": [1, 2, 3], "grad": [1, 2]}[where]
    assert all(torch.equal(got[i], clean[i]) for i in same)


def test_a_combination_may_overflow_where_no_output_does() -> None:
    x, weight = torch.randn(1, 4, 9, 9), 1e-3 * torch.randn(5, 4, 3, 3)
    x[0, :, :3] = LIMIT / 4
    direct = directly(x, [weight], [3])
    assert choice_of(problem_of(x, weight, (3, 3))).form.rows["triple"]
    assert direct.isfinite().all()
    assert same_bits(aspp_ext.atrous_pyramid(x, [weight], [3]), direct)


# --- Faults


def test_a_wrong_rate_is_noticed() -> None:
    x, weight = operands((1, 4, 9, 9), 5)
    expected = reference.atrous_pyramid(x, [weight], [(3, 3)])
    assert torch.equal(aspp_ext.atrous_pyramid(x, [weight], [(3, 3)]), expected)
    for rate in ((3, 4), (2, 3), (4, 4)):
        assert not torch.equal(aspp_ext.atrous_pyramid(x, [weight], [rate]), expected)


def test_every_matrix_counts() -> None:
    """A change in any of the prepared matrices shows, so that none is read for another."""
    _, none, weights, rates, *_ = head(False, (3, 3))
    x, offset = torch.randn(2, 6, 8, 4), torch.full((22,), 1e3)  # beyond the ReLUs' zeros
    prepared = polyphase_weights(weights, rates, 8, 4)
    rest = (offset, None, None, torch.eye(22), offset)
    results = []
    for branch, weight in zip(prepared, weights, strict=True):
        *matrices, norms = branch.split(weight.size(1) * -(-len(weight) // 16) * 16)
        assert len(norms) == 16
        for matrix in matrices:
            matrix += 1
            results.append(
                aspp_ext.aspp_inference(x, none, weights, rates, *rest, prepared=prepared)
            )
            matrix -= 1
    assert len(results) > 20
    assert not any(itertools.starmap(torch.equal, itertools.combinations(results, 2)))
