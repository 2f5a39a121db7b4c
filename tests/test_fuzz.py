# SPDX-License-Identifier: BSD-3-Clause
"""Random direct calls: never a crash, and the fakes answer as the kernels do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bad_inputs import VALID, T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import on_native, proven_emulated, sanitized, varied
from torch.utils._pytree import tree_map

pytestmark = [proven_emulated, on_native, varied, sanitized]

# What only the device refuses.
DEVICES_OWN = ("memory", "on the CPU", "on CUDA", "what polyphase_weights returns")
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)
INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 4, 5, 7, 2**31 - 1, 2**31, 2**62, 2**63 - 1]
SIZES = [0, 1, 1, 2, 3, 4, 5, 6, 7]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
LAYOUTS = ["expand", "transpose", "stride", "sparse", "meta"]


def make(value: Any) -> Any:
    """A tensor of the table, in a layout that may have been drawn for it."""
    if not isinstance(value, T):
        return value
    layout = value.device
    x = torch.ones(value.shape, dtype=value.dtype)
    if layout == "expand":
        x = torch.ones([1] * len(value.shape), dtype=value.dtype).expand(value.shape)
    elif layout == "transpose" and x.dim() > 1:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "stride" and x.dim() > 0:
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "sparse":
        x = x.to_sparse()
    elif layout == "meta":
        x = x.to("meta")
    return x


@st.composite
def tensors(draw: st.DrawFn, like: T) -> T:
    """``like`` with another size, rank, dtype or layout."""
    shape, dtype, layout = list(like.shape), like.dtype, like.device
    kind = draw(st.sampled_from(["size", "size", "rank", "dtype", "layout"]))
    if kind == "size" and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from(SIZES))
    elif kind == "rank":
        shape = draw(st.lists(st.sampled_from(SIZES), max_size=6))
    elif kind == "dtype":
        dtype = draw(st.sampled_from(DTYPES))
    else:
        layout = draw(st.sampled_from(LAYOUTS))
    return T(tuple(shape), dtype, layout)


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw(st.sampled_from(INTEGERS))
    if value is None:
        return draw(st.sampled_from([None, T((7,)), T((2, 7))]))
    if isinstance(value, T):
        return draw(tensors(value))
    value = list(value)
    kind = draw(st.sampled_from(["entry", "entry", "entry", "drop", "repeat"]))
    if not value:
        return [T((6,)), T((0,))] if kind == "repeat" else value
    at = draw(st.integers(0, len(value) - 1))
    if kind == "entry":
        value[at] = draw(changed(value[at]))
    elif kind == "drop":
        del value[at]
    else:
        value.insert(at, value[at])
    return value


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A valid call with none to three changes, or one whose branches are all repeated."""
    op = draw(st.sampled_from(sorted(VALID)))
    arguments = copy.deepcopy(VALID[op])
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(list(arguments)))
        arguments[name] = draw(changed(arguments[name]))
    return op, arguments


def attempt(op: str, arguments: list[Any]) -> tuple[str, Any]:
    try:
        result = getattr(torch.ops.aspp_ext, op)(*arguments)
    except REFUSALS as error:
        return "refused", str(error).partition("\n")[0]
    return "computed", tree_map(lambda t: (tuple(t.shape), t.dtype, t.stride()), result)


def outcome_of(op: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """(what the kernel did, what the fake did), where both can be asked."""
    real = [tree_map(make, value) for value in arguments.values()]
    outcome = attempt(op, real)
    leaves = [
        v for value in arguments.values() for v in (value if isinstance(value, list) else [value])
    ]
    if any(isinstance(v, T) and v.device in ("sparse", "meta") for v in leaves):
        return outcome, None
    fake = [tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, v) for v in real]
    return outcome, attempt(op, fake)


def test_random_calls() -> None:
    """Three thousand, always the same ones; a crash would end the process."""

    @settings(
        max_examples=3000,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def check(call: tuple[str, dict[str, Any]]) -> None:
        real, fake = outcome_of(*call)
        # The fake allocates nothing, and knows neither which kernel sizes a device has kernels for
        # nor which branches it filters minimally.
        if fake is not None and not any(w in str(real[1]) for w in DEVICES_OWN):
            assert real == fake

    check()


def test_the_fuzzer_computes_often_enough() -> None:
    """Otherwise it would test refusals alone."""
    count = {"computed": 0, "refused": 0}

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(calls())
    def check(call: tuple[str, dict[str, Any]]) -> None:
        count[outcome_of(*call)[0][0]] += 1

    check()
    assert min(count.values()) > 40, count
