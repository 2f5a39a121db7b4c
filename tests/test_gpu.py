# SPDX-License-Identifier: BSD-3-Clause
"""The pyramids on CUDA: the table ``OPS`` x ``PROBLEMS``, real sizes, and bad input.

``test_gpu_runtime.py`` has streams, graphs and compilers, ``test_gpu_modules.py`` whole heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from bad_inputs import BAD, VALID
from gpu_cases import (
    BY_CUDA,
    BY_TRITON,
    DEVICE,
    IMPLEMENTATIONS,
    REAL,
    RUNS,
    each_case,
    each_implementation,
    each_operator,
    each_run,
    real,
)
from table import SEEN, SEPARABLE, check_error_law, check_memory_format, each_format
from test_contract import call_direct, call_public, kind_of, made
from torch.autograd import gradcheck, gradgradcheck

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import (
    OPS,
    PROBLEMS,
    assert_no_worse_than_torch,
    converted,
    laid_out,
    outputs,
)
from aspp_ext.testing.checks import (
    check_float64,
    check_integers,
    check_reach,
    hit_and_seen,
    is_representative,
    tensors_in,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def switch_put_back():
    yield
    torch.backends.cudnn.allow_tf32 = True


@each_case(lambda run, problem: OPS[run.name].exact(problem), PROBLEMS.values())
def test_integers_are_exact(run, problem) -> None:
    op = OPS[run.name]
    check_integers(run, op, op.make(problem, run.dtype, integer=True, device=DEVICE))


STATISTICS = [problem for problem in PROBLEMS.values() if is_representative(problem)]


@each_case(lambda run, _: run.dtype != torch.float64, STATISTICS)
def test_error_law(run, problem) -> None:
    # The switch comes first: it decides what the baseline multiplies, too.
    check_error_law(run.by.call(run.name, run.tf32), OPS[run.name], problem, run.dtype, DEVICE)


@each_case(lambda run, _: run.dtype == torch.float64, STATISTICS)
def test_float64(run, problem) -> None:
    check_float64(run, OPS[run.name], problem, DEVICE)


@each_case(lambda run, _: run.name in run.by.operators, [PROBLEMS[name] for name in SEEN])
def test_nan_reaches_everything_that_sees_it(run, problem) -> None:
    """And nothing else, but for the channel of a weight where rectangles are merged."""
    op = OPS[run.name]
    if run.by is BY_TRITON and run.name.startswith("separable_backward"):
        # Like PyTorch's, it may reach more taps.
        arguments = op.make(problem, run.dtype, device=DEVICE)
        for leaf in tensors_in(arguments):
            for _, nan, seen in hit_and_seen(run, op, arguments, leaf):
                assert nan[seen].all(), f"argument {leaf}: not all that depends on it is NaN"
        return
    alone = run.name == "pyramid_grad_weight" or (run.by is BY_CUDA and run.name in SEPARABLE)
    check_reach(run, op, problem, run.dtype, DEVICE, merged=not alone)


@each_run(run for run in RUNS if run.name == "pyramid")
def test_infinity_reaches_everything_that_sees_it(run) -> None:
    """Where the reference's result is not finite, ours is not."""
    x = torch.randn(1, 5, 7, 9)
    x[0, 2, 3, 4], x[0, 1, 6, 0] = torch.inf, -torch.inf
    weights = [torch.randn(20, 5, 3, 3), torch.randn(3, 5, 1, 1)]
    arguments = [t.to(DEVICE, run.dtype) for t in (x, *weights)]
    got = run(arguments[0], arguments[1:], [2, 2, 1, 1], None, None, False)
    expected = reference.atrous_pyramid(x, weights, [2, 1])
    assert not got.cpu()[~expected.isfinite()].isfinite().any()


@contextlib.contextmanager
def refused_where_it_does_not_fit() -> Iterator[None]:
    """The fused kernel, where it is asked for."""
    try:
        yield
    except RuntimeError as refusal:
        if "the fused kernel cannot run" not in str(refusal):
            raise
        # Halos beyond a block's shared memory and float64: the path through memory is tested.
        pytest.skip(str(refusal).partition("\n")[0])


each_way = pytest.mark.parametrize("way", ["fused", "stored"])
FORWARD = [name for name in SEPARABLE if "backward" not in name]


@each_way
@each_case(
    lambda run, _: run.by is BY_CUDA and run.name in FORWARD and run.dtype == torch.bfloat16,
    PROBLEMS.values(),
)
def test_either_way_of_a_separable_forward_is_exact(run, problem, way, go) -> None:
    """In one kernel and through memory, whichever it would choose."""
    go(way)
    arguments = OPS[run.name].make(problem, run.dtype, integer=True, device=DEVICE)
    with refused_where_it_does_not_fit():
        check_integers(run, OPS[run.name], arguments)


@each_way
@pytest.mark.parametrize("problem", REAL)
@pytest.mark.parametrize("name", FORWARD)
def test_either_way_is_exact_at_real_sizes(name, problem, way, go) -> None:
    go(way)
    with refused_where_it_does_not_fit():
        check_real_sizes(BY_CUDA, name, problem, [(torch.bfloat16, False), (torch.float32, True)])


@pytest.mark.parametrize("problem", REAL)
@each_operator()
def test_real_sizes_are_exact(by, name, problem) -> None:
    check_real_sizes(by, name, problem, by.precisions(name))


def check_real_sizes(by, name, problem, precisions) -> None:
    """Sums of small integers are exact in float32, whatever the order, and are rounded once."""
    op = OPS[name]
    wide = op.make(real(problem), torch.float64, integer=True, device=DEVICE)
    got = {
        (dtype, tf32): outputs(by.call(name, tf32)(*converted(wide, dtype)))
        for dtype, tf32 in precisions
    }
    torch.use_deterministic_algorithms(False)  # cuDNN's are slow, and here all are exact
    expected = outputs(op.expected(*wide))
    for (dtype, tf32), results in got.items():
        for g, e in zip(results, expected, strict=True):
            assert torch.equal(g, e.to(dtype)), f"{dtype}, TF32 {tf32}: {(g != e).nonzero()[:5]}"


@each_run(RUNS)
def test_same_bits_every_time(run) -> None:
    """Also between other calls, and where a sum is sliced over several blocks."""
    problems = [*PROBLEMS.values(), real("2048 channels, 33x33")]
    arguments = [OPS[run.name].make(p, run.dtype, device=DEVICE) for p in problems]
    first = [outputs(run(*a)) for a in arguments]
    for _ in range(3):
        for a, expected in zip(arguments, first, strict=True):
            assert all(map(torch.equal, outputs(run(*a)), expected))


@each_implementation
def test_many_repetitions_give_the_same_bits(by) -> None:
    """A race shows once in a while."""
    call = by.call("pyramid_grad_weight")
    problem = real("2048 channels, 33x33")
    arguments = OPS["pyramid_grad_weight"].make(problem, torch.bfloat16, device=DEVICE)
    first = call(*arguments)
    for _ in range(300):
        assert all(map(torch.equal, call(*arguments), first))


@each_format
@each_implementation
def test_memory_format_is_that_of_convolution(by, shape, layout, weight_layout) -> None:
    check_memory_format(shape, layout, weight_layout, DEVICE, by.backend)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()


def small(x, w0, w1, bias, scale, shift, backend="cuda", relu=True):
    keywords = {"bias": bias, "scale": scale, "shift": shift, "backend": backend}
    activation = "relu" if relu else None
    return aspp_ext.atrous_pyramid(x, [w0, w1], [1, (2, 3)], **keywords, activation=activation)


def small_separable(x, d, p, q, bias, scale, shift, between=None, backend="cuda"):
    keywords = {"bias": bias, "scale": scale, "shift": shift, "backend": backend}
    if between is not None:
        keywords |= {"between": [between, None], "between_activation": "relu"}
    return aspp_ext.atrous_separable_pyramid(x, [d, None], [p, q], [(1, 2), 1], **keywords)


LEAVES = [(2, 3, 4, 5), (2, 3, 3, 3), (1, 3, 3, 1), (3,), (3,), (2, 3)]
SEPARABLE_LEAVES = [(2, 3, 4, 5), (3, 1, 3, 3), (2, 3, 1, 1), (1, 3, 1, 1), (3,), (3,), (2, 3)]


def test_gradcheck() -> None:
    leaves = [leaf(*s) for s in LEAVES]
    assert gradcheck(small, leaves, check_undefined_grad=True, check_forward_ad=True)
    assert gradgradcheck(small, leaves, check_fwd_over_rev=True)


def test_separable_gradcheck() -> None:
    leaves = [leaf(*s) for s in SEPARABLE_LEAVES]
    assert gradcheck(small_separable, leaves, check_undefined_grad=True, check_forward_ad=True)
    assert gradgradcheck(small_separable, leaves)
    between = [leaf(3), leaf(3)]
    assert gradcheck(lambda s, t, *rest: small_separable(*rest, (s, t)), [*between, *leaves])


def dense_step(module, x, w0, w1, **keywords):
    return module.atrous_pyramid(x, [w0, w1], [1, 6], **keywords)


def separable_step(module, x, p0, d1, p1, **keywords):
    return module.atrous_separable_pyramid(x, [None, d1], [p0, p1], [1, 6], **keywords)


STEPS = {
    "pyramid": (dense_step, [(2, 48, 24, 25), (7, 48, 1, 1), (70, 48, 3, 3)]),
    "separable": (
        separable_step,
        [(2, 48, 24, 25), (7, 48, 1, 1), (48, 1, 3, 3), (70, 48, 1, 1)],
    ),
}


@each_run(run for run in RUNS if run.name in STEPS and run.dtype != torch.float64)
def test_gradients_of_a_training_step(run) -> None:
    """The whole path, epilogue included, as a user trains with it."""
    torch.backends.cudnn.allow_tf32 = run.tf32
    forward, shapes = STEPS[run.name]
    tensors = [torch.randn(s) / (s[1] * s[2]) ** 0.5 for s in shapes]
    shift, grad = 0.1 * torch.randn(2, 77), torch.randn(2, 77, 24, 25).to(run.dtype)

    def step(module, device, to, **keywords):
        leaves = [t.to(run.dtype).to(device, to).requires_grad_() for t in tensors]
        y = forward(module, *leaves, shift=shift.to(run.dtype).to(device, to), **keywords)
        found = torch.autograd.grad(y, leaves, grad.to(device, to))
        return [t.cpu() for t in (y.detach(), *found)]

    steps = (
        step(aspp_ext, DEVICE, run.dtype, backend=run.by.backend),
        step(reference, DEVICE, run.dtype),
        step(reference, "cpu", torch.float64),
    )
    for got, baseline, oracle in zip(*steps, strict=True):
        assert_no_worse_than_torch(got, baseline, oracle, factor=3)


@pytest.mark.parametrize("layout", ["expanded_batch", "expanded_plane", "channels_last", "sliced"])
@pytest.mark.parametrize(
    ("call", "sizes"),
    [(small, LEAVES), (small_separable, SEPARABLE_LEAVES)],
    ids=["pyramid", "separable"],
)
@each_implementation
def test_gradient_of_any_layout(by, call, sizes, layout) -> None:
    torch.backends.cudnn.allow_tf32 = False
    leaves = [leaf(*s, dtype=by.widest) for s in sizes]
    y = call(*leaves, backend=by.backend)
    grad = laid_out(torch.randn_like(y), layout)
    got = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, grad.contiguous())
    eps = torch.finfo(by.widest).eps
    torch.testing.assert_close(got, expected, rtol=500 * eps, atol=500 * eps)


BAD_OF = {
    by: [b for b in BAD if b.op in {OPS[name].name for name in by.operators}]
    for by in IMPLEMENTATIONS
}
each_bad = pytest.mark.parametrize(
    ("by", "bad"),
    [
        pytest.param(by, b, id=f"{by}-{b.op}-{b.why}".replace(" ", "_"))
        for by, listed in BAD_OF.items()
        for b in listed
    ],
)
HERE = f"{DEVICE}:0" if DEVICE == "cuda" else DEVICE


@each_bad
def test_bad_input_is_refused_in_the_same_words(by, bad) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as refusal:
        call_direct(bad.op, made(bad.arguments, HERE), by.family)
    assert str(refusal.value).partition("\n")[0] == bad.message(HERE)
    if bad.op in ("atrous_pyramid", "atrous_separable_pyramid"):
        with pytest.raises(kind_of(bad)) as refusal:
            call_public(bad.op, made(bad.arguments, HERE), by.backend)
        assert str(refusal.value) == bad.message(HERE)


@each_implementation
def test_the_device_is_well_after_a_refusal(by) -> None:
    """No launch came before it: an error would stick to the device."""
    for bad in BAD_OF[by]:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            call_direct(bad.op, made(bad.arguments, HERE), by.family)
    for op in dict.fromkeys(OPS[name].name for name in by.operators):
        got = outputs(call_direct(op, made(VALID[op], HERE), by.family))
        assert all((t == 0).all() for t in got)


@each_implementation
def test_what_the_kernels_cannot_count_is_refused(by) -> None:
    one = torch.zeros(1, device=DEVICE)
    x, w = one.expand(2**11, 1, 2**10, 2**10), one.expand(1, 1, 1, 1)
    for name, lists in (("atrous_pyramid", ()), ("atrous_separable_pyramid", (w,))):
        call = getattr(aspp_ext, name)
        with pytest.raises(RuntimeError, match="pixels of the batch go up to 2147482624"):
            call(x, *([d] for d in lists), [w], [1], backend=by.backend)
        few, many = one.expand(1, 1, 3, 3), ([d] * 65 for d in lists)
        with pytest.raises(RuntimeError, match="branches go up to 64, got 65"):
            call(few, *many, [w] * 65, [1] * 65, backend=by.backend)


@pytest.mark.parametrize("separable", [False, True], ids=["pyramid", "separable"])
@each_implementation
def test_sixty_four_branches(by, separable) -> None:
    name = "atrous_separable_pyramid" if separable else "atrous_pyramid"
    sizes = [(9, 1, 3, 3), (3, 9, 1, 1)] if separable else [(3, 9, 3, 3)]
    x = torch.randint(-2, 3, (1, 9, 11, 12)).to(DEVICE, torch.float32)
    weights = [[torch.randint(-1, 2, s).to(x) for _ in range(64)] for s in sizes]
    rates = list(range(1, 65))
    got = getattr(aspp_ext, name)(x, *weights, rates, backend=by.backend)
    expected = getattr(reference, name)(*converted((x, *weights), torch.float64), rates)
    assert torch.equal(got.double(), expected)


@pytest.mark.large
@pytest.mark.prove
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("separable", [False, True], ids=["pyramid", "separable"])
@each_implementation
def test_more_than_2_to_31_elements(by, separable, last) -> None:
    """Of the input and of the output: an offset of 32 bits would wrap."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("less than 40 GiB on the device")
    torch.utils.deterministic.fill_uninitialized_memory = False
    sample = torch.randint(-2, 3, (1, 32, 256, 256), device=DEVICE).bfloat16()
    sizes = [(32, 1, 1, 3), (34, 32, 1, 1)] if separable else [(34, 32, 1, 3)]
    weights = [[torch.randint(-1, 2, s, device=DEVICE).bfloat16()] for s in sizes]
    name = "atrous_separable_pyramid" if separable else "atrous_pyramid"
    x = sample.repeat(1030, 1, 1, 1)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = getattr(aspp_ext, name)(x, *weights, [100], backend=by.backend)
    assert min(x.numel(), y.numel()) > 2**31
    expected = getattr(aspp_ext, name)(sample, *weights, [100], backend=by.backend)[0]
    assert torch.equal(expected, getattr(reference, name)(sample, *weights, [100])[0])
    assert all(torch.equal(image, expected) for image in y)
    if separable:
        rest = (*weights, [100, 100], [], [], False, True, False, False, False)
        backward = by.family.op("atrous_separable_pyramid_backward")
        expected, got = (backward(y[:n], x[:n], *rest)[0] for n in (1, len(x)))
    else:
        grad_input = by.family.op("atrous_pyramid_grad_input")
        expected, got = (grad_input(y[:n], *weights, [100, 100]) for n in (1, len(x)))
    assert all(torch.equal(image, expected[0]) for image in got)
