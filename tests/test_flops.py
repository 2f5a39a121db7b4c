# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's counter of FLOPs sees in a fused model what it saw before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aspp_pairs import PAIRS, features
from marks import on_all, on_cpu, on_native, proven_interpreted
from processes import said_by_python
from table import INTERPRETED
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import aspp_ext
from aspp_ext import reference
from aspp_ext.testing import OPS

pytestmark = [on_all, proven_interpreted]
DTYPE = torch.float32 if INTERPRETED else torch.float64


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as mode:
        call()
    return mode.get_total_flops()


def values(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, dtype=DTYPE) for s in shapes]


def pyramid(module, x, v, w, u):
    return module.atrous_pyramid(x, [v, w, u], [1, (2, 9), 3], activation="relu")


def separable(module, x, d, p, q):
    return module.atrous_separable_pyramid(x, [d, None], [p, q], [2, 1])


def head(module, x, w, d, p, s, q, t, project):
    return module.aspp_inference(x, [None, d], [w, p], [2, 3], s, q, t, project, t)


def branches(module, x, w, d, p, s):
    return module.aspp_inference(x, [None, d], [w, p], [2, 3], s, None, None, None, None)


X = (2, 3, 5, 7)
KINDS = {
    "pyramid": (pyramid, [X, (4, 3, 1, 1), (2, 3, 3, 3), (2, 3, 1, 5)]),
    "separable": (separable, [X, (3, 1, 3, 3), (4, 3, 1, 1), (2, 3, 1, 1)]),
}
HEAD = [X, (4, 3, 3, 3), (3, 1, 3, 3), (2, 3, 1, 1), (6,), (5, 3), (5,), (5, 11)]
each_kind = pytest.mark.parametrize(("call", "shapes"), KINDS.values(), ids=KINDS)


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        *KINDS.values(),
        *(pytest.param(*h, marks=on_cpu) for h in ((head, HEAD), (branches, HEAD[:5]))),
    ],
)
def test_operators(call, shapes) -> None:
    tensors = values(*shapes)
    ours, theirs = (counted(lambda m=m: call(m, *tensors)) for m in (aspp_ext, reference))
    assert ours == theirs > 0


@each_kind
@pytest.mark.parametrize("of", ["all", "image", "weights"])
def test_gradients(call, shapes, of) -> None:
    tensors = values(*shapes)
    for i, t in enumerate(tensors):
        t.requires_grad_(of == "all" or (i == 0) is (of == "image"))
    ours, theirs = (
        counted(lambda m=m: call(m, *tensors).sum().backward()) for m in (aspp_ext, reference)
    )
    assert ours == theirs


@on_native
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", PAIRS)
def test_modules(name, last) -> None:
    """Whose own layers run here: the counter has hooks on every module."""
    original, ours = PAIRS[name].build()
    x = features().to(memory_format=torch.channels_last if last else torch.contiguous_format)
    for module in (original, ours):
        module.eval()
    with torch.no_grad():
        assert counted(lambda: ours(x)) == counted(lambda: original(x)) > 0
    for module in (original, ours):
        module.train()
    got, expected = (counted(lambda m=m: m(x).sum().backward()) for m in (ours, original))
    assert got == expected


@on_native
def test_every_operator_that_is_tested_has_a_formula() -> None:
    from torch.utils.flop_counter import flop_registry

    for op in OPS.values():
        assert getattr(torch.ops.aspp_ext, op.name) in flop_registry


@on_native
@pytest.mark.parametrize("order", ["counter first", "package first", "package twice"])
def test_whichever_is_imported_first(order) -> None:
    counter, package = "from torch.utils.flop_counter import FlopCounterMode\n", "import aspp_ext\n"
    again = "import sys\nfor n in [n for n in sys.modules if 'aspp_ext' in n]: del sys.modules[n]\n"
    first = {"counter first": counter, "package twice": package + again + package + again}
    code = "import torch\n" + first.get(order, "") + package + counter
    code += (
        "with FlopCounterMode(display=False) as mode:\n"
        "    aspp_ext.atrous_pyramid(torch.ones(1, 2, 3, 4), [torch.ones(5, 2, 3, 3)], [1])\n"
        "print(mode.get_total_flops())"
    )
    assert said_by_python(code) == str(2 * 12 * 5 * 2 * 9)
