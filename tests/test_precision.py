# SPDX-License-Identifier: BSD-3-Clause
"""TF32: PyTorch's switches decide, in whichever way they were set, and the decision reaches every
operator of a call, its gradients of every order, and a compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from marks import varied
from processes import run_python
from torch import func
from torch.utils._python_dispatch import TorchDispatchMode

import aspp_ext
from aspp_ext.ops import head_composed, precision, pyramid
from aspp_ext.ops import separable as separable_ops

pytestmark = varied

PYRAMIDS = ("atrous_pyramid", "atrous_pyramid_grad_input", "atrous_pyramid_grad_weight")
SEPARABLE = ("atrous_separable_pyramid", "atrous_separable_pyramid_backward")

# What was set, one after the other -> what a convolution of float32 on CUDA may do.
SETTINGS = [
    ((), True),  # PyTorch's default
    (("cudnn.allow_tf32 = False",), False),
    (("cudnn.allow_tf32 = False", "cudnn.allow_tf32 = True"), True),
    (("cuda.matmul.allow_tf32 = True", "cudnn.allow_tf32 = False"), False),
    (("cudnn.conv.fp32_precision = 'ieee'",), False),
    (("cudnn.rnn.fp32_precision = 'ieee'",), True),
    (("fp32_precision = 'ieee'",), False),
    (("fp32_precision = 'tf32'", "cudnn.fp32_precision = 'ieee'"), False),
    (("fp32_precision = 'ieee'", "cudnn.conv.fp32_precision = 'tf32'"), True),
    (("cudnn.allow_tf32 = False", "cudnn.conv.fp32_precision = 'tf32'"), True),
    (("cudnn.conv.fp32_precision = 'ieee'", "cudnn.allow_tf32 = True"), True),
    (("cudnn.allow_tf32 = False", "fp32_precision = 'tf32'"), True),
]


def test_every_mix_of_the_switches() -> None:
    """In new processes: not every setting can be taken back. A warning would be an error."""
    code = (
        "import warnings; warnings.simplefilter('error'); import os, sys, torch\n"
        "from aspp_ext.ops.precision import switches\n"
        "for settings in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        for setting in filter(None, settings.split(';')):\n"
        "            exec('torch.backends.' + setting)\n"
        "        print(int(switches.convolution), end='', flush=True); os._exit(0)\n"
        "    os.wait()"
    )
    settings = [";".join(done) for done, _ in SETTINGS]
    done = run_python("-c", code, *settings)
    assert done.stderr == ""
    assert [c == "1" for c in done.stdout] == [allowed for _, allowed in SETTINGS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_only_float32_on_cuda(dtype) -> None:
    assert precision.switches.convolution
    assert not precision.allows_tf32(torch.empty(1))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert precision.allows_tf32(torch.empty(1, device="cuda"))
        assert not precision.allows_tf32(torch.empty(1, device="cuda", dtype=dtype))
        assert not precision.allows_tf32(torch.empty(1, device="meta"))


def argument(name: str, op: torch._ops.OpOverload, given: Sequence[Any]) -> Any:
    """What ``op`` gets under that name; the last arguments may be left out at their defaults."""
    at = [a.name for a in op._schema.arguments].index(name)
    return given[at] if at < len(given) else op._schema.arguments[at].default_value


class Settings(TorchDispatchMode):
    """One argument of each of our operators that runs and has it."""

    __module__ = "torch.testing"  # looks on, as PyTorch's modes do: under others the layers run

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        has = any(a.name == self.name for a in function._schema.arguments)
        if function.namespace == "aspp_ext" and has:
            value = argument(self.name, function, args)
            self.seen.append((function._schema.name.split("::")[1], value))
        return function(*args, **(kwargs or {}))


def dense(x, w, **end):
    return aspp_ext.atrous_pyramid(x, [w, w], [1, 2], **end)


def separable(x, w, **end):
    d, p = w[:, :1], w[:, :, :1, :1]
    return aspp_ext.atrous_separable_pyramid(x, [d, None], [p, p], [2, 1], **end)


def loss(f, x, w):
    return f(x, w).pow(3).sum()


def epilogue(f, x, w):
    return f(x, w, shift=w.new_ones(4), activation="relu").pow(2).sum()


def backward(f, x, w):
    return torch.autograd.grad(loss(f, x, w), [x, w])


def second(f, x, w):
    grads = torch.autograd.grad(loss(f, x, w), [x, w], create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), [x, w])


def autocast(f, x, w):
    with torch.autocast("cpu", torch.bfloat16):
        return loss(f, x.float(), w.float()).backward()


def composed(f, x, w):
    v = w.new_ones(2)
    branch = (w[:, :1], w[:, :, :1, :1]) if f is separable else (w.new_empty(0), w)
    head = (x, [branch[0]], [branch[1]], [1, 1], v, w.new_ones(3, 2), w.new_ones(3))
    with torch.no_grad():
        return head_composed.aspp_inference(*head, w.new_ones(2, 5), v)


CALLS = {
    "forward": lambda f, x, w: loss(f, x.detach(), w.detach()),
    "epilogue": lambda f, x, w: epilogue(f, x.detach(), w.detach()),
    "gradients": backward,
    "gradients of the epilogue": lambda f, x, w: torch.autograd.grad(epilogue(f, x, w), [x, w]),
    "second gradients": second,
    "jvp": lambda f, x, w: func.jvp(partial(loss, f), (x, w), (x, w)),
    "jvp of grad": lambda f, x, w: func.jvp(func.grad(partial(loss, f), (0, 1)), (x, w), (x, w)),
    "jacfwd of jacfwd": lambda f, x, w: func.jacfwd(func.jacfwd(partial(loss, f)))(
        x[:, :, :1, :1], w
    ),
    "vmap": lambda f, x, w: func.vmap(partial(loss, f), (None, 0))(
        x.detach(), w.detach().expand(3, *w.shape)
    ),
    "vmap of grad": lambda f, x, w: func.vmap(func.grad(partial(loss, f)), (0, None))(x[None], w),
    "autocast": autocast,
    "composed head": composed,
}


KINDS = [(dense, PYRAMIDS), (separable, SEPARABLE)]
each_kind = pytest.mark.parametrize(("f", "operators"), KINDS, ids=["dense", "separable"])
# The separable operators have no forward mode over reverse mode.
RUN = [
    (*kind, call)
    for kind in KINDS
    for call in CALLS
    if (kind[0], call) != (separable, "jvp of grad")
]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(
    ("f", "operators", "call"), RUN, ids=[f"{r[0].__name__}-{r[2]}" for r in RUN]
)
def test_the_decision_reaches_every_operator(f, operators, call, allowed, monkeypatch) -> None:
    for module in (pyramid, separable_ops, head_composed):
        monkeypatch.setattr(module, "allows_tf32", lambda x: allowed)
    x, w = (torch.randn(s, dtype=torch.float64) for s in ((1, 2, 3, 4), (2, 2, 3, 3)))
    with Settings("tf32") as precisions:
        CALLS[call](f, x.requires_grad_(), w.requires_grad_())
    assert precisions.seen
    assert {tf32 for _, tf32 in precisions.seen} == {allowed}, precisions.seen
    if call == "second gradients":
        assert {name for name, _ in precisions.seen} == set(operators)


@pytest.mark.parametrize("name", [*PYRAMIDS, *SEPARABLE])
def test_direct_operators_are_exact_unless_told(name) -> None:
    (argument,) = [
        a for a in getattr(torch.ops.aspp_ext, name).default._schema.arguments if a.name == "tf32"
    ]
    assert argument.default_value is False


@pytest.fixture
def switch(monkeypatch) -> Iterator[Callable[[bool], None]]:
    """Turns TF32 on and off, for CPU tensors too."""
    for module in (pyramid, separable_ops):
        monkeypatch.setattr(module, "allows_tf32", lambda x: precision.switches.convolution)

    def turn(on: bool) -> None:
        torch.backends.cudnn.allow_tf32 = on

    yield turn
    turn(True)


def decision(graph: torch.fx.GraphModule) -> bool:
    """Whether the one operator of ours in a graph may use TF32."""
    (node,) = (n for n in graph.graph.nodes if "aspp_ext" in str(n.target))
    return argument("tf32", node.target.default, node.args)


@each_kind
def test_a_compiled_graph_follows_the_switch(f, operators, fresh_compiler, switch) -> None:
    """By a guard: a graph traced under the other setting is not used."""
    ran: list[bool] = []
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return lambda *arguments: (ran.append(decision(graph)), graph(*arguments))[1]

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for on in (True, False, True, False):
        switch(on)
        compiled(torch.randn(1, 3, 5, 6), torch.randn(3, 3, 3, 3))
    assert ran == [True, False, True, False]
    assert len(compiled_graphs) == 2


@each_kind
def test_a_compiled_gradient_keeps_the_setting_of_its_forward(
    f, operators, fresh_compiler, switch
) -> None:
    compiled = torch.compile(partial(loss, f), fullgraph=True, backend="aot_eager")
    for on in (True, False):
        x, w = torch.randn(1, 3, 5, 6).requires_grad_(), torch.randn(3, 3, 3, 3).requires_grad_()
        switch(on)
        y = compiled(x, w)
        switch(not on)
        with Settings("tf32") as precisions:
            y.backward()
        assert set(precisions.seen) == {(name, on) for name in operators[1:]}
