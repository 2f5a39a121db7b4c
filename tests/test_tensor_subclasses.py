# SPDX-License-Identifier: BSD-3-Clause
"""Images with something tied to them, in a subclass of Tensor whose methods take a size as one
tuple, as MONAI's MetaTensor does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aspp_pairs import PAIRS, TIGHT, features, train_step
from marks import on_native, proven_emulated
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.tensor import DTensor
from torch.masked import MaskedTensor
from torch.utils._pytree import tree_map

import aspp_ext
from aspp_ext.modules.meaning import gives_meaning
from aspp_ext.ops import atrous_separable_pyramid_batch_norm

pytestmark = [on_native, proven_emulated]

SIZED = ("new_empty", "new_zeros", "new_ones", "new_full", "expand", "view", "reshape", "permute")
SIZED += ("repeat", "broadcast_to", "new_empty_strided")


class Image(Tensor):
    """Its sizes are tuples."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in SIZED and isinstance(args[0], Image):
            size = args[1] if len(args) > 1 else (kwargs or {}).get("size")
            assert isinstance(size, (tuple, list, torch.Size)), f"{func.__name__} of {args[1:]}"
        return super().__torch_function__(func, types, args, kwargs or {})

    def new_empty(self, size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        plain = self.as_subclass(Tensor).new_empty(size=size, dtype=dtype, device=device)
        return plain.as_subclass(type(self))


def image(*shape: int) -> Tensor:
    return torch.randn(shape).as_subclass(Image)


D, P, W, V = ((3, 1, 3, 3), (2, 3, 1, 1), (2, 3, 3, 3), (2,))
CALLS = {
    "pyramid": (
        lambda x, p, w, v: aspp_ext.atrous_pyramid(
            x, [p, w], [1, 2], bias=torch.cat([v, v]), activation="relu"
        ),
        (P, W, V),
    ),
    "separable": (
        lambda x, d, p, q: aspp_ext.atrous_separable_pyramid(x, [d, None], [p, q], [2, 1]),
        (D, P, P),
    ),
    "between": (
        lambda x, d, p, q: aspp_ext.atrous_separable_pyramid(
            x, [d, None], [p, q], [2, 1], between=[(d[:, 0, 0, 0], d[:, 0, 0, 1]), None]
        ),
        (D, P, P),
    ),
    "batch_norm": (
        lambda x, d, p, q: atrous_separable_pyramid_batch_norm(
            x, [d, None], [p, q], [2, 1], [(None, d[:, 0, 0, 1]), None]
        )[0],
        (D, P, P),
    ),
}
each_call = pytest.mark.parametrize(("call", "shapes"), CALLS.values(), ids=CALLS)


@pytest.mark.parametrize("weights_too", [False, True], ids=["image", "weights"])
@each_call
def test_operators(call, shapes, weights_too) -> None:
    x, weights = torch.randn(2, 3, 4, 5), [torch.randn(s) for s in shapes]
    expected = [t.clone().requires_grad_() for t in (x, *weights)]
    kind = Image if weights_too else Tensor
    given = [x.clone().as_subclass(Image), *(w.clone().as_subclass(kind) for w in weights)]
    for t in given:
        t.requires_grad_()
    results = []
    for tensors in (given, expected):
        y = call(*tensors)
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), tensors)])
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got.as_subclass(Tensor), wanted)


def test_heads() -> None:
    x, w, v = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 3, 3), torch.randn(2)
    rest = ([None], [w], [2], v, torch.randn(2, 3), v, torch.randn(2, 4), v)
    with torch.no_grad():
        got, expected = (aspp_ext.aspp_inference(i, *rest) for i in (x.as_subclass(Image), x))
    assert torch.equal(got.as_subclass(Tensor), expected)
    assert aspp_ext.explain(x.as_subclass(Image), [w], [2], depthwise_weights=None)
    p = torch.randn(2, 3, 1, 1)
    assert aspp_ext.explain(x.as_subclass(Image), [p], [2], depthwise_weights=[None])


@pytest.fixture
def known(monkeypatch) -> None:
    """As a class of a package whose subclasses only carry something along."""
    monkeypatch.setattr(Image, "__module__", "monai.data.meta_tensor")


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("name", PAIRS)
def test_modules(name, last, training) -> None:
    module = PAIRS[name].build()[1].train(training)
    x = features().to(memory_format=torch.channels_last if last else torch.contiguous_format)
    found = []
    for given in (x.as_subclass(Image), x):
        module.zero_grad()
        state = {k: v.clone() for k, v in module.state_dict().items()}
        found.append(train_step(module, given))
        with torch.no_grad():
            found[-1]["inference"] = module.eval()(given)
        module.load_state_dict(state)
        module.train(training)
    for key, value in found[1].items():
        assert torch.equal(found[0][key].as_subclass(Tensor), value), key


def doubled(function: Any, result: Any) -> Any:
    return 2 * result if function in (F.conv2d, torch.ops.aten.convolution.default) else result


class Function(Tensor):
    """Gives ``conv2d`` another meaning, as images on a sphere do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return doubled(func, super().__torch_function__(func, types, args, kwargs or {}))


class Weight(nn.Parameter):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = torch._C._disabled_torch_function_impl
        return doubled(func, run(func, types, args, kwargs or {}))


class Operator(Tensor):
    """Gives an operator another meaning, as quantized weights do."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Operator:
        made = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].held)
        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return doubled(func, func(*args, **kwargs))


def plain(value: Any) -> Any:
    return value.held if isinstance(value, Operator) else value


def test_which_of_pytorch_s_own_are_fused() -> None:
    """Those that record; others know PyTorch's operators alone."""
    fused = (Tensor, nn.Parameter, nn.Buffer, FakeTensor, FunctionalTensor)
    assert not any(gives_meaning(kind) for kind in fused)
    assert all(gives_meaning(kind) for kind in (DTensor, MaskedTensor))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", [Function, Operator])
@pytest.mark.parametrize("name", PAIRS)
def test_an_image_that_gives_functions_a_meaning(name, kind, training) -> None:
    original, ours = (m.train(training) for m in PAIRS[name].build())
    for module in (original, ours):
        module.project[3].p = 0.0
    x = features()
    before = ours(x)
    wrapped = kind(x) if kind is Operator else x.as_subclass(kind)
    with torch.set_grad_enabled(training):
        expected, got = (m(wrapped).detach().as_subclass(Tensor) for m in (original, ours))
    torch.testing.assert_close(got, expected, **TIGHT)
    assert not torch.allclose(got, before)


@pytest.mark.parametrize("kind", [Weight, lambda w: nn.Parameter(Operator(w.data))])
@pytest.mark.parametrize("part", ["convs.0.0", "project.0"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_weight_that_gives_functions_a_meaning(name, part, kind) -> None:
    original, ours = (m.eval().requires_grad_(False) for m in PAIRS[name].build())
    before = ours(features())
    for module in (original, ours):
        layer = module.get_submodule(part)
        layer.weight = kind(layer.weight.data).requires_grad_(False)
    got = ours(features())
    torch.testing.assert_close(got, original(features()), **TIGHT)
    assert not torch.allclose(got, before)
    (entry,) = aspp_ext.fuse_report(ours)
    assert "gives functions another meaning" in str(entry.reason)
