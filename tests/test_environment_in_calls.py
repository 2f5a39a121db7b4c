# SPDX-License-Identifier: BSD-3-Clause
"""The environment is Python's: no kernel reads it in a call, whoever writes it meanwhile, and what
minimal filtering is allowed travels with the call. A fork finds no lock held."""

from __future__ import annotations

import contextlib
import itertools
import re
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from marks import on_all, on_cpu, on_emulated, on_native
from processes import ROOT, run_python, said_by_python
from table import FAMILY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import aspp_ext
from aspp_ext.ops import polyphase_choice, polyphase_weights
from aspp_ext.testing import OPS, PROBLEMS

POLICY = "ASPP_EXT_POLYPHASE"
HANGS = 300  # seconds after which a child hangs, on a slow machine, too

CALLS = """
import os, sys, threading, time, torch
from aspp_ext.testing import OPS, PROBLEMS
torch.set_num_threads(1)
work = [(OPS[n].native, OPS[n].make(PROBLEMS["one_branch"], torch.float32)) for n in OPS]
def infer(done):
    with torch.inference_mode():
        while not done.is_set():
            for call, arguments in work:
                call(*arguments)
def over(body, threads):
    done = threading.Event()
    started = [threading.Thread(target=infer, args=(done,)) for _ in range(threads)]
    for thread in started: thread.start()
    body()
    done.set()
    for thread in started: thread.join()
"""


@on_native
def test_other_threads_may_write_the_environment() -> None:
    """setenv moves the list of variables while it grows; to read it then crashes."""
    code = f"""{CALLS}
def body():
    for i in range(20000):
        os.environ[f"ASPP_EXT_TEST_{{i}}"] = "x" * (i % 50)
over(body, 4)
print("through")
"""
    assert said_by_python(code) == "through"


@on_native
def test_no_call_reads_the_environment() -> None:
    """Where C++ asks for a variable it does so when the library is loaded."""
    asked = {
        path.relative_to(ROOT).as_posix()
        for path in Path(ROOT, "csrc").rglob("*.[ch]*")
        if re.search(r"\bgetenv\b", path.read_text()) and "emulation" not in path.parts
    }
    assert asked == {"csrc/cpu/isa.cpp", "csrc/cuda/fused.cpp"}
    code = f"""
import os
{CALLS}
os.environ.update(ASPP_EXT_ISA="no such", ASPP_EXT_SEPARABLE="no such", {POLICY}="no such")
for call, arguments in work:
    call.func(*arguments) if hasattr(call, "func") else call(*arguments)
print(torch.ops.aspp_ext.cpu_isa() == sys.argv[1])
"""
    done = run_python("-c", code, torch.ops.aspp_ext.cpu_isa())
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_while_shapes_are_planned() -> None:
    """Each size is new, so that threads plan nearly all of the time."""
    code = f"""
import itertools, os, sys, threading, time, warnings, torch
from aspp_ext.ops import polyphase_weights
warnings.simplefilter("ignore")
torch.set_num_threads(1)
weight = torch.ones(1, 1, 3, 3)
done = threading.Event()
def plan(first):
    for size in itertools.count(first, 4):
        if done.is_set(): return
        polyphase_weights([weight], [1 + size % 7], 40 + size % 900, 41 + size % 700)
threads = [threading.Thread(target=plan, args=(i,)) for i in range(3)]
for thread in threads: thread.start()
hung = 0
for i in range(40):
    child = os.fork()
    if child == 0:
        polyphase_weights([weight], [2], 30 + i, 31)
        os._exit(0)
    deadline = time.monotonic() + {HANGS}
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9); os.waitpid(child, 0)
            hung += 1
            break
        time.sleep(0.002)
    if hung: break
done.set()
for thread in threads: thread.join()
print(hung)
"""
    assert said_by_python(code) == "0"


# --- What minimal filtering is allowed


def filters(policy: str, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    monkeypatch.setenv(POLICY, policy)
    return polyphase_weights([torch.ones(4, 3, 3, 3)], [2], 9, 9)


def test_the_policy_is_that_of_the_call(monkeypatch) -> None:
    """Few channels: the least that pays for no combination."""
    sizes = [filters(policy, monkeypatch)[0].numel() > 0 for policy in ("", "always", "1", "0")]
    assert sizes == [False, True, False, False]
    monkeypatch.setenv(POLICY, "always")
    assert not polyphase_weights([torch.ones(4, 3, 3, 3)], [2], 9, 9, polyphase=False)[0].numel()


def test_what_is_prepared_under_another_policy_is_refused(monkeypatch) -> None:
    x, _, weights, rates, *rest = OPS["head"].make(PROBLEMS["aspp"], torch.float32)
    none, pairs = [None] * len(weights), list(zip(rates[::2], rates[1::2], strict=True))
    head = partial(aspp_ext.aspp_inference, x, none, weights, pairs, *rest)
    monkeypatch.setenv(POLICY, "always")
    forms = polyphase_weights(weights, pairs, *x.shape[2:])
    expected = head(prepared=forms)
    for never in ({"polyphase": False}, {}):
        if not never:
            monkeypatch.setenv(POLICY, "0")
        with pytest.raises(RuntimeError, match=r"prepared\[1\] must be what polyphase_weights"):
            head(prepared=forms, **never)
        direct = polyphase_weights(weights, pairs, *x.shape[2:], **never)
        assert not any(p.numel() for p in direct)
        head(prepared=direct, **never)
    monkeypatch.setenv(POLICY, "always")
    with pytest.raises(RuntimeError, match="the same polyphase, of shape"):
        head(prepared=direct)
    assert torch.equal(head(prepared=forms), expected)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_module_follows_the_policy_from_call_to_call(layout, separable, monkeypatch) -> None:
    """What it keeps was prepared under another one."""
    ours = aspp_ext.ASPP(6, [2, 3], 16, separable=separable).eval()
    x = torch.randn(1, 6, 9, 9).to(memory_format=layout)
    seen = {}
    with torch.no_grad():
        for policy in ("always", "0", "1", "always", "0"):
            monkeypatch.setenv(POLICY, policy)
            y = ours(x)
            torch.testing.assert_close(y, seen.setdefault(policy, y), rtol=0, atol=0)
    assert torch.equal(seen["always"], seen["0"]) is separable


def gradients(x: torch.Tensor, weights: list[torch.Tensor], between) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    y = aspp_ext.atrous_pyramid(leaves[0], leaves[1:], [1, 2])
    between()
    return torch.autograd.grad(y.pow(2).sum(), leaves)


def test_gradients_keep_the_policy_of_their_call(monkeypatch) -> None:
    x, weights = torch.randn(1, 3, 9, 9), [torch.randn(4, 3, 3, 3) for _ in range(2)]
    monkeypatch.setenv(POLICY, "always")
    expected = gradients(x, weights, lambda: None)
    changed = gradients(x, weights, lambda: monkeypatch.setenv(POLICY, "0"))
    assert all(map(torch.equal, changed, expected))
    assert not all(map(torch.equal, gradients(x, weights, lambda: None), expected))


def test_a_trace_keeps_its_policy_and_a_compiled_call_asks_anew(
    monkeypatch, fresh_compiler
) -> None:
    x, w = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return aspp_ext.atrous_pyramid(x, [w], [2])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    monkeypatch.setenv(POLICY, "always")
    expected = call(x, w)
    traced = [torch.jit.trace(call, (x, w)), make_fx(call)(x, w)]
    assert torch.equal(compiled(x, w), expected)
    monkeypatch.setenv(POLICY, "0")
    directly = call(x, w)
    assert not torch.equal(directly, expected)
    assert torch.equal(compiled(x, w), directly)
    assert all(torch.equal(trace(x, w), expected) for trace in traced)


@on_all
@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", [n for n in OPS if n.startswith("pyramid")])
def test_a_policy_that_there_is_not_is_refused(name, fake) -> None:
    op = OPS[name]
    words = (
        r"polyphase must be 0 \(never\), 1 \(where it costs less\) or 2 \(wherever it can\), got 3"
    )
    with FakeTensorMode() if fake else contextlib.nullcontext():
        arguments = op.make(PROBLEMS["one_branch"], torch.float32)
        with pytest.raises((RuntimeError, ValueError), match=words):
            op.operator(FAMILY)(*arguments, polyphase=3)


WORDS = "ASPP_EXT_POLYPHASE must be 0, 1 or always, got 'yes'"


def test_another_value_is_refused_wherever_it_is_asked_for(monkeypatch) -> None:
    x, w = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
    model = aspp_ext.ASPP(3, [2], 4)
    monkeypatch.setenv(POLICY, "yes")
    for call in (
        lambda: aspp_ext.atrous_pyramid(x, [w], [2]),
        lambda: aspp_ext.atrous_pyramid(x, [w], [2], polyphase=False),
        lambda: polyphase_weights([w], [2], 9, 9),
        lambda: model.eval()(x),
        lambda: model.train()(torch.cat([x, x])),
        lambda: aspp_ext.explain(x, [w], [2]),
        polyphase_choice.policy,
    ):
        with pytest.raises(ValueError, match=WORDS):
            call()


@on_emulated
def test_a_separable_way_that_there_is_not_is_refused() -> None:
    """Where it is read, and where it is asked for."""
    code = """
import torch
from aspp_ext.testing import OPS, PROBLEMS
op = OPS["separable"]
call, arguments = op.native, op.make(PROBLEMS["one_branch"], torch.float32)
for wrong in (lambda: call(*arguments), lambda: torch.ops.aspp_ext.separable_way("yes")):
    try: wrong()
    except RuntimeError as error: print(str(error).splitlines()[0])
was = torch.ops.aspp_ext.separable_way("stored")
call(*arguments)
print(was, torch.ops.aspp_ext.separable_way(""))
"""
    said = said_by_python(code, ASPP_EXT_SEPARABLE="yes").splitlines()
    words = "ASPP_EXT_SEPARABLE must be fused or stored, got 'yes'"
    expected = [f"atrous_separable_pyramid: {words}", f"separable_way: {words}", "yes stored"]
    assert said == expected


class Written(dict):
    """An environment in which another thread writes after each look."""

    def __init__(self) -> None:
        self.values = itertools.cycle(("always", "0", "1", "0"))

    def get(self, name: str, otherwise: str = "") -> str:
        return next(self.values)


@on_cpu
def test_a_call_of_a_module_has_one_policy(monkeypatch) -> None:
    model, x = aspp_ext.ASPP(3, [2, 3], 4).eval(), torch.randn(1, 3, 17, 17)
    with torch.inference_mode():
        expected = model(x)
        monkeypatch.setattr(polyphase_choice, "os", types.SimpleNamespace(environ=Written()))
        for _ in range(8):
            torch.testing.assert_close(model(x), expected)
