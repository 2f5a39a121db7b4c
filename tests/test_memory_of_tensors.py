# SPDX-License-Identifier: BSD-3-Clause
"""Tensors whose storage was freed or cut, as offloading and sharding leave them, or lies elsewhere:
each is refused before it is read, wherever it is an argument."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from marks import on_cpu, on_emulated, on_native
from torch import Tensor

import aspp_ext
from aspp_ext.ops import polyphase_weights
from aspp_ext.ops.family import NATIVE
from aspp_ext.testing import OPS, PROBLEMS

pytestmark = on_native
NOT_ALLOCATED = "The tensor has a non-zero number of elements, but its data is not allocated yet"
OUT_OF_BOUNDS = r"sizes \[.*\], strides \[.*\], storage offset \d+, and itemsize \d requiring a "
OUT_OF_BOUNDS += r"storage size of \d+ are out of bounds for storage of size \d+"


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut(t: Tensor) -> Tensor:
    """By a byte."""
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def shifted(t: Tensor) -> Tensor:
    """Whole but for its offset, whose elements at the end are gone."""
    whole = torch.cat([t.new_zeros(3), t.flatten()])
    view = whole[3:].view(t.shape)
    whole.untyped_storage().resize_(whole.untyped_storage().nbytes() - t.element_size())
    return view


each_fault = pytest.mark.parametrize(
    ("spoil", "words"),
    [(freed, NOT_ALLOCATED), (cut, OUT_OF_BOUNDS), (shifted, OUT_OF_BOUNDS)],
    ids=["freed", "cut", "shifted"],
)


def paths_of(arguments: Any, at: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where there are tensors with elements."""
    if isinstance(arguments, Tensor):
        if arguments.numel():
            yield at
    elif isinstance(arguments, (list, tuple)):
        for i, part in enumerate(arguments):
            yield from paths_of(part, (*at, i))


def changed(arguments: Any, path: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> Any:
    if not path:
        return change(arguments)
    first, *rest = path
    parts = [
        changed(part, tuple(rest), change) if i == first else part
        for i, part in enumerate(arguments)
    ]
    return type(arguments)(parts)


def check_each(
    call: Callable[..., Any], arguments: Any, spoil: Callable[[Tensor], Tensor], words: str
) -> None:
    found = list(paths_of(arguments))
    assert found
    for path in found:
        with pytest.raises(RuntimeError, match=words):
            call(*changed(arguments, path, spoil))


@each_fault
@pytest.mark.parametrize("layout", ["one_branch", "x_channels_last"])
@pytest.mark.parametrize("name", OPS)
def test_every_argument_of_every_operator(name, layout, spoil, words) -> None:
    op = OPS[name]
    arguments = op.make(PROBLEMS[layout], torch.float32)
    op.native(*arguments)
    check_each(op.native, arguments, spoil, words)


@on_emulated
@each_fault
def test_every_argument_of_the_steps_of_a_batch_norm(spoil, words) -> None:
    x, depthwise, pointwise, rates = OPS["separable"].make(PROBLEMS["one_branch"], torch.float32)[
        :4
    ]
    one = x.new_ones(x.size(1))
    op = {end: NATIVE.op(f"atrous_separable_norm{end}") for end in ("", "_sums", "_backward")}
    statistics = NATIVE.op("atrous_depthwise_statistics")
    check_each(statistics, (x, depthwise, rates), spoil, words)
    stored = statistics(x, depthwise, rates, True)[2]
    given = (x, depthwise, pointwise, rates, one, one, True)
    y = op[""](*given, stored)
    check_each(op[""], (*given, stored), spoil, words)
    check_each(op["_sums"], (y, *given), spoil, words)
    check_each(op["_backward"], (y, *given, one, one, True, True, True), spoil, words)
    check_each(NATIVE.op("atrous_pyramid_statistics"), (x, pointwise, rates), spoil, words)


@on_cpu
@each_fault
def test_what_weights_are_made_of(spoil, words) -> None:
    weights = [torch.randn(4, 3, 3, 3), torch.randn(2, 3, 3, 3)]
    check_each(polyphase_weights, (weights, [2, 3], 9, 9), spoil, words)
    check_each(torch.ops.aspp_ext.checksums, (weights,), spoil, words)


@on_cpu
@pytest.mark.parametrize("spoil", [freed, cut, shifted])
@pytest.mark.parametrize("separable", [False, True])
def test_the_weights_of_a_module(separable, spoil) -> None:
    """PyTorch's own operators read the pooled branch's in training, and what they refuse first."""
    x = torch.randn(2, 6, 9, 9)
    model = aspp_ext.ASPP(6, [2, 3], 16, separable=separable)
    names = [name for name, p in model.named_parameters() if p.dim() == 4]
    for training in (False, True):
        for name in names if not training else [n for n in names if n != "convs.3.1.weight"]:
            ours = copy.deepcopy(model).train(training)
            with torch.no_grad():
                ours(x)
                weight = dict(ours.named_parameters())[name]
                weight.data = spoil(weight.data)
                with pytest.raises(RuntimeError, match=f"{NOT_ALLOCATED}|{OUT_OF_BOUNDS}"):
                    ours(x)


@on_cpu
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("separable", [False, True], ids=["dense", "separable"])
@pytest.mark.parametrize("spoil", [freed, cut, shifted])
def test_the_norms_of_a_module(spoil, separable, training, grad) -> None:
    """As FSDP and offloading leave them. PyTorch's own norm reads what was cut."""
    x = torch.randn(2, 6, 9, 9)
    model = aspp_ext.ASPP(6, [2, 3], 16, separable=separable).train(training)
    pooled = () if spoil is freed else ("convs.3.2.",)
    names = [n for n, t in model.state_dict().items() if t.dim() == 1]
    names = [n for n in names if not n.startswith(pooled)]
    for name in names:
        ours = copy.deepcopy(model)
        tensor = ours.state_dict(keep_vars=True)[name]
        tensor.data = spoil(tensor.data)
        words = f"{NOT_ALLOCATED}|{OUT_OF_BOUNDS}"
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=words):
            ours(x)


# --- What is prepared


def head(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[[list[Tensor]], Tensor], list[Tensor]]:
    """A head by what is prepared for it, and that: of a branch computed directly and two others."""
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    x, weights = torch.randn(1, 6, 9, 9), [torch.randn(16, 6, k, k) for k in (1, 3, 3)]
    pairs, none = [(1, 1), (2, 2), (3, 3)], [None] * 3
    channels = sum(w.size(0) for w in weights)
    project, zero = torch.randn(5, channels), torch.zeros(channels)

    def call(prepared: list[Tensor]) -> Tensor:
        fixed = (zero, None, None, project, torch.zeros(5))
        return aspp_ext.aspp_inference(x, none, weights, pairs, *fixed, prepared=prepared)

    return call, polyphase_weights(weights, pairs, *x.shape[2:])


@on_cpu
@each_fault
def test_what_is_prepared(spoil, words, monkeypatch) -> None:
    call, prepared = head(monkeypatch)
    call(prepared)
    check_each(call, (prepared,), spoil, words)


@on_cpu
def test_what_is_prepared_lies_elsewhere_or_is_of_no_use(monkeypatch) -> None:
    call, prepared = head(monkeypatch)
    assert [p.numel() > 0 for p in prepared] == [False, True, True]
    for b in range(3):
        given = list(prepared)
        given[b] = given[b].to("meta")
        with pytest.raises((RuntimeError, ValueError), match=rf"prepared\[{b}\] must be on x's"):
            call(given)
    for b in range(3):
        given = list(prepared)
        given[b] = torch.zeros(2, 3)
        with pytest.raises(RuntimeError, match=rf"prepared\[{b}\] must be what polyphase_weights"):
            call(given)


@pytest.mark.parametrize("shape", [(0, 1, 3, 3), (8, 0, 3, 3), (8, 1, 0, 3), (0, 0)])
def test_only_one_empty_shape_stands_for_none(shape) -> None:
    """As a depthwise weight, and as what is between."""
    for name in ("separable_between_epilogue", "separable_backward_between"):
        op = OPS[name]
        arguments = op.make(PROBLEMS["one_branch"], torch.float32)
        lists = [
            i
            for i, a in enumerate(arguments)
            if isinstance(a, list) and any(True for _ in paths_of(a))
        ]
        first = lists[0]  # depthwise, behind x and grad
        for at in (first, first + 3):
            given = changed(arguments, (at, 0), lambda t: t.new_empty(shape))
            with pytest.raises((RuntimeError, ValueError), match=r"must|needs"):
                op.native(*given)
