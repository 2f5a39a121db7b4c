# SPDX-License-Identifier: BSD-3-Clause
"""Modules that were fused by their structure, whatever happens to them later."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from aspp_pairs import TIGHT, assert_all_close, train_step
from torch import Tensor, nn

import aspp_ext
from aspp_ext.fuse import fuse, fuse_report, unfuse
from aspp_ext.modules import inference
from aspp_ext.modules.described import DescribedForward
from tests.zoo.hand_written import HAND_WRITTEN

SHAPE = (2, 16, 13, 15)


class Settings(types.SimpleNamespace):
    pass


TURNED = False


def shifted(y: Tensor) -> Tensor:
    return 1 * y


class Head(nn.Module):
    """Reads settings and a config, and calls a classifier at the end."""

    def __init__(self, rates: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 8, 3, padding=r, dilation=r), nn.BatchNorm2d(8), nn.ReLU())
            for r in rates
        )
        self.project = nn.Sequential(nn.Conv2d(8 * len(rates), 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, 3, 1)
        self.doubled = False
        self.config = Settings(negated=False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.project(torch.cat([branch(x) for branch in self.branches], 1))
        y = shifted(2 * y if self.doubled else y)
        if TURNED:
            y = y.flip(2)
        return scale * self.classifier(-y if self.config.negated else y)


def features(n: int = 2) -> Tensor:
    return torch.randn((n, *SHAPE[1:]), dtype=torch.float64)


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    original = Head().double()
    train_step(original, features())  # statistics that are not the identity
    original.zero_grad()
    return original, fuse(copy.deepcopy(original))


def agree(original: nn.Module, ours: nn.Module) -> None:
    x = features()
    for training in (True, False):
        original.train(training)
        ours.train(training)
        assert_all_close(train_step(ours, x), train_step(original, x), **TIGHT)
        original.zero_grad()
        ours.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), original(x), **TIGHT)


def seeded(kind: type[nn.Module], *arguments: int) -> nn.Module:
    torch.manual_seed(5)
    return kind(*arguments).double()


def in_place(convolution: nn.Conv2d) -> None:
    with torch.no_grad():
        convolution.weight.mul_(2)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str | None]] = {
    "a weight": (lambda m: in_place(m.branches[1][0]), None),
    "a new weight": (
        lambda m: setattr(
            m.branches[1][0], "weight", nn.Parameter(torch.ones(8, 16, 3, 3).double())
        ),
        None,
    ),
    "a momentum": (lambda m: setattr(m.branches[0][1], "momentum", 0.5), None),
    "a norm is frozen": (lambda m: m.branches[0][1].eval(), None),
    "statistics": (lambda m: m.branches[0][1].running_mean.add_(1), None),
    "the classifier": (
        lambda m: setattr(m, "classifier", seeded(nn.Conv2d, 8, 5, 1)),
        "classifier has changed",
    ),
    "a classifier of the same size": (
        lambda m: setattr(m, "classifier", seeded(nn.Conv2d, 8, 3, 1)),
        None,
    ),
    "a setting": (lambda m: setattr(m, "doubled", True), "doubled of the module has changed"),
    "a config": (
        lambda m: setattr(m.config, "negated", True),
        "config.negated of the module has changed",
    ),
    "a rate": (
        lambda m: (
            setattr(m.branches[2][0], "dilation", (3, 3)),
            setattr(m.branches[2][0], "padding", (3, 3)),
        ),
        "of branches.2.0 has changed",
    ),
    "an activation": (lambda m: m.branches[0].__setitem__(2, nn.GELU()), "branches.0.2 is a GELU"),
    "a slope": (lambda m: m.branches.append(m.branches[0]), "branches has other parts"),
    "one more layer": (lambda m: m.branches[1].append(nn.Tanh()), "branches.1 has other parts"),
    "a hook": (
        lambda m: m.branches[0][1].register_forward_hook(lambda m, i, y: 2 * y),
        "branches.0.1 has a hook",
    ),
    "a hook on the classifier": (
        lambda m: m.classifier.register_forward_hook(lambda m, i, y: 2 * y),
        None,
    ),
    "a hook on the module": (lambda m: m.register_forward_hook(lambda m, i, y: 2 * y), None),
    "a method of a layer": (
        lambda m: setattr(m.branches[0][1], "forward", torch.abs),
        "branches.0.1 has its forward replaced",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fusing(pair, change: str) -> None:
    original, ours = pair
    agree(original, ours)
    act, said = CHANGES[change]
    for module in pair:
        if change == "a slope":
            continue
        with torch.no_grad():
            act(module)
    if change == "a slope":  # a branch more than the projection reads: both refuse
        for module in pair:
            act(module)
            with pytest.raises(RuntimeError):
                module(features())
    else:
        agree(original, ours)
    (entry,) = fuse_report(ours)
    assert entry.reason is None if said is None else said in entry.reason


def test_fusing_again_reads_what_has_changed(pair) -> None:
    original, ours = pair
    for module in pair:
        module.doubled = True
        module.branches[0][2] = nn.Tanh()
    assert fuse_report(ours)[0].reason is not None
    assert fuse(ours, polyphase=False) is ours
    assert [(e.fused, e.reason) for e in fuse_report(ours)] == [(True, None)]
    assert ours.polyphase is False
    agree(original, ours)


def test_fusing_again_beside_a_hook_keeps_the_old_description(pair) -> None:
    original, ours = pair
    handle = ours.branches[0][1].register_forward_hook(lambda m, i, y: 2 * y)
    with pytest.warns(UserWarning, match="has a hook"):
        fuse(ours)
    handle.remove()
    assert [(e.fused, e.reason) for e in fuse_report(ours)] == [(True, None)]
    agree(original, ours)


def test_a_method_of_the_class_is_replaced(pair, monkeypatch) -> None:
    original, ours = pair
    plain = Head.forward
    monkeypatch.setattr(Head, "forward", lambda self, x: 3 * plain(self, x))
    agree(original, ours)
    assert "Head.forward, which it reads, has changed" in fuse_report(ours)[0].reason


@pytest.mark.parametrize(
    ("name", "value"), [("TURNED", True), ("shifted", lambda y: y + 1)], ids=["flag", "function"]
)
def test_a_global_that_the_forward_reads(pair, monkeypatch, name: str, value) -> None:
    original, ours = pair
    agree(original, ours)
    monkeypatch.setitem(globals(), name, value)
    agree(original, ours)
    assert f"{name}, which it reads, has changed" in fuse_report(ours)[0].reason


def test_other_calls_are_the_module_s_own(pair) -> None:
    original, ours = (m.eval() for m in pair)
    x = features()
    for call in (
        lambda m: m(x, 2.0),
        lambda m: m(x=x),
        lambda m: m(x, scale=3.0),
        lambda m: m(x[:, :, :1, :1]),
        lambda m: m(x[:0]),
        lambda m: m(x.transpose(2, 3)),
        lambda m: m(x.contiguous(memory_format=torch.channels_last)),
    ):
        torch.testing.assert_close(call(ours), call(original), **TIGHT)
    for bad in (x[:, :3], x.float(), x[0], "x"):
        errors = []
        for module in (original, ours):
            with pytest.raises(Exception) as error:
                module(bad)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]


def test_copies_pickles_and_the_way_back(pair) -> None:
    original, ours = (m.eval() for m in pair)
    x = features()
    with torch.no_grad():
        expected = ours(x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    twins = (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    )
    for twin in twins:
        assert type(twin) is type(ours)
        assert [(e.fused, e.reason) for e in fuse_report(twin)] == [(True, None)]
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
        agree(copy.deepcopy(original), twin)
        assert type(unfuse(twin)) is Head
    assert vars(unfuse(ours)).keys() == vars(original).keys()


def test_the_state_dict_loads_before_and_after(pair) -> None:
    original, ours = pair
    other = Head().double()
    for module in pair:
        module.load_state_dict(other.state_dict(), strict=True)
    agree(original, ours)
    late = fuse(Head().double())
    late.load_state_dict(ours.state_dict(), strict=True)
    agree(original, late)


def test_what_eval_computes_is_folded(pair, monkeypatch) -> None:
    _, ours = pair
    calls = []
    real = inference.aspp_inference
    monkeypatch.setattr(
        inference, "aspp_inference", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    with torch.no_grad():
        ours.eval()(features())
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["founding", "norm_group", "separable_norm_relu", "sum_in_place"])
def test_compiled_exported_and_traced(name: str) -> None:
    original = HAND_WRITTEN[name].make().eval()
    ours = fuse(copy.deepcopy(original))
    x = torch.randn(HAND_WRITTEN[name].shapes[0])
    with torch.no_grad():
        expected = original(x)
        close = {"rtol": 1e-4, "atol": 1e-5}
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(x), expected, **close)
        exported = torch.export.export(ours, (x,)).module()
        torch.testing.assert_close(exported(x), expected, **close)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(ours, x)
        torch.testing.assert_close(traced(x), expected, **close)


def test_autocast_and_low_precision(pair) -> None:
    original, ours = (m.eval() for m in pair)
    x = features()
    with torch.no_grad():
        oracle = original(x)
        for dtype in (torch.bfloat16, torch.float16):
            low, got = (m.to(dtype)(x.to(dtype)).double() for m in (original, ours))
            eps = torch.finfo(dtype).eps * oracle.abs().max()
            assert (got - oracle).abs().max() <= 2 * (low - oracle).abs().max() + eps
        original.float()
        ours.float()
        with torch.autocast("cpu", torch.bfloat16):
            low, got = original(x.float()), ours(x.float())
        assert low.dtype == got.dtype
        torch.testing.assert_close(got, low, rtol=0.1, atol=0.1)


def test_frozen(pair) -> None:
    original, ours = (m.eval() for m in pair)
    aspp_ext.freeze(ours)
    x = features()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), original(x), **TIGHT)
        kept = ours(x)
        ours.branches[0][0].weight.mul_(2)
        assert torch.equal(ours(x), kept)
        aspp_ext.unfreeze(ours)
        assert not torch.equal(ours(x), kept)


def test_two_threads(pair) -> None:
    _, ours = pair
    ours.eval()
    inputs = [features() for _ in range(4)]
    with torch.no_grad():
        expected = [ours(x) for x in inputs]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            if not all(torch.equal(ours(inputs[i]), expected[i]) for _ in range(20)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_single_image_trains_by_running_statistics() -> None:
    ours = fuse(HAND_WRITTEN["pyramid"].make(), pool_batch_of_one="running_stats")
    ours(torch.randn(1, *SHAPE[1:])).sum().backward()
    assert isinstance(ours, DescribedForward)


def test_nothing_is_drawn_and_nothing_changes_in_fusing() -> None:
    module = Head()
    state = copy.deepcopy(module.state_dict())
    drawn = torch.get_rng_state()
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    module.branches[0].register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.warns(UserWarning, match="branches.0 has a hook"):
        fuse(module)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not called
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_a_module_on_the_meta_device_in_bfloat16_is_read() -> None:
    module = Head().to(torch.bfloat16).to("meta")
    assert [e.reason for e in fuse_report(fuse(module))] == [None]
