# SPDX-License-Identifier: BSD-3-Clause
"""The pyramids on CUDA among PyTorch's machinery: streams, devices, graphs, compilers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gpu_cases import BY_CUDA, BY_TRITON, each_implementation, each_operator
from processes import said_by_python
from torch import Tensor

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import OPS, PROBLEMS, Branch, Problem

pytestmark = pytest.mark.gpu
each_name = each_operator()
# Sliced sums need a workspace and counters, layouts a transposition before and behind.
SLICED = Problem("sliced", (1, 1024, 17, 17), (Branch(40, (1, 1)), Branch(40, (3, 3), (6, 6))))
KINDS = [SLICED, PROBLEMS["x_channels_last"], PROBLEMS["x_sliced"], PROBLEMS["prime_sizes"]]
each_kind = pytest.mark.parametrize("problem", KINDS, ids=lambda p: p.name)
SLEEP = 50_000_000  # cycles: tens of milliseconds


def integers(name: str, problem: Problem, draw: int = 0, device: str = "cuda"):
    return OPS[name].make(problem, torch.bfloat16, integer=True, draw=draw, device=device)


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(
        g.device == e.device and torch.equal(g, e) for g, e in zip(got, expected, strict=True)
    )


@each_kind
@each_name
def test_runs_on_the_current_stream(by, name, problem) -> None:
    """The input is written there, after a sleep: another stream would read what was before."""
    arguments = integers(name, problem)
    image = arguments[0].clone()
    expected = by.results(name)(*arguments)
    arguments[0].fill_(float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        arguments[0].copy_(image)
        got = by.results(name)(*arguments)
        copies = [t.clone() for t in got]
    stream.synchronize()
    assert_equal(copies, expected)


def during_a_sleep(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What ``call`` returns while the device sleeps.

    A host that waits for the device returns too late in every attempt, a busy one in some.
    """
    for _ in range(8):
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP)
        event = torch.cuda.Event()
        event.record()
        got = call()
        if not event.query():
            return got
    raise AssertionError("the host waited for the sleep to end")


@each_kind
@each_name
def test_does_not_wait_for_the_device(by, name, problem) -> None:
    """Neither PyTorch nor the clock sees the host wait, once a shape has run."""
    arguments = integers(name, problem)
    expected = by.results(name)(*arguments)

    def call() -> list[Tensor]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return by.results(name)(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert_equal(during_a_sleep(call), expected)


@each_name
def test_a_new_shape_on_a_busy_stream(by, name) -> None:
    """Its work list is there when the kernels read it, whichever stream it is copied on."""
    arguments = integers(name, replace(SLICED, shape=(1, 1024, 19, 18)))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        got = by.results(name)(*arguments)
    stream.synchronize()
    assert_equal(got, by.results(name)(*arguments))


@each_name
def test_a_new_shape_where_pytorch_keeps_all_memory(by, name) -> None:
    """The device has none left for a work list until PyTorch lets go of what is freed."""
    given = [integers(name, replace(SLICED, shape=(1, 1024, 21, width))) for width in range(18, 26)]
    taken = []
    for size in (2**30, 2**21):
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    del taken
    got = [by.results(name)(*arguments) for arguments in given]
    torch.cuda.empty_cache()
    for result, arguments in zip(got, given, strict=True):
        assert_equal(result, by.results(name)(*arguments))


@each_kind
@each_name
def test_memory_goes_back(by, name, problem) -> None:
    """And from a shape's second call on none is taken that PyTorch does not have already."""
    arguments = integers(name, problem)
    by.results(name)(*arguments)
    torch.cuda.synchronize()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(20):
        by.results(name)(*arguments)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (held, reserved)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@each_name
def test_another_device_than_the_current(by, name) -> None:
    expected = by.results(name)(*integers(name, SLICED))
    assert torch.cuda.current_device() == 0
    got = by.results(name)(*integers(name, SLICED, device="cuda:1"))
    assert all(t.device.index == 1 for t in got)
    assert_equal([t.to("cuda:0") for t in got], expected)
    assert torch.cuda.current_device() == 0


def captured(by, name: str, problem: Problem) -> Problem:
    """A shape that no other test has."""
    n, c, h, w = problem.shape
    shape = (n + 1, c, h + 1 + by.names.index(name), w)
    return replace(problem, name=f"{problem.name} captured", shape=shape)


@each_kind
@each_name
def test_graph_capture_and_replay(by, name, problem) -> None:
    check_capture(by, name, problem, first=False)


@each_kind
@each_operator([BY_CUDA])
def test_the_first_call_may_be_captured(by, name, problem) -> None:
    """Where the shape is new, its work list is made while the stream is being captured."""
    check_capture(by, name, captured(by, name, problem), first=True)


def check_capture(by, name: str, problem: Problem, first: bool) -> None:
    draws = [integers(name, problem, draw) for draw in range(3)]
    arguments = integers(name, problem)
    if not first:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            by.results(name)(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = by.results(name)(*arguments)
    for values in (*draws, draws[0]):
        arguments[0].copy_(values[0])
        for t, v in zip(tensors(arguments[1:]), tensors(values[1:]), strict=True):
            t.copy_(v)
        graph.replay()
        assert_equal(got, by.results(name)(*values))


def tensors(arguments) -> list[Tensor]:
    found = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    return [t for t in found if isinstance(t, Tensor)]


@each_operator([BY_TRITON])
def test_a_new_shape_is_refused_in_a_capture(by, name) -> None:
    """In words, and the device is well after it."""
    known = replace(SLICED, layout="channels_last")  # read in place: nothing to compile for it
    arguments = integers(name, captured(by, name, known))
    by.results(name)(*integers(name, known))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            with pytest.raises(RuntimeError, match="call it once outside of the capture"):
                by.results(name)(*arguments)
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    got = by.results(name)(*arguments)
    assert_equal(got, by.results(name)(*arguments))


FIRST_CALL_OF_A_PROCESS = """
import torch, aspp_ext
op = torch.ops.aspp_ext.atrous_pyramid
x, w = torch.ones(1, 64, 20, 20, device="cuda"), torch.ones(8, 64, 3, 3, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = op(x, [w], [30, 30])
graph.replay()
assert (y == 64).all()
"""


def test_the_first_call_of_a_process_may_be_captured() -> None:
    """Nothing is loaded by then."""
    said_by_python(FIRST_CALL_OF_A_PROCESS)


def dense(x: Tensor, weights: list[Tensor], rates: list[int], **keywords) -> Tensor:
    return aspp_ext.atrous_pyramid(x, weights, rates, **keywords)


def separable(x: Tensor, weights: list[Tensor], rates: list[int], **keywords) -> Tensor:
    """Of the first kernel of each weight and the middles of the others."""
    depthwise = [w[:1].movedim(0, 1).contiguous() for w in weights]
    pointwise = [w[1:, :, w.size(2) // 2, w.size(3) // 2, None, None] for w in weights]
    return aspp_ext.atrous_separable_pyramid(x, depthwise, pointwise, rates, **keywords)


each_function = pytest.mark.parametrize("function", [dense, separable], ids=["dense", "separable"])


@each_function
@each_implementation
def test_a_captured_training_step(by, function) -> None:
    """Work lists in a graph stay where they are, whatever is computed afterwards."""
    x, w = integers("pyramid", SLICED)[:2]
    leaves = [x.float().requires_grad_(), *(t.float().requires_grad_() for t in w)]

    def step():
        y = function(leaves[0], leaves[1:], [1, 6], backend=by.backend)
        return torch.autograd.grad(y.square().sum(), leaves)

    expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for size in range(3, 40):
        other = torch.ones(1, 8, size, size + 1, device="cuda")
        function(other, [other.new_ones(2, 8, 3, 3)], [1], backend=by.backend)
    graph.replay()
    assert_equal(list(got), list(expected))


@each_implementation
def test_called_from_threads_on_their_own_streams(by) -> None:
    names = by.operators
    work = {name: [integers(name, p) for p in KINDS] for name in names}
    expected = {name: [by.results(name)(*a) for a in work[name]] for name in names}
    torch.cuda.synchronize()
    wrong: list[str] = []

    def run(k: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(20):
                name = names[(i + k) % len(names)]
                for arguments, right in zip(work[name], expected[name], strict=True):
                    if not all(map(torch.equal, by.results(name)(*arguments), right)):
                        wrong.append(f"thread {k}, {name}")

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def step(module, x: Tensor, weights: list[Tensor], **keywords) -> list[Tensor]:
    x = x.detach().requires_grad_()
    weights = [w.detach().requires_grad_() for w in weights]
    y = module.atrous_pyramid(x, weights, [1, 2], activation="relu", **keywords)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *weights])]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@each_function
@each_implementation
def test_compile_with_gradients(by, function, backend, fresh_compiler, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_BACKEND", by.backend)

    def forward(x, *weights):
        return function(x, list(weights), [1, 2], activation="relu")

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)
    weights = [torch.randn(s, device="cuda").requires_grad_() for s in ((4, 5, 1, 1), (4, 5, 3, 3))]
    for i, (n, h, w) in enumerate([(2, 7, 9), (3, 12, 8), (4, 5, 31)]):
        x = torch.randn(n, 5, h, w, device="cuda").requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = torch.autograd.grad(compiled(x, *weights).square().mean(), [x, *weights])
        expected = torch.autograd.grad(forward(x, *weights).square().mean(), [x, *weights])
        torch.testing.assert_close(got, expected)


@each_function
@each_implementation
def test_compile_with_graphs(by, function, fresh_compiler, monkeypatch) -> None:
    """Of a shape that is new: what is kept of it may not come from the graph's memory."""
    monkeypatch.setenv("ASPP_EXT_BACKEND", by.backend)
    w = torch.randn(6, 5, 3, 3, device="cuda")
    compiled = torch.compile(
        lambda x: function(x, [w], [2]), fullgraph=True, mode="reduce-overhead"
    )
    for _ in range(5):
        x = torch.randn(3, 5, 6, 14, device="cuda")
        with torch.no_grad():
            got = compiled(x).clone()
        assert torch.equal(got, function(x, [w], [2]))


@each_function
@each_implementation
def test_compile_follows_the_tf32_switch(by, function, fresh_compiler, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_BACKEND", by.backend)
    x, w = torch.randn(1, 64, 9, 9, device="cuda"), torch.randn(32, 64, 3, 3, device="cuda")
    compiled = torch.compile(lambda x: function(x, [w], [2]), fullgraph=True)
    found = []
    try:
        for tf32 in (True, False, True):
            torch.backends.cudnn.allow_tf32 = tf32
            found.append(compiled(x))
            assert torch.equal(found[-1], function(x, [w], [2]))
    finally:
        torch.backends.cudnn.allow_tf32 = True
    rounded, exact, again = found
    assert torch.equal(rounded, again)
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_function
@each_implementation
def test_autocast(by, function, dtype) -> None:
    x, w = torch.randn(2, 5, 7, 9, device="cuda"), torch.randn(6, 5, 3, 3, device="cuda")
    leaves = [x.requires_grad_(), w.requires_grad_()]
    with torch.autocast("cuda", dtype):
        y = function(x, [w], [2], backend=by.backend)
        again = function(x.to(dtype), [w], [2], backend=by.backend)
    assert y.dtype == dtype
    assert torch.equal(y, again)
    got = torch.autograd.grad(y.float().square().sum(), leaves)
    low = function(x.to(dtype), [w.to(dtype)], [2], backend=by.backend)
    assert torch.equal(y, low)
    expected = torch.autograd.grad(low.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in got)
    assert_equal(list(got), list(expected))


@each_implementation
def test_opcheck(by) -> None:
    for name in by.operators:
        for problem in ("one_branch", "x_channels_last", "x_expanded_batch", "empty_batch"):
            arguments = OPS[name].make(PROBLEMS[problem], torch.float32, device="cuda")
            torch.library.opcheck(OPS[name].operator(by.family).default, arguments)


@each_implementation
def test_explain_and_the_default(by, monkeypatch) -> None:
    """What runs unasked was seen right and faster here, or is the reference; explain says so."""
    monkeypatch.delenv("ASPP_EXT_BACKEND", raising=False)
    x, w = torch.randn(1, 8, 9, 9, device="cuda"), torch.randn(4, 8, 3, 3, device="cuda")
    lines = aspp_ext.explain(x, [w], [2]).splitlines()
    (own,) = (line for line in lines if line.strip().startswith(by.backend))
    (chosen,) = (line for line in lines if "runs this" in line)
    if chosen == own:
        assert ", right, " in own
        assert "x as fast as the best of PyTorch" in own
        got = aspp_ext.atrous_pyramid(x, [w], [2])
        assert torch.equal(got, aspp_ext.atrous_pyramid(x, [w], [2], backend=by.backend))
    elif chosen.strip().startswith("reference"):
        assert "not unasked: " in own
        assert torch.equal(
            aspp_ext.atrous_pyramid(x, [w], [2]), reference.atrous_pyramid(x, [w], [2])
        )


@each_implementation
def test_explain_of_what_is_asked_for(by, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_BACKEND", by.backend)
    x, w = torch.randn(1, 8, 9, 9, device="cuda"), torch.randn(4, 8, 3, 3, device="cuda")
    lines = aspp_ext.explain(x, [w], [2]).splitlines()
    assert any(line.strip().startswith(by.backend) and "runs this" in line for line in lines)


@each_implementation
def test_training_steps_agree_with_the_reference(by) -> None:
    """In the widest dtype, with everything between: PyTorch's autograd calls on its own threads."""
    torch.backends.cudnn.allow_tf32 = False
    try:
        x = torch.randn(2, 20, 13, 11, device="cuda", dtype=by.widest)
        sizes = ((6, 20, 1, 1), (7, 20, 3, 3))
        weights = [torch.randn(s, device="cuda", dtype=by.widest) for s in sizes]
        got, expected = step(aspp_ext, x, weights, backend=by.backend), step(reference, x, weights)
    finally:
        torch.backends.cudnn.allow_tf32 = True
    tolerance = 1e-10 if by.widest == torch.float64 else 1e-3
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
