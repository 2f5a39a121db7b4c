# SPDX-License-Identifier: BSD-3-Clause
"""Every operator on every problem: exact on integers, within the error law on random values."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from interpreting import strange_memory_refused
from marks import (
    marks_of,
    on_all,
    on_native,
    proven_interpreted,
    quick_emulated,
    quick_interpreted,
    sanitized,
    stored,
    varied,
)
from table import (
    BACKENDS,
    CASES,
    EMULATED,
    INTERPRETED,
    LOW,
    PYRAMIDS,
    SEEN,
    call_of,
    check_error_law,
    check_memory_format,
    dtype_id,
    each_dtype,
    each_format,
    has_dtype,
    implementations,
)
from torch.utils._pytree import tree_flatten, tree_map_only

import aspp_ext
from aspp_ext import _native, reference
from aspp_ext.ops.formats import is_channels_last
from aspp_ext.testing import OPS, PROBLEMS, laid_out
from aspp_ext.testing.checks import (
    check_float64,
    check_integers,
    check_reach,
    hit_and_seen,
    is_representative,
    tensors_in,
)

pytestmark = [on_all, proven_interpreted, varied, sanitized, pytest.mark.settings("isa")]

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


@quick_emulated(lambda problem: problem.name not in ("aspp", "kernel_63x63"))
@quick_interpreted(
    lambda problem, dtype: (
        problem.name == "prime_sizes"
        or (problem.name, dtype) == ("in_place_channel_slice", torch.bfloat16)
    )
)
@each_dtype
@pytest.mark.parametrize(("op", "problem"), [c for c in CASES if c.values[0].exact(c.values[1])])
def test_integers_are_exact(op, problem, dtype) -> None:
    arguments = op.make(problem, dtype, integer=True)
    for name, call in implementations(op).items():
        if name == "reference" and dtype != torch.float32:
            continue  # in a low precision PyTorch rounds between its operators
        if not has_dtype(name, dtype):
            continue
        with strange_memory_refused() if INTERPRETED else contextlib.nullcontext():
            check_integers(call, op, arguments, name)


@quick_emulated(lambda problem: problem.name == "prime_sizes")
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=dtype_id)
@pytest.mark.parametrize(("op", "problem"), [c for c in CASES if is_representative(c.values[1])])
def test_error_law(op, problem, dtype) -> None:
    check_error_law(call_of(op), op, problem, dtype, "cpu")


@on_native
@pytest.mark.parametrize(("op", "problem"), [c for c in CASES if is_representative(c.values[1])])
def test_float64(op, problem) -> None:
    check_float64(call_of(op), op, problem, "cpu")


# A NaN spreads further than it must in Triton's separable backward.
OURS = [
    pytest.param(name, marks=[*marks_of(name), *[on_native] * ("backward" in name)])
    for name in OPS
    if not name.startswith("pyramid_grad")
]


@quick_emulated(lambda dtype: dtype == torch.float32)
@quick_interpreted(
    lambda op_name, name, dtype: (
        (op_name, name, dtype) == ("pyramid", "rate_above_the_map", torch.float32)
    )
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("op_name", OURS)
def test_nan_reaches_exactly_what_sees_it(op_name, name, dtype) -> None:
    op = OPS[op_name]
    merged = INTERPRETED or (EMULATED and op_name in PYRAMIDS)
    check_reach(call_of(op), op, PROBLEMS[name], dtype, "cpu", merged)


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("op_name", ["pyramid_grad_input", "pyramid_grad_weight"])
def test_nan_reaches_every_gradient_that_sees_it(op_name, name) -> None:
    """oneDNN multiplies the zero padding, so that a NaN may reach more gradients than it has to."""
    op, problem = OPS[op_name], PROBLEMS[name]
    if EMULATED or INTERPRETED:
        check_reach(call_of(op), op, problem, torch.float32, "cpu", op_name == "pyramid_grad_input")
        return
    made = op.make(problem, torch.float32)
    for leaf in tensors_in(made):
        for _, nan, seen in hit_and_seen(call_of(op), op, made, leaf):
            assert nan[seen].all(), f"argument {leaf}"


@quick_interpreted()
def test_infinity_is_kept() -> None:
    x = torch.randn(1, 5, 7, 9)
    x[0, 2, 3, 4], x[0, 1, 6, 0] = torch.inf, -torch.inf
    weights = [torch.randn(20, 5, 3, 3), torch.randn(3, 5, 1, 1)]
    got = aspp_ext.atrous_pyramid(x, weights, [2, 1])
    expected = reference.atrous_pyramid(x, weights, [2, 1])
    assert torch.equal(got.isposinf(), expected.isposinf())
    assert torch.equal(got.isneginf(), expected.isneginf())
    assert torch.equal(got.isnan(), expected.isnan())


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-2, 3, shape).float()


@quick_interpreted(lambda given: given == (1, 1, "per_sample", "relu"))
@each_backend
@pytest.mark.parametrize(
    "separable",
    [False, pytest.param(True, marks=stored)],
    ids=["pyramid", "separable"],
)
@pytest.mark.parametrize(
    "given", list(itertools.product([0, 1], [0, 1], [None, "one", "per_sample"], [None, "relu"]))
)
def test_epilogue(separable, given, backend) -> None:
    bias, scale, shift, activation = given
    keywords = {
        "bias": integers(8) if bias else None,
        "scale": integers(8) if scale else None,
        "shift": {None: None, "one": integers(8), "per_sample": integers(3, 8)}[shift],
        "activation": activation,
    }
    x, rates = integers(3, 6, 5, 7), [2, (1, 3)]
    dense = [integers(5, 6, 3, 3), integers(3, 6, 1, 3)]
    depthwise, pointwise = (
        [integers(6, 1, 3, 3), None],
        [integers(5, 6, 1, 1), integers(3, 6, 1, 1)],
    )
    name = "atrous_separable_pyramid" if separable else "atrous_pyramid"
    weights = (depthwise, pointwise) if separable else (dense,)
    got = getattr(aspp_ext, name)(x, *weights, rates, **keywords, backend=backend)
    assert torch.equal(got, getattr(reference, name)(x, *weights, rates, **keywords))


@stored
@quick_interpreted()
@each_backend
@pytest.mark.parametrize("activation", [None, "relu"])
def test_between(activation, backend) -> None:
    x, rates = integers(2, 6, 5, 7), [2, 1, 3]
    depthwise = [integers(6, 1, 3, 3), None, integers(6, 1, 1, 3)]
    pointwise = [integers(o, 6, 1, 1) for o in (5, 3, 2)]
    between = [(integers(6), integers(6)), None, None]
    keywords = {"between": between, "between_activation": activation, "bias": integers(10)}
    got = aspp_ext.atrous_separable_pyramid(
        x, depthwise, pointwise, rates, **keywords, backend=backend
    )
    expected = reference.atrous_separable_pyramid(x, depthwise, pointwise, rates, **keywords)
    assert torch.equal(got, expected)
    one = {"between": between[0], "between_activation": activation, "activation": "relu"}
    first = (depthwise[0], pointwise[0], rates[0])
    got = aspp_ext.atrous_separable_conv2d(x, *first, **one, backend=backend)
    assert torch.equal(got, reference.atrous_separable_conv2d(x, *first, **one))


@quick_interpreted()
@each_backend
def test_one_dimension(backend) -> None:
    x, weights = integers(2, 6, 29), [integers(5, 6, 3), integers(4, 6, 1), integers(3, 6, 5)]
    keywords = {"shift": integers(2, 12), "activation": "relu"}
    got = aspp_ext.atrous_pyramid(x, weights, [4, 1, (9, 20)], **keywords, backend=backend)
    assert torch.equal(got, reference.atrous_pyramid(x, weights, [4, 1, (9, 20)], **keywords))


@pytest.mark.parametrize("call", [aspp_ext.atrous_pyramid, aspp_ext.explain])
def test_an_image_without_a_batch_is_no_line(call) -> None:
    """Also where as many rows as channels would let it pass for one."""
    words = (
        r"x must be \[N, C, H, W\] for weights\[1\] of shape \[4, 6, 3, 3\], got shape \[6, 6, 9\]"
    )
    with pytest.raises(ValueError, match=words):
        call(integers(6, 6, 9), [integers(4, 6, 3), integers(4, 6, 3, 3)], [2, 2])
    assert "1x3" in aspp_ext.explain(integers(2, 6, 9), [integers(4, 6, 3)], [2])


PARTS = [(pool, end) for pool in (True, False) for end in ("relu", "linear", "per sample")]


@quick_interpreted()
@each_backend
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("pool", "end"), [*PARTS, (False, "none")])
def test_head(pool, end, activation, backend) -> None:
    x, rates = integers(2, 6, 4, 8), [1, 2, 3]
    shift = integers(2, 9) if end == "per sample" else integers(9)
    arguments = (
        *(x, [None, integers(6, 1, 3, 3), None]),
        *([integers(5, 6, 1, 1), integers(4, 6, 1, 1), integers(3, 6, 3, 3)], rates, integers(12)),
        *((integers(7, 6), integers(7)) if pool else (None, None)),
        *((None, None) if end == "none" else (integers(9, 19 if pool else 12), shift)),
    )
    last = None if end == "linear" else "relu"
    keywords = {"activation": activation, "project_activation": last}
    got = aspp_ext.aspp_inference(*arguments, **keywords, backend=backend)
    assert torch.equal(got, reference.aspp_inference(*arguments, **keywords))


@on_native
@pytest.mark.parametrize("separable", [False, True], ids=["dense", "separable"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_a_head_without_projection_is_a_pyramid(layout, separable) -> None:
    """Bit for bit, in x's memory format whatever the weights'."""
    x, rates, shift = laid_out(torch.randn(2, 6, 9, 8), layout), [2, 1], torch.randn(8)
    depthwise = [torch.randn(6, 1, 3, 3) if separable else None, None]
    kernel = 1 if separable else 3
    weights = [torch.randn(5, 6, kernel, kernel), torch.randn(3, 6, 1, 1)]
    weights = [laid_out(w, "channels_last") for w in weights]
    for activation in (None, "relu"):
        keywords = {"shift": shift, "activation": activation}
        if separable:
            own = aspp_ext.atrous_separable_pyramid(x, depthwise, weights, rates, **keywords)
        else:
            own = aspp_ext.atrous_pyramid(x, weights, rates, **keywords)
        branches = (x, depthwise, weights, rates, shift, None, None, None, None)
        for asked in (None, False, True):
            got = aspp_ext.aspp_inference(*branches, activation=activation, channels_last=asked)
            if _native.emulated:  # which sums in tiles of its own for either format
                torch.testing.assert_close(got, own)
            else:
                assert torch.equal(got, own)
            last = is_channels_last(x) if asked is None else asked
            assert is_channels_last(got) == last


@quick_interpreted(lambda layout: layout == "sliced")
@each_format
def test_memory_format_is_that_of_convolution(shape, layout, weight_layout) -> None:
    check_memory_format(shape, layout, weight_layout, "cpu", None)
    x = laid_out(torch.randn(shape), layout)
    depthwise, pointwise = torch.randn(shape[1], 1, 3, 3), torch.randn(8, shape[1], 1, 1)
    pointwise = laid_out(pointwise, weight_layout)
    got = aspp_ext.atrous_separable_conv2d(x, depthwise, pointwise, 2)
    assert got.stride() == F.conv2d(x, pointwise).stride()


def test_arguments_are_not_written() -> None:
    for op in OPS.values():
        arguments = op.make(PROBLEMS["x_sliced"], torch.float32)
        before = tree_map_only(torch.Tensor, torch.clone, arguments)
        call_of(op)(*arguments)
        for got, expected in zip(outputs_of(arguments), outputs_of(before), strict=True):
            assert torch.equal(got, expected)


def outputs_of(arguments) -> list[torch.Tensor]:
    return [t for t in tree_flatten(arguments)[0] if isinstance(t, torch.Tensor)]


@on_native
def test_samples_do_not_depend_on_the_batch(monkeypatch) -> None:
    """A sample's bits are the same alone and among others, where the same form computes both."""
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "0")
    for op in (OPS["pyramid"], OPS["separable_between_epilogue"], OPS["head"]):
        x, *rest = op.make(PROBLEMS["prime_sizes"], torch.float32)
        whole = call_of(op)(x, *rest)
        alone = [call_of(op)(sample[None], *rest) for sample in x]
        assert torch.equal(whole, torch.cat(alone))
