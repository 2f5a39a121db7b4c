# SPDX-License-Identifier: BSD-3-Clause
"""The dense pyramid on CUDA: the table ``OPS`` x ``PROBLEMS``, real sizes, and bad input.

``test_gpu_runtime.py`` has streams, graphs and compilers, ``test_gpu_modules.py`` whole heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bad_inputs import BAD, VALID
from table import (
    LOW,
    PYRAMIDS,
    SEEN,
    check_error_law,
    check_float64,
    check_integers,
    check_memory_format,
    check_nan,
    dtype_id,
    each_format,
    is_representative,
)
from test_contract import call_direct, call_public, kind_of, made
from torch.autograd import gradcheck, gradgradcheck

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import (
    OPS,
    PROBLEMS,
    Branch,
    Problem,
    assert_no_worse_than_torch,
    converted,
    laid_out,
    outputs,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NAMES = [*PYRAMIDS, "head"]
# dtype, and whether float32 products may be TF32
PRECISIONS = [(d, False) for d in (torch.float32, torch.float64, *LOW)] + [(torch.float32, True)]
each_precision = pytest.mark.parametrize(
    ("dtype", "tf32"), PRECISIONS, ids=[f"{dtype_id(d)}{'-tf32' * t}" for d, t in PRECISIONS]
)
each_name = pytest.mark.parametrize("name", NAMES)
CASES = [pytest.param(n, p, id=f"{n}-{p.name}") for n in NAMES for p in PROBLEMS.values()]


def is_exact(name: str, problem: Problem) -> bool:
    return OPS[name].exact(problem)


STATISTICS = [c for c in CASES if is_representative(c.values[1])]


def ours(name: str, tf32: bool) -> Any:
    """The operator on DEVICE; the switch is set for PyTorch's own convolutions, too."""
    torch.backends.cudnn.allow_tf32 = tf32
    op = OPS[name]
    call = op.implementations(DEVICE)[DEVICE]
    if name == "head":
        return call
    return lambda *arguments: call(*arguments, tf32)


@pytest.fixture(autouse=True)
def switch_put_back():
    yield
    torch.backends.cudnn.allow_tf32 = True


@each_precision
@pytest.mark.parametrize(("name", "problem"), [c for c in CASES if is_exact(*c.values)])
def test_integers_are_exact(name, problem, dtype, tf32) -> None:
    op = OPS[name]
    check_integers(ours(name, tf32), op, op.make(problem, dtype, integer=True, device=DEVICE))


FLOATS = [case for case in PRECISIONS if case[0] != torch.float64]


@pytest.mark.parametrize(
    ("dtype", "tf32"), FLOATS, ids=[f"{dtype_id(d)}{'-tf32' * t}" for d, t in FLOATS]
)
@pytest.mark.parametrize(("name", "problem"), STATISTICS)
def test_error_law(name, problem, dtype, tf32) -> None:
    check_error_law(ours(name, tf32), OPS[name], problem, dtype, DEVICE)


@pytest.mark.parametrize(("name", "problem"), STATISTICS)
def test_float64(name, problem) -> None:
    check_float64(ours(name, False), OPS[name], problem, DEVICE)


@each_precision
@pytest.mark.parametrize("problem", SEEN)
@pytest.mark.parametrize("name", PYRAMIDS)
def test_nan_reaches_everything_that_sees_it(name, problem, dtype, tf32) -> None:
    """And nothing else, but for the channel of a weight."""
    merged = name != "pyramid_grad_weight"
    check_nan(ours(name, tf32), OPS[name], PROBLEMS[problem], dtype, DEVICE, merged)


@each_precision
def test_infinity_reaches_everything_that_sees_it(dtype, tf32) -> None:
    """Where the reference's result is not finite, ours is not."""
    x = torch.randn(1, 5, 7, 9)
    x[0, 2, 3, 4], x[0, 1, 6, 0] = torch.inf, -torch.inf
    weights = [torch.randn(20, 5, 3, 3), torch.randn(3, 5, 1, 1)]
    arguments = [t.to(DEVICE, dtype) for t in (x, *weights)]
    got = ours("pyramid", tf32)(arguments[0], arguments[1:], [2, 2, 1, 1], None, None, False)
    expected = reference.atrous_pyramid(x, weights, [2, 1])
    assert not got.cpu()[~expected.isfinite()].isfinite().any()


REAL = {
    "2048 channels, 33x33": ((1, 2048, 33, 33), (6, 12, 18)),
    "2048 channels, 65x65": ((2, 2048, 65, 65), (12, 24, 36)),
    "512 channels, 64x128": ((2, 512, 64, 128), (6, 12, 18)),
    "odd, 97x97": ((1, 203, 97, 97), (12, 24, 36)),
}


def real(shape, rates) -> Problem:
    branches = (Branch(256, (1, 1)), *(Branch(256, (3, 3), (r, r)) for r in rates))
    return Problem(f"real {shape}", shape, branches)


@pytest.mark.parametrize("problem", REAL)
@pytest.mark.parametrize("name", PYRAMIDS)
def test_real_sizes_are_exact(name, problem) -> None:
    """Sums of small integers are exact in float32, whatever the order, and are rounded once."""
    op = OPS[name]
    wide = op.make(real(*REAL[problem]), torch.float64, integer=True, device=DEVICE)
    got = {
        (dtype, tf32): outputs(ours(name, tf32)(*converted(wide, dtype)))
        for dtype, tf32 in PRECISIONS
    }
    torch.use_deterministic_algorithms(False)  # cuDNN's are slow, and here all are exact
    expected = outputs(op.expected(*wide))
    for (dtype, tf32), results in got.items():
        for g, e in zip(results, expected, strict=True):
            assert torch.equal(g, e.to(dtype)), f"{dtype}, TF32 {tf32}: {(g != e).nonzero()[:5]}"


@each_precision
@each_name
def test_same_bits_every_time(name, dtype, tf32) -> None:
    """Also between other calls, and where a sum is sliced over several blocks."""
    op, call = OPS[name], ours(name, tf32)
    problems = [*PROBLEMS.values(), real(*REAL["2048 channels, 33x33"])]
    arguments = [op.make(p, dtype, device=DEVICE) for p in problems]
    first = [outputs(call(*a)) for a in arguments]
    for _ in range(3):
        for a, expected in zip(arguments, first, strict=True):
            assert all(map(torch.equal, outputs(call(*a)), expected))


def test_many_repetitions_give_the_same_bits() -> None:
    """A race shows once in a while."""
    call = ours("pyramid_grad_weight", False)
    problem = real(*REAL["2048 channels, 33x33"])
    arguments = OPS["pyramid_grad_weight"].make(problem, torch.bfloat16, device=DEVICE)
    first = call(*arguments)
    for _ in range(300):
        assert all(map(torch.equal, call(*arguments), first))


@each_format
def test_memory_format_is_that_of_convolution(shape, layout, weight_layout) -> None:
    check_memory_format(shape, layout, weight_layout, DEVICE, DEVICE)


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).requires_grad_()


def small(x, w0, w1, bias, scale, shift, backend=DEVICE, relu=True):
    keywords = {"bias": bias, "scale": scale, "shift": shift, "backend": backend}
    activation = "relu" if relu else None
    return aspp_ext.atrous_pyramid(x, [w0, w1], [1, (2, 3)], **keywords, activation=activation)


LEAVES = [(2, 3, 4, 5), (2, 3, 3, 3), (1, 3, 3, 1), (3,), (3,), (2, 3)]


def test_gradcheck() -> None:
    leaves = [leaf(*s) for s in LEAVES]
    assert gradcheck(small, leaves, check_undefined_grad=True, check_forward_ad=True)
    assert gradgradcheck(small, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize(
    ("dtype", "tf32"), FLOATS, ids=[f"{dtype_id(d)}{'-tf32' * t}" for d, t in FLOATS]
)
def test_gradients_of_a_training_step(dtype, tf32) -> None:
    """The whole path, epilogue included, as a user trains with it."""
    torch.backends.cudnn.allow_tf32 = tf32
    shapes = [(2, 48, 24, 25), (7, 48, 1, 1), (70, 48, 3, 3)]
    tensors = [torch.randn(s) / (s[1] * s[2]) ** 0.5 for s in shapes]
    shift, grad = 0.1 * torch.randn(2, 77), torch.randn(2, 77, 24, 25).to(dtype)

    def run(module, device, to, **keywords):
        leaves = [t.to(dtype).to(device, to).requires_grad_() for t in tensors]
        moved = shift.to(dtype).to(device, to)
        y = module.atrous_pyramid(leaves[0], leaves[1:], [1, 6], shift=moved, **keywords)
        found = torch.autograd.grad(y, leaves, grad.to(device, to))
        return [t.cpu() for t in (y.detach(), *found)]

    runs = (
        run(aspp_ext, DEVICE, dtype, backend=DEVICE),
        run(reference, DEVICE, dtype),
        run(reference, "cpu", torch.float64),
    )
    for got, baseline, oracle in zip(*runs, strict=True):
        assert_no_worse_than_torch(got, baseline, oracle, factor=3)


@pytest.mark.parametrize("layout", ["expanded_batch", "expanded_plane", "channels_last", "sliced"])
def test_gradient_of_any_layout(layout) -> None:
    leaves = [leaf(*s) for s in LEAVES]
    y = small(*leaves)
    grad = laid_out(torch.randn_like(y), layout)
    got = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, grad.contiguous())
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


DENSE = [b for b in BAD if b.op.startswith("atrous_pyramid")]
each_bad = pytest.mark.parametrize("bad", DENSE, ids=lambda b: f"{b.op}-{b.why}".replace(" ", "_"))
HERE = f"{DEVICE}:0" if DEVICE == "cuda" else DEVICE


@each_bad
def test_bad_input_is_refused_in_the_same_words(bad) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as refusal:
        call_direct(bad.op, made(bad.arguments, HERE))
    assert str(refusal.value).partition("\n")[0] == bad.message(HERE)
    if bad.op == "atrous_pyramid":
        with pytest.raises(kind_of(bad)) as refusal:
            call_public(bad.op, made(bad.arguments, HERE), DEVICE)
        assert str(refusal.value) == bad.message(HERE)


@pytest.mark.parametrize("op", [op for op in VALID if op.startswith("atrous_pyramid")])
def test_the_device_is_well_after_a_refusal(op) -> None:
    """No launch came before it: an error would stick to the device."""
    for bad in DENSE:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            call_direct(bad.op, made(bad.arguments, HERE))
    got = outputs(call_direct(op, made(VALID[op], HERE)))
    assert all((t == 0).all() for t in got)


def test_what_the_kernels_cannot_count_is_refused() -> None:
    one = torch.zeros(1, device=DEVICE)
    x, w = one.expand(2**11, 1, 2**10, 2**10), one.expand(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="pixels of the batch go up to 2147483647"):
        aspp_ext.atrous_pyramid(x, [w], [1], backend="cuda")
    with pytest.raises(RuntimeError, match="branches go up to 64, got 65"):
        aspp_ext.atrous_pyramid(one.expand(1, 1, 3, 3), [w] * 65, [1] * 65, backend="cuda")


def test_sixty_four_branches() -> None:
    x = torch.randint(-2, 3, (1, 9, 11, 12)).to(DEVICE, torch.float32)
    weights = [torch.randint(-1, 2, (3, 9, 3, 3)).to(x) for _ in range(64)]
    rates = list(range(1, 65))
    got = aspp_ext.atrous_pyramid(x, weights, rates, backend=DEVICE)
    expected = reference.atrous_pyramid(x.double(), [w.double() for w in weights], rates)
    assert torch.equal(got.double(), expected)


@pytest.mark.large
@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_2_to_31_elements(last) -> None:
    """Of the input and of the output: an offset of 32 bits would wrap."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("less than 40 GiB on the device")
    torch.utils.deterministic.fill_uninitialized_memory = False
    sample = torch.randint(-2, 3, (1, 32, 256, 256), device=DEVICE).bfloat16()
    w = torch.randint(-1, 2, (34, 32, 1, 3), device=DEVICE).bfloat16()
    x = sample.repeat(1030, 1, 1, 1)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = aspp_ext.atrous_pyramid(x, [w], [100], backend=DEVICE)
    assert min(x.numel(), y.numel()) > 2**31
    expected = aspp_ext.atrous_pyramid(sample, [w], [100], backend=DEVICE)[0]
    assert torch.equal(expected, reference.atrous_pyramid(sample, [w], [100])[0])
    assert all(torch.equal(image, expected) for image in y)
    grad_input = torch.ops.aspp_ext.atrous_pyramid_grad_input
    expected = grad_input(y[:1], [w], [100, 100])[0]
    assert all(torch.equal(image, expected) for image in grad_input(y, [w], [100, 100]))
