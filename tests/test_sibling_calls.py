# SPDX-License-Identifier: BSD-3-Clause
"""Siblings call by call: who computes for whom, and that nobody gets what is not its own."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from aspp_pairs import TIGHT, assert_all_close, train_step
from sibling_modules import CHANNELS, SHAPE, both, check_alike, maps, pair, together, waiting
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["together"]


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_results_lie_in_memory_as_they_would(last: bool, grad: bool, together: list[int]) -> None:
    for dtype in (torch.float32, torch.float64):
        plain, fused = (module.to(dtype) for module in both())
        x = maps().to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        with torch.set_grad_enabled(grad):
            check_alike(plain, fused, x, rtol=1e-4, atol=1e-5)
            for module in (plain, fused):
                module.c.to(memory_format=torch.channels_last)
            check_alike(plain, fused, x, rtol=1e-4, atol=1e-5)
    assert together == [3] * 4


def test_what_follows_may_write_over_its_map() -> None:
    plain, fused = both()
    grads = []
    x = maps()
    for module in (plain, fused):
        leaf = x.clone().requires_grad_()
        total = sum(F.relu_(y).square().sum() for y in module(leaf))
        total.backward()
        grads.append({"x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}})
    assert_all_close(grads[1], grads[0], **TIGHT)


def test_gradients_of_any_order(together: list[int]) -> None:
    _, fused = both()

    def computed(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, parameters, strict=True))
        return tuple(torch.func.functional_call(fused, given, (x,)))

    names = [name for name, _ in fused.named_parameters()]
    x = maps(2, CHANNELS, 3, 4).requires_grad_()
    arguments = (x, *fused.parameters())
    assert torch.autograd.gradcheck(computed, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(computed, arguments, fast_mode=True)
    assert together


def test_each_convolution_is_its_own_to_autograd() -> None:
    """What no loss reads has no gradient, and nothing that it would need is in the way."""
    plain, fused = both()
    x = maps()
    for module in (plain, fused):
        a, b, c = module(x)
        with torch.no_grad():
            module.b.weight.mul_(2)  # which b's gradient would need
        (a.sum() + c.sum()).backward()
        assert module.b.weight.grad is None
        assert module.b.bias.grad is None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            b.sum().backward()


@pytest.mark.parametrize("frozen", ["weights", "biases", "map"])
def test_what_needs_no_gradient(frozen: str) -> None:
    plain, fused = both()
    x = maps()
    found = []
    for module in (plain, fused):
        for name, p in module.named_parameters():
            p.requires_grad_(frozen == "map" or ("bias" in name) == (frozen == "weights"))
        leaf = x.clone().requires_grad_(frozen != "map")
        sum(y.square().sum() for y in module(leaf)).backward()
        leaves = {"x": leaf, **dict(module.named_parameters())}
        assert all((t.grad is not None) == t.requires_grad for t in leaves.values())
        found.append({name: t.grad for name, t in leaves.items() if t.requires_grad})
    assert_all_close(found[1], found[0], **TIGHT)


def test_branches_that_control_flow_skips(together: list[int]) -> None:
    """They are computed for nothing once, and have no gradients."""
    plain, fused = pair()
    together.clear()
    changes = [
        ((0, 1, 2, 3), [4]),
        ((0, 2), [4]),  # 1 and 3 for nothing
        ((0, 2, 3), [2]),  # 3 alone
        ((0, 1, 2), [3]),  # 3 for nothing, 1 alone
        ((1,), [3]),  # 0 and 2 for nothing
        ((0, 2), []),  # each alone
        ((1, 3), []),
    ]
    for wanted, first in changes:
        for module in (plain, fused):
            module.wanted = set(wanted)
        for again in range(3):
            together.clear()
            x = maps()
            with torch.no_grad():
                torch.testing.assert_close(fused(x), plain(x), **TIGHT)
            later = [len(wanted)] if len(wanted) > 1 else []
            assert together == (later if again else first)
    for module in (plain, fused):
        module.wanted = {0, 3}
        module(x).sum().backward()
        assert [b[0].weight.grad is None for b in module.branches] == [False, True, True, False]
    for module in (plain, fused):
        module.wanted = {0, 1, 2, 3}
    with torch.no_grad():
        fused(x)
        together.clear()
        torch.testing.assert_close(fused(x), plain(x), **TIGHT)
    assert together == [4]


def test_the_same_map_again(together: list[int]) -> None:
    plain, fused = both()
    x = maps()
    for _ in range(3):
        for got, expected in zip(fused(x), plain(x), strict=True):
            torch.testing.assert_close(got, expected, **TIGHT)
    assert together == [3, 3, 3]
    a = fused.a(x)
    assert fused.a(x) is not a  # each part is handed out once
    torch.testing.assert_close(fused.a(x), plain.a(x), **TIGHT)


def test_two_maps_in_turns(together: list[int]) -> None:
    """As of a Siamese network that goes branch by branch: then each computes alone."""
    plain, fused = both()
    for _ in range(3):
        x, y = maps(), maps()
        for name in "abc":
            for z in (x, y):
                got, expected = getattr(fused, name)(z), getattr(plain, name)(z)
                torch.testing.assert_close(got, expected, **TIGHT)
    assert together == [3]


@pytest.mark.parametrize(
    "shape", [(CHANNELS, 9, 11), (0, CHANNELS, 9, 11), (2, CHANNELS, 1, 1), (1, CHANNELS, 2, 40)]
)
def test_other_shapes(shape: tuple[int, ...]) -> None:
    plain, fused = both()
    with torch.no_grad():
        check_alike(plain, fused, torch.randn(shape, dtype=torch.float64))
    check_alike(plain, fused, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "x", [torch.randn(2, CHANNELS + 1, 5, 5).double(), torch.randn(SHAPE), torch.zeros(SHAPE).int()]
)
def test_refusals_are_pytorch_s(x: Tensor) -> None:
    said = []
    for module in both():
        with pytest.raises(RuntimeError) as error:
            module(x)
        said.append(str(error.value))
    assert said[0] == said[1]
    with pytest.raises((TypeError, AttributeError)):
        both()[1](None)


def test_keywords() -> None:
    plain, fused = both()
    torch.testing.assert_close(fused.a(input=(x := maps())), plain.a(x), **TIGHT)


def test_nothing_is_kept() -> None:
    _, fused = both()
    x = maps()
    with torch.no_grad():
        fused(x)
        assert not waiting(fused.a)
        fused.a(x)
        kept = [weakref.ref(part.value) for part in waiting(fused.a).values()]
        assert len(kept) == 2
        fused.b(x)
        assert [ref() is None for ref in kept] == [True, False]
        gone = weakref.ref(x)
        del x
        assert gone() is None
        assert kept[1]() is None  # with the map that it was of
        x, y = maps(), maps()
        fused(x)
        fused.a(x)
        kept = [weakref.ref(part.value) for part in waiting(fused.a).values()]
        fused.b(y)
        assert all(ref() is None for ref in kept)  # with the next computation
    for parameters in (x.requires_grad_(), y):
        result = fused(parameters)
        gone = weakref.ref(result[1])
        del result
        assert gone() is None


def test_a_part_is_of_one_mode() -> None:
    plain, fused = both()
    x = maps()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            fused(maps())
            fused.a(x)
        assert len(waiting(fused.a)) == 2
        b = fused.b(x)
        assert not waiting(fused.a)
        assert not b.is_inference()
        torch.testing.assert_close(b, plain.b(x), **TIGHT)
        fused(maps())


def test_threads(together: list[int]) -> None:
    plain, fused = both()
    inputs = [maps() for _ in range(4)]
    expected = [plain(x) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(4)

    def caller(k: int) -> None:
        start.wait()
        for i in range(8):
            x = inputs[0] if i % 2 else inputs[k]  # at times all have the same
            for got, right in zip(fused(x), expected[0 if i % 2 else k], strict=True):
                if not torch.allclose(got, right, rtol=1e-10, atol=1e-11):
                    wrong.append(k)

    threads = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(together) == 32


def test_a_thread_does_not_take_another_s_part(together: list[int]) -> None:
    plain, fused = both()
    x = maps()
    fused.a(x)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend([fused.b(x), fused.a(x)]))
    thread.start()
    thread.join()
    torch.testing.assert_close(found, [plain.b(x), plain.a(x)], **TIGHT)
    assert len(waiting(fused.a)) == 2


def test_replicas_of_data_parallel_compute_alone(together: list[int]) -> None:
    plain, fused = both()
    replica = fused._replicate_for_data_parallel()
    for name, child in fused.named_children():
        replica._modules[name] = child._replicate_for_data_parallel()
        for of in ("weight", "bias"):
            value = getattr(child, of)
            setattr(replica._modules[name], of, None if value is None else value * 2)
    for got, expected in zip(replica(x := maps()), plain(x), strict=True):
        torch.testing.assert_close(got, 2 * expected, **TIGHT)
    assert together == []


def test_hooks_see_what_they_would(together: list[int]) -> None:
    plain, fused = both()
    seen: list[list[object]] = [[], []]
    x = maps()
    for module, notes in zip((plain, fused), seen, strict=True):
        module.a.register_forward_pre_hook(lambda m, i, n=notes: n.append(i[0]))
        module.b.register_forward_hook(lambda m, i, y, n=notes: n.append(y.detach()))
        module.c.register_full_backward_hook(lambda m, i, o, n=notes: n.extend([i[0], o[0]]))
        sum(y.square().sum() for y in module(x.clone().requires_grad_())).backward()
    assert len(seen[0]) == len(seen[1]) == 4
    torch.testing.assert_close(seen[1], seen[0], **TIGHT)
    assert together == []


def test_a_global_hook_and_a_patched_class(
    together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = both()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: None)
    try:
        check_alike(plain, fused)
    finally:
        handle.remove()
    own = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *rest: own(self, *rest) * 2)
    check_alike(plain, fused)
    assert together == []


def test_who_looks_at_the_graph_sees_convolutions(together: list[int]) -> None:
    plain, fused = both()
    x = maps()
    counts = []
    for module in (plain, fused):
        with FlopCounterMode(display=False) as counter:
            module(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    traced = torch.jit.trace(fused, x, check_trace=False)
    scripted = torch.jit.script(fused.a)
    exported = torch.export.export(fused, (x,))
    assert "atrous" not in str(traced.inlined_graph) + str(scripted.graph) + str(exported.graph)
    assert str(exported.graph).count("conv2d") >= 3
    torch.testing.assert_close(traced(x), plain(x), **TIGHT)
    torch.testing.assert_close(scripted(x), plain.a(x), **TIGHT)
    torch.testing.assert_close(exported.module()(x), plain(x), **TIGHT)
    assert together == []
    check_alike(plain, fused)
    assert together == [3]


def test_function_transforms_and_forward_mode(together: list[int]) -> None:
    plain, fused = both()
    x, t = maps(), maps()
    for module in (plain, fused):
        module.requires_grad_(False)
    results = []
    for module in (plain, fused):
        _, tangent = torch.func.jvp(lambda x, m=module: m(x)[1], (x,), (t,))
        samples = torch.func.vmap(lambda x, m=module: m(x[None])[2])(x)
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, t))[0]
            dual = torch.autograd.forward_ad.unpack_dual(dual).tangent
        results.append([tangent, samples, dual])
    torch.testing.assert_close(results[1], results[0], **TIGHT)
    assert together == []


def test_compiled(fresh_compiler: None, together: list[int]) -> None:
    plain, fused = both()
    x = maps()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain(x), **TIGHT)
    plain, fused = pair()
    together.clear()
    compiled = torch.compile(fused, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x), **TIGHT)
    assert together == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    plain, fused = pair()
    wrapped = nn.Module()
    wrapped.inner = fused.train()
    wrapped.forward = lambda x: checkpoint(fused, x, use_reentrant=reentrant)
    got, expected = train_step(wrapped, x := maps()), train_step(plain.train(), x)
    got = {name.removeprefix("inner."): value for name, value in got.items()}
    for name in list(expected):
        if "running" in name or "tracked" in name:
            del expected[name], got[name]  # a norm sees the batch twice
    assert_all_close(got, expected, **TIGHT)
