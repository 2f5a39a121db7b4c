# SPDX-License-Identifier: BSD-3-Clause
"""A folded copy never outlives the parameters and buffers that it was made of.

Whoever writes to them and however: the version counter, the address and the object may all be what
they were.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from aspp_pairs import CHANNELS, PAIRS, RATES, TIGHT, WIDTH, Pair, features
from torch import Tensor, nn

import aspp_ext
from aspp_ext.modules import ASPP, fold_cache, freeze, fused
from aspp_ext.modules.fold_cache import sources
from aspp_ext.ops.checksums import checksums


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def block(conv: nn.Conv2d) -> tuple[slice, ...]:
    """Off the diagonal, as a structured pruner would zero it."""
    return (slice(0, 3), slice(-1, None))


def through_data(conv: nn.Conv2d) -> None:
    conv.weight.data[block(conv)] *= 0


def through_numpy(conv: nn.Conv2d) -> None:
    conv.weight.detach().numpy()[block(conv)] = 0


def through_dlpack(conv: nn.Conv2d) -> None:
    torch.from_dlpack(conv.weight.detach())[block(conv)] = 0


def through_an_alias(conv: nn.Conv2d) -> None:
    torch.tensor([], dtype=conv.weight.dtype).set_(conv.weight.data)[block(conv)] = 0


def by_another_process(conv: nn.Conv2d) -> None:
    context = multiprocessing.get_context("fork")
    child = context.Process(target=through_numpy, args=(conv,))
    child.start()
    child.join()
    assert child.exitcode == 0


def transposed(conv: nn.Conv2d) -> None:
    conv.weight.data = conv.weight.data.transpose(2, 3)


def expanded(conv: nn.Conv2d) -> None:
    conv.weight.data = conv.weight.data[:1].expand_as(conv.weight)


def swapped(conv: nn.Conv2d) -> None:
    conv.weight.data.copy_(conv.weight.data.flip(0))


WRITES = (
    through_data,
    through_numpy,
    through_dlpack,
    through_an_alias,
    by_another_process,
    transposed,
    expanded,
    swapped,
)


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


def convs(module: nn.Module) -> list[nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_that_no_counter_counts(pair: Pair, write: Callable, layout) -> None:
    original, ours = (m.eval().to(memory_format=layout) for m in pair.build())
    if write is by_another_process:
        ours.share_memory()
    x = features()
    for theirs, own in zip(convs(original), convs(ours), strict=True):
        ours(x)
        own.weight.data.add_(0)  # so that the copy is made of what is there
        before = ours(x)
        version = own.weight._version
        write(own)
        theirs.weight.copy_(own.weight)
        assert own.weight._version == version
        torch.testing.assert_close(ours(x), original(x), **TIGHT)
        if own.kernel_size != (1, 1) and write not in (transposed, expanded):
            assert not torch.equal(ours(x), before)


def rows(conv: nn.Conv2d) -> tuple[slice, ...]:
    return (slice(None), slice(100, 200))


def columns(conv: nn.Conv2d) -> tuple[slice, ...]:
    return (slice(None), slice(-256, None))


@pytest.mark.parametrize("part", [rows, columns, block], ids=lambda part: part.__name__)
@pytest.mark.parametrize("separable", [False, True])
def test_blocks_of_large_weights(separable: bool, part: Callable) -> None:
    ours = ASPP(256, [2, 3], separable=separable).eval()
    x = torch.randn(1, 256, 5, 5)
    for conv in convs(ours):
        ours(x)
        conv.weight.data[part(conv)] *= 0
        assert torch.equal(ours(x), copy.deepcopy(ours)(x))


def test_every_byte_of_every_source_counts() -> None:
    ours = ASPP(5, [2], 3, separable=True).eval()
    tensors = sources(ours.read(ours))
    before = checksums(tensors)
    for index, tensor in enumerate(tensors):
        values = tensor.detach().reshape(-1).numpy().view("uint8")
        for at in range(values.size):
            values[at] ^= 1
            changed = checksums(tensors) != before
            assert changed.nonzero().flatten().tolist() == [index]
            values[at] ^= 1
    assert torch.equal(checksums(tensors), before)


@pytest.mark.parametrize("count", [1, 31, 1 << 16, (1 << 16) + 1, 300_001])
def test_long_tensors_count_to_the_last_byte(count: int) -> None:
    x = torch.randint(-128, 128, (count,), dtype=torch.int8)
    before = checksums([x])
    for at in {0, count // 2, count - 1, min(count - 1, 262_143), min(count - 1, 262_144)}:
        x[at] ^= 1
        assert checksums([x]) != before
        x[at] ^= 1
    assert checksums([x]) == before
    if count > 4:
        x[: count // 2 * 2] = x[: count // 2 * 2].view(2, -1).flip(0).flatten()
        assert checksums([x]) != before


@pytest.mark.settings("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_two_changes_do_not_undo_each_other(dtype) -> None:
    """The same change of any two elements, as of signs."""
    torch.manual_seed(0)
    x = torch.randn(200).to(dtype)
    pairs = [(i, j) for i in range(200) for j in range(i)]
    flipped = x.repeat(len(pairs), 1)
    rows = torch.arange(len(pairs))
    for side in (0, 1):
        flipped[rows, [pair[side] for pair in pairs]] *= -1
    sums = checksums([x, *flipped])
    assert len(set(sums.tolist())) == len(pairs) + 1


EDITS = [-1, 2, 4, 0.5, 0.25, -2, 0, 1 + 2**-7]


@pytest.mark.settings("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_unlike_changes_do_not_undo_each_other(dtype) -> None:
    """Of elements in one place of the vectors, some steps apart, and of neighbours."""
    torch.manual_seed(0)
    bytes_each = dtype.itemsize
    x = torch.randn(2048 // bytes_each).to(dtype)
    pairs = [
        (i, i + apart // bytes_each, a, b)
        for i in torch.randperm(len(x) // 2)[:24].tolist()
        for apart in (bytes_each, 8, 16, 32, 64, 128, 256, 512, 1024)
        for a in EDITS
        for b in EDITS
    ]
    edited = x.repeat(len(pairs), 1)
    for row, (i, j, a, b) in zip(edited, pairs, strict=True):
        row[i] *= a
        row[j] *= b
    sums = checksums([x, *edited])
    assert (
        len(set(sums.tolist()))
        == len({row.view(torch.uint8).numpy().tobytes() for row in edited}) + 1
    )


@pytest.mark.settings("isa")
def test_a_value_that_moves_is_seen() -> None:
    x = torch.zeros(4096, dtype=torch.int32)
    sums = []
    for at in range(0, 4096, 3):
        x[at] = 1
        sums.append(checksums([x]).item())
        x[at] = 0
    assert len(set(sums)) == len(sums)


def test_checksums_know_shapes_strides_and_dtypes() -> None:
    x = torch.zeros(4, 6)
    views = [x, x.view(6, 4), x.view(torch.int32), x[:2], x.t(), x[:, ::2], x.view(-1), x[:0]]
    sums = checksums(views)
    assert len(set(sums.tolist())) == len(views)
    assert torch.equal(sums, checksums(views))


@pytest.mark.settings("threads")
def test_checksums_do_not_depend_on_the_threads() -> None:
    x = torch.randn(700_001)
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sums.append(checksums([x, x[5:], x.view(1, -1)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*sums)


def test_depthwise_filters_under_autocast() -> None:
    """Filters that no diagonal meets, in another dtype than the parameters'."""
    ours = ASPP(1024, [2], 8, separable=True).eval()
    x = torch.randn(1, 1024, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        ours(x)
        ours.convs[1][0][0].weight.data[[9, 19]] = 0
        fresh = copy.deepcopy(ours)
        assert torch.equal(ours(x), fresh(x))


def test_assigned_parameters_free_the_old_ones(pair: Pair) -> None:
    original, ours = (m.eval() for m in pair.build())
    ours(features())
    old = [weakref.ref(p) for p in ours.parameters()]
    gc.disable()
    try:
        ours.load_state_dict(pair.build(seed=1)[0].state_dict(), assign=True)
        assert all(p() is None for p in old)
        ours(features())
        old = [weakref.ref(conv.weight) for conv in convs(ours)]
        for conv in convs(ours):
            conv.weight = nn.Parameter(conv.weight.detach().clone())
        assert all(p() is None for p in old)  # nor does the copy hold what was replaced by hand
    finally:
        gc.enable()
    original.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(features()), original(features()), **TIGHT)


@pytest.mark.parametrize("every", [False, True], ids=["one", "all"])
def test_only_running_var_missing_is_said_as_pytorch_says_it(pair: Pair, every) -> None:
    original, ours = (m.eval() for m in pair.build())
    sentences = []
    for module in (original, ours):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms if every else norms[:1]:
            norm.running_var = None
        with pytest.raises(RuntimeError) as refusal:
            module(features())
        sentences.append(str(refusal.value))
    assert sentences[0] == sentences[1] != ""


def test_the_evidence_is_of_what_was_folded(pair: Pair, monkeypatch) -> None:
    """A write between evidence and fold, as another thread's, must show."""
    original, ours = (m.eval() for m in pair.build())
    real = fold_cache.fold

    def interrupted(head, dtype):
        folded = real(head, dtype)
        monkeypatch.setattr(fold_cache, "fold", real)
        ours.convs[0][0].weight.data.mul_(2)
        return folded

    monkeypatch.setattr(fold_cache, "fold", interrupted)
    ours(features())
    original.convs[0][0].weight.mul_(2)
    torch.testing.assert_close(ours(features()), original(features()), **TIGHT)


@pytest.fixture
def folds(monkeypatch) -> list:
    made = []
    for module in (fold_cache, fused):
        real = module.fold
        monkeypatch.setattr(module, "fold", lambda *a, real=real: made.append(a) or real(*a))
    return made


def test_what_cannot_be_read_cheaply_is_folded_in_each_call(pair: Pair, folds, monkeypatch) -> None:
    """As on a GPU, where an answer would make the host wait."""
    original, ours = (m.eval() for m in pair.build())
    monkeypatch.setattr(fold_cache, "can_keep", lambda head, frozen: False)
    monkeypatch.setattr(fused, "can_keep", lambda head, frozen: False)
    for factor in (1.0, 1.5):
        for module in (original, ours):
            module.convs[0][0].weight.data.mul_(factor)
        torch.testing.assert_close(ours(features()), original(features()), **TIGHT)
    assert len(folds) == 2


def test_frozen_nothing_is_looked_at(pair: Pair, folds, monkeypatch) -> None:
    _, ours = pair.build()
    assert aspp_ext.freeze(nn.Sequential(ours.eval()))[0] is ours
    expected = ours(features())
    monkeypatch.setattr(type(ours), "read", None)
    monkeypatch.setattr(fold_cache, "checksums", None)
    for conv in convs(ours):
        conv.weight.data.zero_()
    assert torch.equal(ours(features()), expected)
    assert len(folds) == 1
    with pytest.raises(ValueError, match=r"x must be \[N"):
        ours(features()[0])


@pytest.mark.parametrize(
    "tell",
    [
        lambda m: m.train().eval(),
        lambda m: nn.Sequential(m).eval(),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: nn.Sequential(m).load_state_dict(
            {f"0.{k}": v for k, v in m.state_dict().items()}
        ),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: aspp_ext.freeze(m),
        lambda m: aspp_ext.unfreeze(m),
    ],
    ids=["train", "parent", "load", "load a parent", "to", "freeze", "unfreeze"],
)
def test_frozen_until_told(pair: Pair, tell) -> None:
    original, ours = (m.eval() for m in pair.build())
    aspp_ext.freeze(ours)
    ours(features())
    for module in (original, ours):
        module.convs[0][0].weight.mul_(1.5)
    tell(ours)
    torch.testing.assert_close(ours(features()), original(features()), **TIGHT)


def test_a_frozen_module_trains_and_copies_as_before(pair: Pair) -> None:
    original, ours = pair.build()
    aspp_ext.freeze(ours)
    with torch.enable_grad():
        x = features().requires_grad_()
        for module in (original, ours):
            module.project[3].p = 0
        torch.testing.assert_close(ours(x), original(x), **TIGHT)
        for module in (original, ours):
            module.eval()
        results = [m(x) for m in (ours, original)]
        torch.testing.assert_close(*results, **TIGHT)
        torch.testing.assert_close(*[torch.autograd.grad(r.sum(), x) for r in results], **TIGHT)
    ours(features())
    twin = copy.deepcopy(ours)
    twin.convs[0][0].weight.zero_()  # a copy of its own, as long as it has made none
    original.convs[0][0].weight.zero_()
    torch.testing.assert_close(twin(features()), original(features()), **TIGHT)


def test_a_frozen_copy_stays_on_its_device(pair: Pair) -> None:
    """As DataParallel copies modules: everything they hold, then other parameters."""
    _, ours = pair.build()
    freeze(ours.eval())
    ours(features())
    replica = ours._replicate_for_data_parallel()
    replica.convs, replica.project = (
        copy.deepcopy(m).to("meta") for m in (ours.convs, ours.project)
    )
    assert replica(features().to("meta")).device.type == "meta"


def test_an_attribute_of_the_users_is_no_promise() -> None:
    original, ours = (m.eval() for m in PAIRS["fused torchvision"].build())
    ours.frozen = True
    ours(features())
    for module in (original, ours):
        module.convs[0][0].weight.data.mul_(1.5)
    torch.testing.assert_close(ours(features()), original(features()), **TIGHT)
    assert aspp_ext.unfuse(ours).frozen is True


def test_what_freeze_says() -> None:
    with pytest.raises(TypeError, match=r"^freeze: model must be a torch.nn.Module, got NoneType"):
        aspp_ext.freeze(None)
    expected = r"^unfreeze: expected at least one fused ASPP .* found none in Linear$"
    with pytest.raises(ValueError, match=expected):
        aspp_ext.unfreeze(nn.Linear(2, 2))


def test_inference_tensors_are_kept_too(folds) -> None:
    with torch.inference_mode():
        ours = ASPP(CHANNELS, RATES, WIDTH).double().eval()
        for _ in range(2):
            ours(features())
        assert len(folds) == 1
        ours.convs[0][0].weight.mul_(2)
        assert isinstance(ours(features()), Tensor)
    assert len(folds) == 2
