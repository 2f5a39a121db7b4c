# SPDX-License-Identifier: BSD-3-Clause
"""Where a forward cannot be read: what fuse does to the convolutions of one map in it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from aspp_pairs import TIGHT, assert_all_close, train_step
from sibling_modules import (
    CHANNELS,
    UNREAD,
    Flat,
    SharedPointwise,
    SizesAsNumbers,
    TwoPyramids,
    maps,
    pair,
    together,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from zoo.hand_written import HAND_WRITTEN
from zoo.look_alikes import LOOK_ALIKES
from zoo.rebuilt import REBUILT

from aspp_ext.fuse import fuse, fuse_report, unfuse
from aspp_ext.modules import siblings
from aspp_ext.modules.siblings import MEMBER, SiblingConv2d

__all__ = ["together"]

CALLS = {
    "SizesAsNumbers": [4],
    "CumulativeNorms": [4],
    "SharedPointwise": [3],
    "TwoPyramids": [2, 3],
}


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("name", UNREAD)
def test_eval_and_training(name: str, together: list[int]) -> None:
    plain, fused = pair(UNREAD[name])
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [getattr(m, "momentum", 1) for m in fused.modules()] == [
        getattr(m, "momentum", 1) for m in plain.modules()
    ]
    for x in (maps(), maps(1, CHANNELS, 5, 4), maps().to(memory_format=torch.channels_last)):
        together.clear()
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), **TIGHT)
        assert together == CALLS[name]
    plain.train()
    fused.train()
    for step in range(3):
        together.clear()
        x = maps()
        got, expected = (train_step(module, x, step) for module in (fused, plain))
        assert_all_close(got, expected, **TIGHT)
        assert together == CALLS[name]


@pytest.mark.parametrize(
    "name",
    [
        *("window_of_map_size", "with_coordinates", "norm_cumulative"),
        *("deeplab2_pool_window", "panoptic_deeplab_pool_window"),
    ],
)
def test_of_the_zoo(name: str, together: list[int]) -> None:
    case = (HAND_WRITTEN | REBUILT)[name]
    torch.manual_seed(0)
    plain = case.make().double()
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in case.shapes]
    fused = fuse(copy.deepcopy(plain), example_inputs=tuple(x.float() for x in inputs))
    together.clear()
    assert_all_close(train_step(fused, *inputs), train_step(plain, *inputs), **TIGHT)
    assert len(together) == 1
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(*inputs), plain.eval()(*inputs), **TIGHT)
    assert len(together) == 2


LEFT_ALONE = {
    "by_map_size": "its forward decides by the sizes of its maps",
    "rates_of_map_size": "its forward makes numbers of the sizes of its maps",
    "cropped_to_smallest": "its forward takes maps of some sizes alone",
    "stochastic_depth": "its forward decides by the values of its maps",
    "counting": "its forward sets calls",
    "without_gradient": "its forward has a region of its own",
    "training_differs": "its forward computes something else in training mode",
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone(name: str) -> None:
    module = LOOK_ALIKES[name].make()
    before = kinds(module)
    with pytest.warns(UserWarning, match=LEFT_ALONE[name]):
        fuse(module)
    assert kinds(module) == before


def conv_of(rate: int = 2, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, 8, 3, padding=rate, dilation=rate, **settings)


class Derived(nn.Conv2d):
    pass


def test_which_convolutions_are_siblings(together: list[int]) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taken = nn.ModuleList([conv_of(1), conv_of(2), conv_of(3), conv_of(4, bias=False)])
            twice = conv_of()
            wrapped = nn.Conv2d(CHANNELS, 8, 3, padding=2, dilation=2, padding_mode="circular")
            grouped, strided = conv_of(groups=2), conv_of(stride=2)
            derived = Derived(CHANNELS, 8, 3, padding=2, dilation=2)
            weighted = nn.utils.parametrizations.weight_norm(conv_of())
            self.left = nn.ModuleList([twice, wrapped, grouped])
            self.left.extend([strided, derived, weighted])
            self.written, self.other, self.again = conv_of(), conv_of(), conv_of(3)
            self.in_training, self.in_eval = conv_of(), conv_of()

        def forward(self, x: Tensor) -> Tensor:
            ys = [conv(x) for conv in [*self.taken, *self.left]]
            ys += [self.left[0](x), self.again(x), self.again(x), self.other(x), self.other(x + 1)]
            ys.append(self.in_training(x) if self.training else self.in_eval(x))
            ys.append(self.written(x.mul_(2)))
            return sum(y.mean() * int(x.shape[2]) for y in ys)

    plain, fused = (torch.nn.Sequential(Module()) for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    fuse(fused, example_inputs=(torch.randn(2, CHANNELS, 9, 9),))
    found = [m for m in fused.modules() if type(m) is SiblingConv2d]
    assert found == list(fused[0].taken)
    together.clear()
    x = torch.randn(2, CHANNELS, 9, 9)
    torch.testing.assert_close(fused(x.clone()), plain(x.clone()), rtol=1e-4, atol=1e-5)
    assert together == [4]


PARTS = {
    "branches.1.1 has a hook": lambda m: m.branches[1][1].register_forward_hook(print),
    "branches.1.0 has a hook": lambda m: m.branches[1][0].register_full_backward_hook(print),
    "project has its forward replaced": lambda m: setattr(m.project, "forward", m.project.forward),
    "its forward is replaced": lambda m: setattr(m, "forward", m.forward),
}


@pytest.mark.parametrize("reason", PARTS)
def test_what_is_watched_or_patched_is_left_alone(reason: str) -> None:
    module = SizesAsNumbers()
    PARTS[reason](module)
    with pytest.warns(UserWarning, match=reason):
        fuse(module)
    assert SiblingConv2d not in kinds(module)


def test_two_groups(together: list[int]) -> None:
    plain, fused = pair(Flat)
    together.clear()
    torch.testing.assert_close(fused(x := maps()), plain(x), **TIGHT)
    assert together == [2, 2]
    (entry,) = fuse_report(fused)
    assert entry.what == (
        "2 convolutions (rates 2, 3) in one call; 2 convolutions (rates 2, 5) in one call"
    )


def test_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SizesAsNumbers())
    (before,) = fuse_report(model)
    (after,) = fuse_report(fuse(model))
    assert before == after._replace(fused=False)
    assert after.fused
    assert after.reason is None
    assert (after.name, after.kind) == ("0", "sibling_modules:SizesAsNumbers")
    assert after.recognised == "siblings"
    assert after.what == "4 convolutions (rates 1, 2, 3, 6) in one call"
    assert after.left == "its forward makes numbers of the sizes of its maps"
    assert 0 < after.skipped[1] < after.skipped[0] < 1
    assert "siblings" in str(fuse_report(model))


def test_unfuse_and_fuse_again() -> None:
    plain, fused = pair(TwoPyramids)
    objects = list(fused.modules())
    switched = kinds(fused)
    assert switched.count(SiblingConv2d) == 5
    members = [vars(m).get(MEMBER) for m in objects]
    fuse(fused)
    assert members == [vars(m).get(MEMBER) for m in objects]
    assert kinds(fused) == switched
    unfuse(fused)
    assert list(fused.modules()) == objects
    assert kinds(fused) == kinds(plain)
    for mine, theirs in zip(objects, plain.modules(), strict=True):
        assert list(vars(mine)) == list(vars(theirs))
    with torch.no_grad():
        assert torch.equal(fused(x := maps()), plain(x))
    fuse(fused)
    assert kinds(fused) == switched


def test_unfuse_of_a_part() -> None:
    plain, fused = pair()
    unfuse(fused.branches[1])
    with torch.no_grad():
        torch.testing.assert_close(fused(x := maps()), plain(x), **TIGHT)
    assert [e.reason for e in fuse_report(fused)] == [
        "branches.1.0 is a Conv2d, not a SiblingConv2d"
    ]
    fuse(fused)
    assert kinds(fused).count(SiblingConv2d) == 4


def test_unfuse_keeps_a_parametrization() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    plain, fused = pair()
    for module in (plain, fused):
        parametrize.register_parametrization(module.branches[1][0], "weight", Twice())
    with torch.no_grad():
        torch.testing.assert_close(fused(x := maps()), plain(x), **TIGHT)
        unfuse(fused)
        assert torch.equal(fused(x), plain(x))
    parametrize.remove_parametrizations(fused.branches[1][0], "weight")
    assert type(fused.branches[1][0]) is nn.Conv2d


def test_the_switch_for_minimal_filtering(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    plain = siblings.atrous_pyramid

    def telling(*arguments: object, polyphase: bool, **keywords: object) -> Tensor:
        told.append(polyphase)
        return plain(*arguments, polyphase=polyphase, **keywords)

    def says(module: nn.Module) -> bool:
        told.clear()
        module(maps())
        return told == [True]

    _, fused = pair()
    monkeypatch.setattr(siblings, "atrous_pyramid", telling)
    assert says(fused)
    assert not says(fuse(fused, polyphase=False))
    assert not says(fuse(fused))
    assert not says(copy.deepcopy(fused))
    fused.branches[0][0] = copy.deepcopy(fused.branches[0][0])
    assert not says(fuse(fused))  # read anew
    assert says(fuse(copy.deepcopy(fused), polyphase=True))
    assert says(fuse(unfuse(fused)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_the_model(how: str, together: list[int]) -> None:
    plain, fused = pair(TwoPyramids)
    x = maps()
    fused(x)  # a call has left no trace in it
    other = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
    assert kinds(other) == kinds(fused)
    groups = {id(m): m for m in (vars(m).get(MEMBER) for m in other.modules()) if m is not None}
    assert {id(g.siblings) for g in groups.values()}.isdisjoint(
        id(vars(m)[MEMBER].siblings) for m in fused.modules() if MEMBER in vars(m)
    )
    with torch.no_grad():
        for module in (*fused.parameters(),):
            module.zero_()
        together.clear()
        torch.testing.assert_close(other(x), plain(x), **TIGHT)
        assert together == [2, 3]
    assert fuse_report(other)[0].reason is None
    assert kinds(unfuse(other)) == kinds(plain)


def test_copies_of_one_convolution(together: list[int]) -> None:
    plain, fused = pair()
    x = maps()
    conv = fused.branches[1][0]
    together.clear()
    for alone in (copy.deepcopy(conv), copy.copy(conv), pickle.loads(pickle.dumps(conv))):
        assert torch.equal(alone(x), plain.branches[1][0](x))
        assert together == []
    fused(x)
    assert together == [4]
    assert type(unfuse(copy.deepcopy(conv))) is nn.Conv2d


def test_a_model_is_freed_without_a_collector() -> None:
    _, fused = pair()
    fused(maps())
    dead = [weakref.ref(p) for p in fused.parameters()]
    gc.collect()
    gc.disable()
    try:
        del fused
        assert all(ref() is None for ref in dead)
    finally:
        gc.enable()


def test_conversions_and_state() -> None:
    plain, fused = pair()
    x = maps()
    parameters = dict(fused.named_parameters())
    for module in (plain, fused):
        module.float().train().eval()
    assert all(p is parameters[name] for name, p in fused.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(fused(x.float()), plain(x.float()), rtol=1e-4, atol=1e-5)
        other = SizesAsNumbers().double().eval()
        fused.double().load_state_dict(other.state_dict())
        torch.testing.assert_close(fused(x), other(x), **TIGHT)
        plain.load_state_dict(fused.state_dict(), strict=True)
        for module in (plain, fused):
            module.bfloat16()
        low = x.bfloat16()
        torch.testing.assert_close(fused(low), plain(low), rtol=0.05, atol=0.05)


def test_a_model_that_is_changed_is_read_anew(together: list[int]) -> None:
    plain, fused = pair(SharedPointwise)
    for module in (plain, fused):
        torch.manual_seed(1)
        module.branches[0][0] = nn.Conv2d(CHANNELS, 8, 3, padding=4, dilation=4).double()
    together.clear()
    with torch.no_grad():
        torch.testing.assert_close(fused(x := maps()), plain(x), **TIGHT)
    assert fuse_report(fused)[0].reason == "some of its convolutions are gone: fuse it again"
    fuse(fused)
    assert "rates 4, 2, 3" in fuse_report(fused)[0].what
    together.clear()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), **TIGHT)
    assert together == [3]


def test_what_is_in_the_way_may_go_again(together: list[int]) -> None:
    plain, fused = pair()
    handles = [branch[0].register_forward_hook(print) for branch in fused.branches[1:]]
    with pytest.warns(UserWarning, match="branches.1.0 has a hook"):
        fuse(fused)
    assert fuse_report(fused)[0].reason.startswith("branches.1.0 has a hook")
    for handle in handles:
        handle.remove()
    assert fuse_report(fused)[0].reason is None
    together.clear()
    with torch.no_grad():
        fused(x := maps())
        torch.testing.assert_close(fused(x), plain(x), **TIGHT)
    assert together == [4, 4]
    assert kinds(unfuse(fused)) == kinds(plain)


def test_what_the_trial_finds_is_left_alone() -> None:
    class Sly(nn.Module):
        """Writes past the counters of versions between its convolutions."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv_of(2), conv_of(3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x) * int(x.shape[2])
            x.data.mul_(2)
            return a + self.b(x)

    with pytest.warns(UserWarning, match="gives another result 0 in eval mode"):
        fuse(module := Sly())
    assert type(module.a) is nn.Conv2d


def test_a_size_is_all_it_takes() -> None:
    class Fixed(SizesAsNumbers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.ones(33, 35, dtype=x.dtype, device=x.device)

    plain = Fixed().double().eval()
    x = maps(1, CHANNELS, 33, 35)
    fused = fuse(copy.deepcopy(plain), example_inputs=(x.float(),))
    assert [e.recognised for e in fuse_report(fused)] == ["siblings"]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), **TIGHT)
    with pytest.raises(RuntimeError):
        fused(maps())
