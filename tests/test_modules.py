# SPDX-License-Identifier: BSD-3-Clause
"""The fused forward against the module it replaces: numbers, statistics, gradients, the cache."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from aspp_pairs import (
    CHANNELS,
    PAIRS,
    RATES,
    TIGHT,
    WIDTH,
    Pair,
    assert_all_close,
    features,
    randomise,
    smp_aspp,
    torchvision_aspp,
    train_step,
)
from marks import on_native, proven_emulated, quick_emulated, varied
from torch import nn

from aspp_ext.modules import ASPP, fold_cache, fused, inference

pytestmark = [proven_emulated, on_native, varied]


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture
def inferences(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of the folded operator; empty when another path ran."""
    calls = []
    real = inference.aspp_inference

    def spy(*args, **keywords):
        calls.append(args)
        return real(*args, **keywords)

    monkeypatch.setattr(inference, "aspp_inference", spy)
    return calls


@pytest.mark.parametrize("separable", [False, True])
def test_same_keys_order_and_initial_values(separable: bool) -> None:
    torch.manual_seed(3)
    original = smp_aspp(True) if separable else torchvision_aspp()
    torch.manual_seed(3)
    ours = ASPP(CHANNELS, RATES, WIDTH, separable=separable)
    state, own = original.state_dict(), ours.state_dict()
    assert list(own) == list(state)
    assert all(torch.equal(own[key], state[key]) for key in state)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in original.named_parameters()]
    ours.load_state_dict(state, strict=True)
    original.load_state_dict(own, strict=True)


@quick_emulated()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_eval(pair: Pair, layout: torch.memory_format, inferences: list) -> None:
    original, ours = (m.eval() for m in pair.build())
    with torch.no_grad():
        for n in (1, 2):
            x = features(n).contiguous(memory_format=layout)
            torch.testing.assert_close(ours(x), original(x), **TIGHT)
    assert len(inferences) == 2


def formats(t: torch.Tensor) -> list[bool]:
    known = (torch.contiguous_format, torch.channels_last)
    return [t.is_contiguous(memory_format=f) for f in known]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_results_lie_in_memory_as_the_layers_leave_them(pair: Pair, training: bool, dtype) -> None:
    """A dropout draws in that order: the same seed drops the same."""
    original, ours = (m.to(dtype).train(training) for m in pair.build())
    for x_last, last in itertools.product([False, True], ["none", "project", "branches", "all"]):
        x = features().to(dtype)
        if x_last:
            x = x.contiguous(memory_format=torch.channels_last)
        results = []
        for module in (original, ours):
            module.to(memory_format=torch.contiguous_format)
            part = {"project": module.project, "branches": module.convs, "all": module}.get(last)
            if part is not None:
                part.to(memory_format=torch.channels_last)
            with torch.set_grad_enabled(training):
                torch.manual_seed(0)
                results.append(module(x))
        assert formats(results[0]) == formats(results[1]), (x_last, last)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eval_in_low_precision(pair: Pair, dtype: torch.dtype) -> None:
    original, ours = (m.eval() for m in pair.build())
    x = features().to(dtype)
    original.to(dtype)
    with torch.no_grad():
        low = original(x)
        ours.to(dtype)
        got = ours(x)
        assert got.dtype == low.dtype == dtype
        oracle = original.double()(x.double())
    allowed = 2 * (low - oracle).abs().max() + torch.finfo(dtype).eps * oracle.abs().max()
    assert (got - oracle).abs().max() <= allowed


def test_eval_with_gradients(pair: Pair, inferences: list) -> None:
    original, ours = (m.eval() for m in pair.build())
    assert_all_close(train_step(ours, features()), train_step(original, features()), **TIGHT)
    assert not inferences
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    ours(features())
    assert len(inferences) == 1  # nothing requires a gradient, though grad mode is on


@quick_emulated()
def test_training(pair: Pair) -> None:
    original, ours = pair.build()
    for step in range(2):
        got, expected = (train_step(m, features(seed=step), step) for m in (ours, original))
        assert_all_close(got, expected, **TIGHT)
    float32 = [m.float() for m in pair.build(1)]
    expected, got = (train_step(m, features().float()) for m in float32)
    assert_all_close(got, expected, rtol=2e-4, atol=2e-4)


def frozen(norm: nn.Module) -> None:
    norm.eval()


def cumulative(norm: nn.Module) -> None:
    norm.momentum = None


def untracked(norm: nn.Module) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def without_affine(norm: nn.Module) -> None:
    norm.weight = norm.bias = None


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", [frozen, cumulative, untracked, without_affine])
def test_settings_of_the_norms(pair: Pair, change, training: bool) -> None:
    modules = pair.build()
    for module in modules:
        module.train(training)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                change(norm)
    original, ours = modules
    with torch.no_grad():
        torch.manual_seed(0)
        expected = original(features())
        torch.manual_seed(0)
        torch.testing.assert_close(ours(features()), expected, **TIGHT)
    assert_all_close(train_step(ours, features()), train_step(original, features()), **TIGHT)


def test_biased_convolutions(pair: Pair) -> None:
    modules = pair.build()
    for module in modules:
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d) and conv.groups == 1:
                conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels).double())
    original, ours = modules
    assert_all_close(train_step(ours, features()), train_step(original, features()), **TIGHT)
    with torch.no_grad():
        expected = original.eval()(features())
        torch.testing.assert_close(ours.eval()(features()), expected, **TIGHT)


def test_dropout_left_on_in_eval(pair: Pair) -> None:
    original, ours = (m.eval() for m in pair.build())
    original.project[3].train()
    ours.project[3].train()
    with torch.no_grad():
        torch.manual_seed(5)
        expected = original(features())
        torch.manual_seed(5)
        torch.testing.assert_close(ours(features()), expected, **TIGHT)


def edits(original: nn.Module) -> list:
    """Every way to change each kind of tensor, as (name, function of a module)."""
    fresh, fresher = (randomise(copy.deepcopy(original), seed) for seed in (7, 8))
    found = [
        ("load_state_dict", lambda m: m.load_state_dict(fresh.state_dict())),
        ("assign", lambda m: m.load_state_dict(copy.deepcopy(fresher).state_dict(), assign=True)),
        ("eps", lambda m: setattr(m.convs[1][1], "eps", 0.5)),
    ]

    def tensor(m, name):
        return (dict(m.named_parameters()) | dict(m.named_buffers()))[name]

    def in_place(m, name):
        with torch.no_grad():
            tensor(m, name).mul_(1.5)

    def through_data(m, name):
        tensor(m, name).data.mul_(1.5)

    def new_data(m, name):
        tensor(m, name).data = tensor(m, name).data * 1.5

    def replaced(m, name):
        path, _, leaf = name.rpartition(".")
        owner = m.get_submodule(path)
        if leaf in owner._parameters:
            setattr(owner, leaf, nn.Parameter(getattr(owner, leaf).detach() * 1.5))
        else:
            setattr(owner, leaf, getattr(owner, leaf) * 1.5)

    def in_inference_mode(m, name):
        with torch.inference_mode():
            tensor(m, name).mul_(1.5)

    for name in original.state_dict():
        if not name.endswith("num_batches_tracked") and not name.startswith(("convs.2", "convs.3")):
            for change in (in_place, through_data, new_data, replaced, in_inference_mode):
                found.append((f"{name} {change.__name__}", lambda m, c=change, n=name: c(m, n)))
    return found


def test_cache_is_used_and_follows_every_change(pair: Pair, inferences: list) -> None:
    original, ours = (m.eval() for m in pair.build())
    x = features()
    with torch.no_grad():
        before = ours(x)
        assert torch.equal(ours(x), before)
        assert inferences[0][2] is inferences[1][2]
        for name, change in edits(original):
            change(original)
            change(ours)
            got, expected = ours(x), original(x)
            torch.testing.assert_close(got, expected, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")
            assert not torch.equal(got, before), name
            before = got


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_cache_notices_data_writes_to_large_weights(layout: str) -> None:
    torch.manual_seed(0)
    ours = randomise(ASPP(64, [2], 48)).eval()
    conv = ours.convs[1][0]
    if layout == "channels_last":
        ours.to(memory_format=torch.channels_last)
    if layout == "strided":
        conv.weight = nn.Parameter(conv.weight.detach().repeat_interleave(2, -1)[..., ::2])
    x = torch.randn(1, 64, 6, 6)
    plain = super(fused.FusedForward, ours)
    with torch.no_grad():
        ours(x)
        for channel in range(0, 48, 5):  # one filter at a time, as a pruner would
            conv.weight.data[channel] = 0
            torch.testing.assert_close(ours(x), plain.forward(x))


def test_cache_holds_across_grad_and_inference_modes(pair: Pair, inferences: list) -> None:
    _, ours = pair.build()
    ours.eval().requires_grad_(False)
    with torch.inference_mode():
        ours(features())
    with torch.no_grad():
        ours(features())
    ours(features())
    assert all(call[2] is inferences[0][2] for call in inferences)
    ours.train().eval()(features())
    assert inferences[-1][2] is not inferences[0][2]


def test_changes_of_inference_tensors_are_noticed(pair: Pair) -> None:
    with torch.inference_mode():
        original, ours = (m.eval() for m in pair.build())
        for module in (original, ours):
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.data = tensor.data.clone()
        for _ in range(2):
            torch.testing.assert_close(ours(features()), original(features()), **TIGHT)
            for module in (original, ours):
                module.convs[0][0].weight.mul_(1.5)


def test_cache_stays_out_of_state_copies_and_pickles(pair: Pair) -> None:
    _, ours = pair.build()
    ours.eval()
    keys, size = list(ours.state_dict()), len(pickle.dumps(ours))
    with torch.no_grad():
        expected = ours(features())
        assert fused.CACHE in ours.__dict__
        assert list(ours.state_dict()) == keys
        assert len(pickle.dumps(ours)) == size
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is type(ours)
            assert fused.CACHE not in twin.__dict__
            assert torch.equal(twin(features()), expected)
            twin.convs[0][0].weight.zero_()
        assert torch.equal(ours(features()), expected)
        ours.float()
        assert fused.CACHE not in ours.__dict__


def test_folding_is_done_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair.build()
    ours.eval()
    folds = []
    real = fold_cache.fold
    monkeypatch.setattr(fold_cache, "fold", lambda *args: folds.append(args) or real(*args))
    with torch.no_grad():
        for _ in range(3):
            ours(features())
    assert len(folds) == 1


def test_folded_layouts(pair: Pair, inferences: list) -> None:
    _, ours = pair.build()
    with torch.no_grad():
        ours.eval()(features())
    _, _, weights, _, _, pool, _, project, _ = inferences[0]
    for weight in (*weights, pool, project):
        assert weight.stride(0) == 1


def test_batch_of_one_names_the_branch_and_changes_nothing(pair: Pair) -> None:
    original, ours = pair.build()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        original(features(1))
    before = copy.deepcopy(ours.state_dict())
    expected = "Expected more than 1 value per channel when training.*pooled branch.*running_stats"
    with pytest.raises(ValueError, match=expected):
        ours(features(1))
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_batch_of_one_with_running_statistics(pair: Pair) -> None:
    original, ours = pair.build()
    ours.pool_batch_of_one = "running_stats"
    original.convs[-1][2].eval()  # the workaround that users write by hand
    assert_all_close(train_step(ours, features(1)), train_step(original, features(1)), **TIGHT)
    original.train()
    assert_all_close(train_step(ours, features(2)), train_step(original, features(2)), **TIGHT)
    untracked(ours.convs[-1][2])
    with pytest.raises(ValueError, match="needs running statistics"):
        ours(features(1))


def test_a_batch_of_one_may_have_its_pooled_norm_frozen(pair: Pair) -> None:
    original, ours = pair.build()
    for module in (original, ours):
        module.convs[-1][2].eval()
    assert_all_close(train_step(ours, features(1)), train_step(original, features(1)), **TIGHT)


@pytest.mark.parametrize(
    ("shape", "got"),
    [((2, 5, 7, 9), "[2, 5, 7, 9]"), ((CHANNELS, 7, 9), f"[{CHANNELS}, 7, 9]"), ((3,), "[3]")],
)
@pytest.mark.parametrize("training", [False, True])
def test_bad_input(pair: Pair, shape: tuple, got: str, training: bool) -> None:
    _, ours = pair.build()
    with pytest.raises(ValueError) as error:
        ours.train(training)(torch.zeros(shape, dtype=torch.float64))
    assert str(error.value).endswith(f"x must be [N, {CHANNELS}, H, W], got {got}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
@pytest.mark.parametrize("training", [False, True])
def test_features_of_another_dtype(pair: Pair, dtype: torch.dtype, training: bool) -> None:
    """In the module's words, also where autocast would cast them to yet another one."""
    original, ours = (module.train(training) for module in pair.build())
    x, words = features(2).to(dtype), f"x must be float64, in which it computes, got {dtype}"
    for autocast in (False, True):
        with torch.autocast("cpu", enabled=autocast), torch.set_grad_enabled(training):
            with pytest.raises(RuntimeError):
                original(x)
            with pytest.raises(TypeError, match=words.replace("torch.", "")):
                ours(x)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((0, RATES), {}, "in_channels must be at least 1, got 0"),
        ((4, RATES, 0), {}, "out_channels must be at least 1, got 0"),
        ((4, []), {}, "atrous_rates must name at least one rate, got none"),
        ((4, [1, 0]), {}, r"atrous_rates\[1\] must be at least 1, got 0"),
        ((4, [(1, 2, 3)]), {}, r"atrous_rates\[0\] must be"),
        ((4, RATES), {"dropout": 1.5}, "dropout"),
        ((4, RATES), {"pool_batch_of_one": "maybe"}, "pool_batch_of_one must be one of"),
    ],
)
def test_bad_arguments(arguments: tuple, keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASPP(*arguments, **keywords)
    with pytest.raises(TypeError):
        ASPP(4, [1.5])
    with pytest.raises(TypeError, match="ASPP: polyphase must be True or False, got 'never'"):
        ASPP(4, RATES, polyphase="never")


def test_rates_per_axis() -> None:
    ours = randomise(ASPP(CHANNELS, [(1, 3), (4, 2)], WIDTH)).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(
            ours(features()), super(fused.FusedForward, ours).forward(features()), **TIGHT
        )
