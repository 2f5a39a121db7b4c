# SPDX-License-Identifier: BSD-3-Clause
"""Minimal filtering: its products against the definition of the convolution, and the choice."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspp_ext import _plan

KINDS = ("pair", "triple", "overlapped")
SUBSETS = [
    dict.fromkeys(kinds, True) for n in range(4) for kinds in itertools.combinations(KINDS, n)
]
ALL = SUBSETS[-1]
PRODUCTS = {"one": 1, "pair": 3, "triple": 4, "overlapped": 4}
SIZES = {"one": 1, "pair": 2, "triple": 3, "overlapped": 2}
UNIT = 32  # every number of an algorithm is a multiple of 1 / UNIT


class Algorithm(NamedTuple):
    """A MinimalAxis in integers: the weights times UNIT, everything else as it is."""

    denominator: int
    weights: list[list[int]]
    products: list[tuple[int, list[list[int]], list[list[int]]]]


def integer(number: float) -> int:
    """The number itself: no rounding hides in a comparison of integers."""
    assert number == int(number)
    return int(number)


def algorithm(axis: _plan.MinimalAxis) -> Algorithm:
    def terms(pairs):
        return [[at, integer(coefficient)] for at, coefficient in pairs]

    weights = [[integer(UNIT * number) for number in weight] for weight in axis.weights]
    products = [(p.weight, terms(p.inputs), terms(p.outputs)) for p in axis.products]
    return Algorithm(axis.denominator, weights, products)


def bilinear_form(algorithm: Algorithm) -> dict[tuple[int, int, int], int]:
    """(output, tap, input) -> UNIT * denominator * the factor of tap * input in the output."""
    factors: Counter = Counter()
    for index, inputs, outputs in algorithm.products:
        weight = algorithm.weights[index]
        for (out, c), (at, b) in itertools.product(outputs, inputs):
            for tap, a in enumerate(weight):
                factors[out, tap, at] += c * a * b
    return {key: factor for key, factor in factors.items() if factor}


def definition(size: int, kernel: int, rate: int, one: int) -> dict[tuple[int, int, int], int]:
    """The same of the convolution: `one` for each tap that reads inside the axis."""
    taps = range(3) if kernel == 3 else [1]
    reads = itertools.product(range(size), taps)
    offsets = [(out, tap, out + (tap - 1) * rate) for out, tap in reads]
    return {key: one for key in offsets if 0 <= key[2] < size}


def is_exact(algorithm: Algorithm, size: int, kernel: int, rate: int) -> bool:
    expected = definition(size, kernel, rate, UNIT * algorithm.denominator)
    return bilinear_form(algorithm) == expected


def lengths(size: int, kernel: int, rate: int) -> list[int]:
    """Of the sequences, phase by phase."""
    step = size if kernel == 1 else min(rate, size)
    return [len(range(phase, size, step)) for phase in range(step)]


def check_pieces(axis: _plan.MinimalAxis, size: int, kernel: int, rate: int) -> None:
    """They partition outputs and products, are closed, in order and not needlessly small."""
    step = size if kernel == 1 else min(rate, size)
    begins, end = [], 0
    for piece in axis.pieces:
        assert piece.products.begin == end < piece.products.end
        end = piece.products.end
        assert 1 <= len(piece.outputs) <= 8
        first, last = piece.outputs[0], piece.outputs[-1]
        assert piece.outputs == list(range(first, last + 1, step))
        begins.append(divmod(first, step))
        written = {at for p in axis.products[slice(*piece.products)] for at, _ in p.outputs}
        assert written == set(piece.outputs)
    assert end == len(axis.products)
    assert begins == sorted(begins)
    assert sorted(at for piece in axis.pieces for at in piece.outputs) == list(range(size))
    if max(lengths(size, kernel, rate)) <= 8:
        assert len(axis.pieces) == step


def check(size: int, kernel: int, rate: int, kinds: dict[str, bool]) -> None:
    axis = _plan.minimal_axis(size, kernel, rate, **kinds)
    assert is_exact(algorithm(axis), size, kernel, rate)
    check_pieces(axis, size, kernel, rate)
    for product in axis.products:
        for terms in (product.inputs, product.outputs):
            positions = [at for at, _ in terms]
            assert positions == sorted(set(positions))
    assert {product.weight for product in axis.products} == set(range(len(axis.weights)))
    assert len(set(axis.weights)) == len(axis.weights)
    live = sum(3 * length - 2 for length in lengths(size, kernel, rate))
    assert len(axis.products) <= live
    if not kinds:
        assert len(axis.products) == live


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
def test_every_small_axis(kinds):
    for size in range(1, 41):
        check(size, 1, 5, kinds)
        for rate in range(1, 46):
            check(size, 3, rate, kinds)


@given(st.integers(41, 400), st.sampled_from([1, 3]), st.integers(1, 500), st.sampled_from(SUBSETS))
def test_larger_axes(size, kernel, rate, kinds):
    check(size, kernel, rate, kinds)


@pytest.mark.parametrize(("size", "rate"), [(7, 1), (8, 4), (9, 3)])
def test_checker_notices_each_coefficient(size, rate):
    """Whatever number of an algorithm is off by one, it is no longer the convolution."""
    wrong = algorithm(_plan.minimal_axis(size, 3, rate, **ALL))
    terms = [term for _, *both in wrong.products for side in both for term in side]
    numbers = [(term, 1) for term in terms]
    numbers += [(weight, tap) for weight in wrong.weights for tap in range(3)]
    assert is_exact(wrong, size, 3, rate)
    for holder, place in numbers:
        holder[place] += 1
        assert not is_exact(wrong, size, 3, rate)
        holder[place] -= 1
    assert is_exact(wrong, size, 3, rate)


# --- Counts


def cuts(length: int, kinds: list[str]):
    """Every way to fill a sequence with blocks, of which a last triple may hold two positions."""
    if length == 0:
        yield []
    for kind in kinds:
        held = min(SIZES[kind], length) if kind == "triple" and length >= 2 else SIZES[kind]
        if held <= length:
            yield from ([kind, *rest] for rest in cuts(length - held, kinds))


def product_count(cut: list[str]) -> int:
    """With the couplings, which overlapped blocks do not need and have for the neighbours of the
    first and the last block."""
    count = sum(PRODUCTS[kind] for kind in cut)
    for i, (left, right) in enumerate(itertools.pairwise(cut)):
        begins, ends = i == 0 and left == "overlapped", i == len(cut) - 2 and right == "overlapped"
        count += (right != "overlapped" and not begins) + (left != "overlapped" and not ends)
    return count


@pytest.mark.parametrize("kinds", SUBSETS, ids="+".join)
@pytest.mark.parametrize("length", range(1, 12))
def test_fewest_products(length, kinds):
    expected = min(map(product_count, cuts(length, ["one", *kinds])))
    assert len(_plan.minimal_axis(length, 3, 1, **kinds).products) == expected


@pytest.mark.parametrize(
    ("length", "kinds", "products", "weights"),
    [
        (1, "", 1, 1),
        (2, "", 4, 3),
        (2, "pair", 3, 3),
        (3, "triple", 4, 4),
        (3, "pair", 6, 6),
        (3, "overlapped", 5, 5),
        (4, "pair overlapped", 7, 7),
        (5, "triple overlapped", 8, 8),
        (6, "triple", 10, 6),
        (7, "triple overlapped", 12, 8),
    ],
)
def test_counts(length, kinds, products, weights):
    axis = _plan.minimal_axis(length, 3, 1, **dict.fromkeys(kinds.split(), True))
    assert (len(axis.products), len(axis.weights)) == (products, weights)


def test_triple_is_padded_where_its_weights_are_there():
    """Sequences of 3 and 2: as many products as single positions, no weights of their own."""
    axis = _plan.minimal_axis(5, 3, 2, triple=True)
    assert (len(axis.products), len(axis.weights)) == (8, 4)
    assert len(_plan.minimal_axis(5, 3, 2, pair=True, triple=True).products) == 7


def test_long_sequences_are_cut_into_pieces():
    pieces = _plan.minimal_axis(100, 3, 1, **ALL).pieces
    assert min(len(piece.outputs) for piece in pieces[:-1]) >= 6


@pytest.mark.parametrize(
    ("size", "kernel", "rate", "sentence"),
    [
        (9, 5, 1, "plan: an axis' kernel must be 1 or 3 but is 5"),
        (9, 3, 0, "plan: an axis' rate must be >= 1 but is 0"),
        (9, 3, -2, "plan: an axis' rate must be >= 1 but is -2"),
        (0, 3, 1, "plan: an axis' size must be in [1, 2048] but is 0"),
        (2049, 3, 1, "plan: an axis' size must be in [1, 2048] but is 2049"),
    ],
)
def test_refusals(size, kernel, rate, sentence):
    with pytest.raises(ValueError) as refused:
        _plan.minimal_axis(size, kernel, rate)
    assert str(refused.value) == sentence


# --- The choice


def choose(size, rate, kernel=3, *, batch=1, inputs=2048, outputs=256, **costs):
    height, width = (size, size) if isinstance(size, int) else size
    branch = _plan.Branch(kernel, rate, outputs)
    problem = _plan.Problem(batch, height, width, [branch], inputs)
    return _plan.choose_polyphase(problem, 0, **costs)


@pytest.mark.parametrize(
    ("size", "rate", "products", "live"),
    [
        (65, 12, 106, 171),
        (65, 24, 89, 147),
        (65, 36, 94, 123),
        (33, 6, 54, 87),
        (33, 12, 45, 75),
        (33, 18, 48, 63),
    ],
)
def test_usual_pyramids(size, rate, products, live):
    """What DeepLab computes, at output strides 8 and 16 of 513 x 513."""
    choice = choose(size, rate, matrix=0, transform=16, direct=0, hold=0)
    assert (choice.form.row_products, choice.form.column_products) == (products, products)
    assert choice.direct == live**2
    assert choice.polyphase == pytest.approx(products**2 * (1 + 16 / 2048 + 16 / 256))
    assert choice.is_polyphase
    assert choose(size, rate).is_polyphase


def brute_force(size, rate, *, batch, inputs, outputs, transform, matrix, prepare):
    """The cheapest pair of subsets, from the tables themselves."""
    sides = [
        [_plan.minimal_axis(n, 3, r, **kinds) for kinds in SUBSETS]
        for n, r in zip(size, rate, strict=True)
    ]
    row = 1 + transform * (1 / inputs + 1 / outputs)

    def cost(rows, columns):
        products = len(rows.products) * len(columns.products)
        matrices = len(rows.weights) * len(columns.weights)
        chunks = -(-products // 3072)
        return batch * (products * row + matrices * chunks * matrix) + matrices * prepare

    return min(itertools.starmap(cost, itertools.product(*sides)))


@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.fixed_dictionaries(
        {
            "batch": st.integers(0, 4),
            "inputs": st.integers(1, 3000),
            "outputs": st.integers(1, 600),
            "transform": st.floats(0, 100),
            "matrix": st.floats(0, 100),
            "prepare": st.floats(0, 100),
        }
    ),
)
def test_choice_is_the_cheapest_form(size, rate, numbers):
    choice = choose(size, rate, **numbers, prepared=False)
    assert choice.polyphase == pytest.approx(brute_force(size, rate, **numbers))
    form = choice.form
    tables = [
        _plan.minimal_axis(n, 3, r, **kinds)
        for n, r, kinds in zip(size, rate, (form.rows, form.columns), strict=True)
    ]
    counts = [len(table.products) for table in tables]
    assert [form.row_products, form.column_products] == counts
    assert form.matrices == len(tables[0].weights) * len(tables[1].weights)
    assert choice.is_polyphase == (choice.polyphase < choice.direct)
    assert repr(choice) == repr(choose(size, rate, **numbers, prepared=False))


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
def test_choice_is_symmetric(height, width, row_rate, column_rate):
    choice = choose((height, width), (row_rate, column_rate))
    turned = choose((width, height), (column_rate, row_rate))
    assert (turned.polyphase, turned.direct) == (choice.polyphase, choice.direct)


def test_choice_needs_something_to_save():
    assert not choose(33, 33).is_polyphase, "nothing but centre taps"
    assert not choose(65, 12, inputs=1, outputs=1).is_polyphase, "no channels to pay for"
    assert not choose(65, 12, batch=0).is_polyphase, "no pixels"
    assert choose((1, 200), (1, 12), (1, 3)).is_polyphase, "one axis is enough"
    assert choose(33, 6, prepared=False).polyphase > choose(33, 6).polyphase
    assert choose(33, 6, direct=0.5).direct > choose(33, 6).direct


@pytest.mark.parametrize(
    ("size", "kernel", "sentence"),
    [
        (9, 1, "minimal filtering saves nothing of a 1x1 kernel"),
        (9, (3, 5), "minimal filtering needs 1 or 3 taps on each axis but the kernel is (3, 5)"),
        (
            (1, 20000),
            (1, 3),
            "minimal filtering needs axes of at most 2048 positions but the map is (1, 20000)",
        ),
    ],
)
def test_choice_says_why_not(size, kernel, sentence):
    choice = choose(size, 2, kernel)
    assert (choice.form, choice.polyphase, choice.why_not) == (None, 0, sentence)
    assert not choice.is_polyphase
    assert sentence in repr(choice)


def test_choice_needs_a_branch():
    with pytest.raises(IndexError, match=r"branch must be in \[0, 1\) but is 1"):
        _plan.choose_polyphase(_plan.Problem(1, 9, 9, [_plan.Branch(3)]), 1)
