# SPDX-License-Identifier: BSD-3-Clause
"""Minimal filtering: the keyword reaches every operator of a call, and what the modules prepare for
it is made once for a size, kept within a budget, and dropped with the folded copy."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from aspp_pairs import CHANNELS, RATES, WIDTH, features
from minimal_bound import choice_of
from test_precision import CALLS, PYRAMIDS, Settings, argument, dense, loss
from torch.library import opcheck

import aspp_ext
from aspp_ext.modules import ASPP, inference, prepared
from aspp_ext.ops import head_composed, polyphase_choice, polyphase_weights
from aspp_ext.ops.family import NATIVE
from aspp_ext.testing import OPS, PROBLEMS, Problem, assert_no_worse_than_torch, oracle_of

each_setting = pytest.mark.parametrize("on", [True, False])
HEAD = OPS["head"]
HEADS = [name for name in OPS if name.startswith("head")]


def settings(call, *arguments) -> list[tuple[str, bool]]:
    with Settings("polyphase") as found:
        call(*arguments)
    assert found.seen
    return found.seen


def operands(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = (torch.randn(s, dtype=dtype) for s in ((1, 2, 3, 4), (2, 2, 3, 3)))
    return x.requires_grad_(), w.requires_grad_()


@each_setting
@pytest.mark.parametrize("call", [name for name in CALLS if name != "composed head"])
def test_it_reaches_every_operator(call, on) -> None:
    seen = settings(CALLS[call], partial(dense, polyphase=on), *operands())
    assert {value for _, value in seen} == {on}, seen
    if call == "second gradients":
        assert {name for name, _ in seen} == set(PYRAMIDS)


@each_setting
@pytest.mark.parametrize("head", [HEAD.native, head_composed.aspp_inference])
def test_it_reaches_the_head(head, on) -> None:
    arguments = HEAD.make(PROBLEMS["aspp"], torch.float32)
    assert {value for _, value in settings(head, *arguments, on)} == {on}
    x, depthwise, weights, rates, *rest = arguments
    pairs = list(zip(rates[::2], rates[1::2], strict=True))
    public = partial(aspp_ext.aspp_inference, polyphase=on)
    seen = settings(public, x, [None] * len(depthwise), weights, pairs, *rest)
    assert seen == [("aspp_inference", on)]


@each_setting
def test_it_reaches_the_layers_of_a_module(on) -> None:
    ours = ASPP(CHANNELS, RATES, WIDTH, polyphase=on)
    x = features().float()
    assert {value for _, value in settings(lambda: ours(x).sum().backward())} == {on}
    with torch.no_grad():
        assert settings(ours.eval(), x) == [("aspp_inference", on)]


@pytest.mark.parametrize("name", [*PYRAMIDS, "aspp_inference"])
def test_direct_operators_filter_unless_told(name) -> None:
    assert (
        argument("polyphase", getattr(torch.ops.aspp_ext, name).default, ())
        == polyphase_choice.BY_COST
    )


@each_setting
def test_a_compiled_gradient_keeps_it(on, fresh_compiler) -> None:
    compiled = torch.compile(
        partial(loss, partial(dense, polyphase=on)), fullgraph=True, backend="aot_eager"
    )
    y = compiled(*operands())
    assert settings(y.backward) == [(name, on) for name in PYRAMIDS[1:]]


@each_setting
def test_an_exported_program_keeps_it(on, fresh_compiler, tmp_path) -> None:
    ours, x = ASPP(CHANNELS, RATES, WIDTH, polyphase=on).eval(), features().float()
    with torch.no_grad():
        torch.export.save(torch.export.export(ours, (x,), strict=True), tmp_path / "head.pt2")
        program = torch.export.load(tmp_path / "head.pt2")
        (node,) = (n for n in program.graph.nodes if "aspp_ext" in str(n.target))
        assert argument("polyphase", node.target, node.args) == on
        assert argument("prepared", node.target, node.args) is None
        torch.testing.assert_close(program.module()(x), ours(x))


@pytest.mark.parametrize("problem", ["aspp", "many_triples", "rates_per_axis"])
@pytest.mark.parametrize("policy", ["1", "always"])
@pytest.mark.parametrize("name", HEADS)
def test_what_is_prepared_changes_no_more_than_the_form(name, policy, problem, monkeypatch) -> None:
    """Matrices that need not be made cost less, so that a branch may take another form."""
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", policy)
    op, problem = OPS[name], PROBLEMS[problem]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        arguments = op.make(problem, dtype)
        x, _, weights, rates, *_ = arguments
        h, w = x.shape[2:]
        pairs = list(zip(rates[::2], rates[1::2], strict=True))
        prepared = polyphase_weights(weights, pairs, h, w)
        assert len(prepared) == len(weights)
        assert all(
            p.numel() == 0 for p, w in zip(prepared, weights, strict=True) if w[0, 0].numel() == 1
        )
        operator, wish = op.operator(NATIVE), polyphase_choice.policy()
        given = (*arguments[:9], wish, prepared, *arguments[11:])
        got, made = operator(*given), operator(*given[:10], None, *given[11:])
        filtered = any(p.numel() for p in prepared)
        bfloat16_products = dtype == torch.bfloat16 and not filtered  # direct either way
        if bfloat16_products or same_forms(problem, policy):
            assert torch.equal(got, made)
        elif dtype == torch.float64:
            torch.testing.assert_close(got, made, rtol=1e-12, atol=1e-12)
        else:
            (exact,) = oracle_of(op, arguments)
            assert_no_worse_than_torch(got, op.expected(*arguments), exact)
        tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
        opcheck(operator.default, given, test_utils=tests)


def same_forms(problem: Problem, policy: str) -> bool:
    """Whether every branch takes the same form with what is prepared and without."""

    def forms(prepared: bool) -> list[str]:
        choices = [choice_of(problem, b, prepared) for b in range(len(problem.branches))]
        return [repr(c.form) for c in choices if c.is_polyphase or policy == "always"]

    return forms(True) == forms(False)


def test_forms_differ_in_some_of_these_problems_and_not_in_others() -> None:
    same = {name: same_forms(PROBLEMS[name], "always") for name in ("aspp", "many_triples")}
    assert same == {"aspp": False, "many_triples": True}


def test_autocast_leaves_alone_what_is_prepared(monkeypatch) -> None:
    """Its dtype is the kernel's choice, and no function of the autocast dtype."""
    x, _, weights, rates, *rest = HEAD.make(PROBLEMS["aspp"], torch.float32)
    none, pairs = [None] * len(weights), list(zip(rates[::2], rates[1::2], strict=True))
    prepared = [torch.ones(0) for _ in weights]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Settings("prepared") as found:
        aspp_ext.aspp_inference(x, none, weights, pairs, *rest, prepared=prepared)
    ((_, given),) = found.seen
    assert [p.dtype for p in given] == [torch.float32] * len(weights)


def test_preparing_is_not_differentiated_and_not_traced() -> None:
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="computes no gradients but a weight requires"):
        polyphase_weights([w], [2], 9, 9)
    with torch.no_grad():
        assert len(polyphase_weights([w], [2], 9, 9)) == 1
    chosen = pytest.raises(NotImplementedError, match="the kernel chooses the shapes")
    with torch._subclasses.fake_tensor.FakeTensorMode(), chosen:
        polyphase_weights([torch.empty(4, 3, 3, 3)], [2], 9, 9)


class Spy:
    """The sizes that were prepared, and what the folded operator got."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.made: list[list[torch.Tensor]] = []
        self.given: list[list[torch.Tensor] | None] = []
        self.bytes = 0  # of a size's weights
        real = inference.aspp_inference

        def prepare(weights, rates, *size, polyphase):
            self.sizes.append(size)
            self.made.append([w.new_empty(self.bytes // w.itemsize) for w in weights[:1]])
            return self.made[-1]

        def infer(*arguments, prepared, **keywords):
            self.given.append(prepared)
            return real(*arguments, **keywords)

        monkeypatch.setattr(prepared, "polyphase_weights", prepare)
        monkeypatch.setattr(inference, "aspp_inference", infer)


@pytest.fixture
def spy(monkeypatch) -> Spy:
    return Spy(monkeypatch)


@pytest.fixture
def ours() -> Iterator[ASPP]:
    with torch.no_grad():
        yield ASPP(CHANNELS, RATES, WIDTH).double().eval()


def test_weights_are_prepared_once_for_a_size(ours, spy) -> None:
    for height in (7, 7, 5, 7, 5):
        ours(features(height=height))
    assert spy.sizes == [(7, 9), (5, 9)]
    first, second = spy.made
    for given, made in zip(spy.given, (first, first, second, first, second), strict=True):
        assert given is made


def heights_prepared(ours, spy, heights) -> list[int]:
    for height in heights:
        ours(features(height=height))
    return [height for height, _ in spy.sizes]


def test_sizes_are_kept_within_the_budget(ours, spy, monkeypatch) -> None:
    spy.bytes = 1024
    monkeypatch.setattr(prepared, "BUDGET", 4 * 1024 + 1000)
    assert heights_prepared(ours, spy, [3, 4, 5, 6, 7, 8] * 3) == [3, 4, 5, 6]
    # The others make their weights within the call.
    assert [given is None for given in spy.given] == [False] * 4 + [True] * 2 + (
        [False] * 4 + [True] * 2
    ) * 2


def test_a_size_that_turns_out_too_large_is_not_kept(ours, spy, monkeypatch) -> None:
    monkeypatch.setattr(prepared, "BUDGET", 5000)
    for height, spy.bytes in ((3, 1024), (4, 1024), (5, 8192), (6, 1024)):
        ours(features(height=height))
    ours(features(height=5))
    assert [height for height, _ in spy.sizes] == [3, 4, 5, 6]
    assert max(m[0].nbytes for m in ours._aspp_ext_folded.prepared._kept.values()) == 1024


def test_a_size_that_is_too_large_pushes_none_out(ours, spy, monkeypatch) -> None:
    monkeypatch.setattr(prepared, "BUDGET", 5000)
    monkeypatch.setattr(prepared, "STALE", 1)
    for height, spy.bytes in ((3, 1024), (4, 1024), (5, 1024), (9, 8192), *[(9, 8192)] * 4):
        ours(features(height=height))
    assert [size[0] for size in ours._aspp_ext_folded.prepared._kept] == [3, 4, 5]


def test_two_sizes_are_kept_whatever_they_take(ours, spy, monkeypatch) -> None:
    spy.bytes = 1024
    monkeypatch.setattr(prepared, "BUDGET", 1000)
    assert heights_prepared(ours, spy, [3, 4, 5] * 3) == [3, 4]


def test_a_size_that_stays_takes_the_place_of_one_that_went(ours, spy, monkeypatch) -> None:
    spy.bytes = 1024
    monkeypatch.setattr(prepared, "BUDGET", 1000)
    monkeypatch.setattr(prepared, "STALE", 5)
    assert heights_prepared(ours, spy, [3, 4] + [5, 4] * 4) == [3, 4, 5]
    assert spy.given[-1] is spy.made[1]
    assert spy.given[-2] is spy.made[2]


def test_sizes_that_never_come_again_push_none_out(ours, spy, monkeypatch) -> None:
    spy.bytes = 1024
    monkeypatch.setattr(prepared, "BUDGET", 1000)
    monkeypatch.setattr(prepared, "STALE", 2)
    assert heights_prepared(ours, spy, range(3, 30)) == [3, 4]


def test_what_is_prepared_serves_any_batch(ours, spy) -> None:
    for n in (1, 3, 2):
        ours(features(n))
    assert len(spy.sizes) == 1


def test_what_is_prepared_goes_with_the_folded_copy(ours, spy) -> None:
    ours(features())
    ours.convs[1][0].weight.mul_(2)
    ours(features())
    assert len(spy.sizes) == 2
    assert spy.given[1] is spy.made[1]
    made = weakref.ref(spy.made[1][0])
    spy.made.clear()
    spy.given.clear()
    gc.disable()
    try:
        ours.drop_folded()
        assert made() is None  # without a collection: no cycle holds it
    finally:
        gc.enable()


def test_copies_and_pickles_prepare_their_own(ours, spy) -> None:
    ours.polyphase = False
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    ours.polyphase = True
    ours(features())
    twins += [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    assert [t.polyphase for t in twins] == [False, False, True, True]
    for twin in twins:
        twin(features())
    assert len(spy.sizes) == 3


def test_nothing_is_prepared_where_it_is_of_no_use(ours, spy, fresh_compiler) -> None:
    x = features()
    with Settings("prepared"):  # as any mode that records
        ours(x)
    torch.compile(ours, backend="aot_eager")(x)
    torch.export.export(ours, (x,), strict=False)
    ours.polyphase = False
    ours(x)
    assert spy.sizes == []
    assert spy.given
    assert all(given is None for given in spy.given)


def test_prepared_in_inference_mode_they_serve_outside(ours, monkeypatch) -> None:
    made = []
    real = prepared.polyphase_weights

    def spy(*arguments, **keywords):
        made.append(real(*arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(prepared, "polyphase_weights", spy)
    with torch.inference_mode():
        expected = ours(features())
    assert torch.equal(ours(features()), expected)
    assert len(made) == 1
    assert not any(t.is_inference() for t in made[0])
