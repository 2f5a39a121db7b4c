# SPDX-License-Identifier: BSD-3-Clause
"""The batch norms of all branches as one against the norms one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aspp_pairs import PAIRS, TIGHT, assert_all_close, features, train_step
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from aspp_ext.modules import layers, parts, stages
from aspp_ext.modules.joint_norm import joinable, joint_norm, uses_statistics

WIDTHS = (5, 1, 8)
LOW = (torch.bfloat16, torch.float16)


def make_norms(dtype: torch.dtype = torch.float64, **settings) -> nn.ModuleList:
    norms = nn.ModuleList(nn.BatchNorm2d(width, **settings) for width in WIDTHS)
    for i, norm in enumerate(norms):
        for t in (*norm.parameters(), *norm.buffers()):
            if t.is_floating_point():
                t.data.uniform_(0.5, 1.5)
            else:
                t.add_(i)  # batches seen so far
    return norms.to(dtype)


def make_y(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (2, sum(WIDTHS), 3, 4)
    y = (
        torch.randn(size, generator=generator, dtype=torch.float64) * 2
        + torch.arange(size[1])[:, None, None]
    )
    return y.to(dtype)


def statistics_of(y: Tensor) -> tuple[Tensor, Tensor]:
    """What the CUDA kernels return with y."""
    wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, var * (y.numel() // y.shape[1])


def one_by_one(norms: nn.ModuleList, y: Tensor) -> Tensor:
    return torch.cat([n(p) for n, p in zip(norms, y.split(WIDTHS, 1), strict=True)], 1)


def computed(norms: nn.ModuleList, y: Tensor) -> Tensor:
    assert joinable(norms, y)
    return joint_norm(norms, y)


def given(norms: nn.ModuleList, y: Tensor) -> Tensor:
    assert joinable(norms, y)
    return joint_norm(norms, y, *(statistics_of(y) if uses_statistics(norms) else ()))


each_way = pytest.mark.parametrize("joint", [computed, given])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
Forward = Callable[[nn.ModuleList, Tensor], Tensor]


def step(forward: Forward, norms: nn.ModuleList, y: Tensor) -> dict[str, Tensor]:
    y = y.clone().requires_grad_()
    norms.zero_grad()
    z = forward(norms, y)
    z.backward(torch.linspace(-1, 1, z.numel()).to(z).view_as(z))
    found = {"z": z.detach(), "y.grad": y.grad, **dict(norms.named_buffers())}
    return found | {f"{name}.grad": p.grad for name, p in norms.named_parameters()}


@each_mode
@each_way
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("affine", ["affine", "no_bias", "not_affine"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_same_numbers_and_buffers(tracked, affine, momentum, layout, joint, training) -> None:
    norms = make_norms(
        affine=affine != "not_affine",
        bias=affine == "affine",
        momentum=momentum,
        track_running_stats=tracked,
    ).train(training)
    twin = copy.deepcopy(norms)
    for seed in range(3):
        y = make_y(seed=seed).contiguous(memory_format=layout)
        assert_all_close(step(joint, norms, y), step(one_by_one, twin, y), **TIGHT)
    assert list(norms.state_dict()) == list(twin.state_dict())
    with torch.no_grad():
        z = joint(norms, y)
    assert z.is_contiguous(memory_format=layout)


@each_mode
@each_way
@pytest.mark.parametrize("change", ["untracked", "without buffers", "without count"])
def test_settings_changed_by_hand(change, joint, training) -> None:
    """The attributes a norm reads when it is called, whatever it was built with."""
    norms = make_norms(momentum=None).train(training)
    for norm in norms:
        if change == "untracked":
            norm.track_running_stats = False
        elif change == "without buffers":
            norm.running_mean = norm.running_var = None
        else:
            norm.num_batches_tracked = None
    twin = copy.deepcopy(norms)
    assert_all_close(step(joint, norms, make_y()), step(one_by_one, twin, make_y()), **TIGHT)


@each_way
@pytest.mark.parametrize("mixed", [True, False], ids=["float32 norms", "all low"])
@pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
def test_low_precision(dtype, mixed, joint) -> None:
    norms, y = make_norms(torch.float32), make_y(dtype)
    exact = copy.deepcopy(norms.to(torch.float32 if mixed else dtype)).double()
    twin = copy.deepcopy(norms)
    oracle = step(one_by_one, exact, y.double())
    low, got = step(one_by_one, twin, y), step(joint, norms, y)
    for name, want in oracle.items():
        assert got[name].dtype == low[name].dtype
        error = (got[name] - want).abs().max()
        rounding = torch.finfo(dtype).eps * want.abs().max()
        assert error <= 2 * (low[name] - want).abs().max() + rounding, name


@each_way
def test_a_large_mean_costs_no_digits_of_the_variance(joint) -> None:
    norms, y = make_norms(torch.float32), make_y(torch.float32) + 1000
    want = step(one_by_one, copy.deepcopy(norms).double(), y.double())
    got = step(joint, norms, y)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value.to(got[name].dtype), rtol=1e-3, atol=1e-3)


@each_way
def test_first_and_second_derivatives(joint) -> None:
    norms = make_norms()
    y = make_y()[:, :, :2, :2].clone().requires_grad_()
    inputs = (y, *norms.parameters())
    assert gradcheck(lambda y, *_: joint(norms, y), inputs)
    assert gradgradcheck(lambda y, *_: joint(norms, y), inputs)


@each_way
def test_writes_are_counted_as_the_norms_count_them(joint) -> None:
    """The number of batches by its version; the statistics have none that moves, as others save."""
    norms, other = make_norms(), make_norms()
    before = [b._version for b in norms.buffers()]
    joint(norms, make_y())
    one_by_one(other, make_y())
    moved = [b._version - v for b, v in zip(norms.buffers(), before, strict=True)]
    assert moved == [b._version - v for b, v in zip(other.buffers(), before, strict=True)]
    assert sum(moved) == len(WIDTHS)


@each_way
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_norm_that_was_called_before_in_the_same_graph(joint, training: bool) -> None:
    kept, grads = make_norms(), []
    for call in (one_by_one, joint):
        norms, y = copy.deepcopy(kept), make_y().requires_grad_()
        before = norms.train(training)[1](y[:, 5:6])
        (call(norms.train(), y) + before).square().sum().backward()
        assert y.grad is not None
        grads.append(y.grad)
    torch.testing.assert_close(*grads, **TIGHT)


class Other(nn.BatchNorm2d):
    pass


def set_to(name: str, value) -> Callable[[nn.BatchNorm2d], None]:
    return lambda norm: setattr(norm, name, value)


DIFFERENT = {
    "subclass": set_to("__class__", Other),
    "synchronised": set_to("__class__", nn.SyncBatchNorm),
    "frozen": lambda norm: norm.eval(),
    "eps": set_to("eps", 1e-3),
    "momentum": set_to("momentum", 0.3),
    "cumulative": set_to("momentum", None),
    "untracked": set_to("track_running_stats", False),
    "not affine": lambda norm: (set_to("weight", None)(norm), set_to("bias", None)(norm)),
    "without bias": set_to("bias", None),
    "without count": set_to("num_batches_tracked", None),
    "without variance": set_to("running_var", None),
    "dtype": lambda norm: norm.float(),
    "device": lambda norm: norm.to("meta"),
}


@pytest.mark.parametrize("why", DIFFERENT)
def test_not_joined(why) -> None:
    norms = make_norms()
    assert joinable(norms, make_y())
    DIFFERENT[why](norms[1])
    assert not joinable(norms, make_y())


def test_a_norm_of_two_branches_is_not_joined() -> None:
    norms = make_norms()
    assert not joinable([*norms, norms[0]], make_y())


def test_one_value_per_channel_is_refused_as_by_pytorch() -> None:
    original, ours = PAIRS["ours dense"].build()
    sentences = []
    for module in (original, ours):
        module.convs[-1][2].eval()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as refusal:
            module(features(1, height=1, width=1))
        sentences.append(str(refusal.value))
    assert sentences[0] == sentences[1]
    assert not joinable(make_norms(), make_y()[:1, :, :1, :1])
    assert not joinable(make_norms(), make_y()[:0])


def test_eps_of_zero_is_refused_as_by_pytorch() -> None:
    norms = make_norms(eps=0.0)
    assert not uses_statistics(norms)
    with pytest.raises(ValueError, match="eps must be positive during training"):
        joint_norm(norms, make_y())


@pytest.fixture
def calls(monkeypatch) -> list[nn.BatchNorm2d]:
    """The norms that run one by one, by PyTorch's sums or our own."""
    seen: list[nn.BatchNorm2d] = []

    def spy(real: Any) -> Any:
        def one(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
            if not any(norm is other for other in seen):
                seen.append(norm)
            return real(norm, x)

        return one

    monkeypatch.setattr(nn.BatchNorm2d, "forward", spy(nn.BatchNorm2d.forward))
    monkeypatch.setattr(stages, "one_norm", spy(stages.one_norm))
    monkeypatch.setattr(parts, "changed_class", lambda kind: None)  # would see the spy
    return seen


@each_mode
@pytest.mark.parametrize("name", PAIRS)
def test_modules_join_their_branches(name, training, calls) -> None:
    _, ours = PAIRS[name].build()
    train_step(ours.train(training), features())
    assert calls == [ours.convs[-1][2], ours.project[1]]


KEPT = ("frozen", "eps", "momentum", "cumulative", "untracked", "not affine")


@each_mode
@pytest.mark.parametrize("why", KEPT)
def test_modules_with_one_norm_unlike_the_others(why, training, calls) -> None:
    original, ours = (m.train(training) for m in PAIRS["ours separable"].build())
    for module in (original, ours):
        DIFFERENT[why](module.convs[1][1])
    assert_all_close(train_step(ours, features()), train_step(original, features()), **TIGHT)
    joined = why == "frozen" and not training
    assert any(ours.convs[0][1] is norm for norm in calls) is not joined


@pytest.fixture
def given_statistics(monkeypatch) -> list[Tensor]:
    """As if the dense pyramid's implementation returned them: on CUDA it does."""
    seen: list[Tensor] = []

    def spy(x, weights, rates, **keywords):
        y = layers.atrous_pyramid(x, weights, rates, **keywords)
        if not torch.compiler.is_compiling():
            seen.append(y)
        return (y, *statistics_of(y))

    monkeypatch.setattr(layers, "atrous_pyramid_statistics", spy)
    return seen


def test_module_with_given_statistics(given_statistics) -> None:
    original, ours = PAIRS["ours dense"].build()
    for seed in range(2):
        got, expected = (train_step(m, features(seed=seed), seed) for m in (ours, original))
        assert_all_close(got, expected, **TIGHT)
    assert len(given_statistics) == 2


def biased(module: nn.Module) -> None:
    module.convs[1][0].bias = nn.Parameter(torch.ones(module.convs[1][0].out_channels).double())


WITHOUT = {
    "eval": lambda module: module.eval(),
    "biased": biased,
    "one frozen": lambda module: module.convs[0][1].eval(),
}


@pytest.mark.parametrize("why", WITHOUT)
def test_statistics_are_not_asked_for_in_vain(why, given_statistics) -> None:
    original, ours = PAIRS["ours dense"].build()
    for module in (original, ours):
        WITHOUT[why](module)
    assert_all_close(train_step(ours, features()), train_step(original, features()), **TIGHT)
    assert not given_statistics


@pytest.mark.parametrize("name", ["ours dense", "ours separable"])
def test_forward_mode_in_training(name, given_statistics) -> None:
    original, ours = PAIRS[name].build()
    x, tangent = features(), features(seed=1)
    with forward_ad.dual_level():
        got, expected = (
            forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent
            for module in (ours, original)
            if torch.manual_seed(0)
        )
        torch.testing.assert_close(got, expected, **TIGHT)
    assert not given_statistics


@pytest.mark.quick(when=lambda momentum: momentum is not None)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_training_step(momentum, fresh_compiler, given_statistics) -> None:
    """The whole graph, with either way to the statistics; a cumulative average breaks it not."""
    for name in ("ours separable", "ours dense"):
        _, ours = PAIRS[name].build()
        for norm in ours.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum if norm in [c[1] for c in ours.convs[:-1]] else 0.1
        ours.project[3].eval()
        twin = copy.deepcopy(ours)
        compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
        for x in (features(2), features(3, height=8, width=5)):
            got, expected = train_step(compiled, x), train_step(twin, x)
            got = {key.removeprefix("_orig_mod."): value for key, value in got.items()}
            assert_all_close(got, expected, **TIGHT)
            ours.zero_grad()
            twin.zero_grad()


@pytest.mark.parametrize("shared", ["num_batches_tracked", "running_mean", "running_var"])
@pytest.mark.parametrize("name", PAIRS)
def test_norms_that_share_a_buffer(name, shared) -> None:
    """With momentum None each weighs a batch by how many there were."""
    found = []
    for module in PAIRS[name].build():
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None
        setattr(norms[1], shared, getattr(norms[0], shared))
        found.append(train_step(module, features()))
    assert_all_close(found[1], found[0], **TIGHT)
