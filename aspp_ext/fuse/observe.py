# SPDX-License-Identifier: BSD-3-Clause
"""Which modules of a model may hold a pyramid: those whose convolutions read one and the same map.

A copy without memory runs, on the meta device, and each convolution's input is looked at. That
takes milliseconds and touches neither the model nor its random numbers.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from aspp_ext.modules.constants import leaves
from aspp_ext.modules.head import is_atrous
from aspp_ext.modules.parts import Unfusable
from aspp_ext.modules.reads import Written
from aspp_ext.modules.snapshot import reads

from .apart import replaced

SIZES = (64, 96)  # of made-up maps, which encoders can halve
_NO_FORWARD = nn.Module.forward


def on_meta(module: nn.Module) -> nn.Module:
    """A copy without hooks whose tensors have no memory, those of floating numbers in float32.

    Raises:
        Exception: whatever a part that cannot be copied raises.
    """
    memo: dict[int, Any] = {}
    for m in module.modules():
        for name in _HOOKS & vars(m).keys():  # of anybody's, who would be called for nothing
            memo[id(vars(m)[name])] = OrderedDict()
        for p in m._parameters.values():
            if p is not None and id(p) not in memo:
                memo[id(p)] = nn.Parameter(_on_meta(p), p.requires_grad)
        for b in m._buffers.values():
            if b is not None and id(b) not in memo:
                memo[id(b)] = _on_meta(b)
    twin = own_copy(module, memo)
    if any(isinstance(t, Tensor) and not t.is_meta for t in _held(twin)):
        raise Unfusable("a part of it is copied in a way of its own, not tensor by tensor")
    for m in twin.modules():
        if type(m) is nn.SyncBatchNorm:  # which asks for a GPU where processes have been grouped
            m.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return twin


_OF_TORCH = frozenset(vars(nn.Module()))
_HOOKS = frozenset(name for name in _OF_TORCH if name.endswith("_hooks"))


def _on_meta(t: Tensor) -> Tensor:
    return t.detach().to("meta", torch.float32 if t.is_floating_point() else t.dtype)


def may_be_pyramid(module: nn.Module, apart: Collection[int] = ()) -> bool:
    """Whether at least two of its parts have convolutions of as many channels, one of them atrous,
    and it is not known to be their sequence. Modules of the ids ``apart`` do not count."""
    if not may_hold_pyramid(module):
        return False
    seen: list[set[int]] = []
    atrous = False
    for part in _parts(module):
        found = [f for m in part if id(m) not in apart for f in _convolutions(m)]
        atrous = atrous or any(looks_around for _, looks_around in found)
        seen.append({channels for channels, _ in found})
    return atrous and any(a & b for i, a in enumerate(seen) for b in seen[:i])


def may_hold_pyramid(module: nn.Module) -> bool:
    """Whether it has a forward in which parts may read one map: those of a Sequential do not."""
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        return False
    forward = getattr(type(module), "forward", _NO_FORWARD)
    return forward not in (_NO_FORWARD, nn.Sequential.forward, nn.Conv2d.forward)


def looks_like_pyramid(module: nn.Module) -> bool:
    """Whether two of its parts have atrous convolutions of as many channels, at other rates."""
    seen = [
        {
            (c.in_channels, tuple(c.dilation))
            for c in part
            if isinstance(c, nn.Conv2d) and any(around for _, around in _convolutions(c))
        }
        for part in _parts(module)
    ]
    pairs = ((a, b) for i, one in enumerate(seen) for two in seen[:i] for a in one for b in two)
    return any(a[0] == b[0] and a[1] != b[1] for a, b in pairs)


def has_other_dimensions(module: nn.Module) -> bool:
    """Whether it looks like a pyramid of volumes."""
    seen = [
        {(c.in_channels, tuple(c.dilation)) for c in part if isinstance(c, nn.Conv3d)}
        for part in _parts(module)
    ]
    rates = {rate for some in seen for _, rate in some}
    counts = Counter(channels for some in seen for channels in {c for c, _ in some})
    several = len(rates) > 2 and max(counts.values(), default=0) > 2
    return several and may_hold_pyramid(module)


def _parts(module: nn.Module) -> Iterator[Iterable[nn.Module]]:
    """Its children, those of lists of modules, and parameters of its own."""
    for child in module.children():
        # A ModuleList, or a Sequential, of which some call the parts themselves.
        scripted = isinstance(child, torch.jit.ScriptModule)
        if not scripted and type(child).forward in (_NO_FORWARD, nn.Sequential.forward):
            yield from _parts(child)
        else:
            yield child.modules()
    own = [p for p in module._parameters.values() if p is not None and _is_filter(p)]
    for parameter in own:
        yield [_Bare(parameter)]


def own_copy(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, that has nothing of the original's.

    Raises:
        Unfusable: a part gives itself for a copy; what is done to copies would be done to it.
    """
    twin = copy.deepcopy(module, memo)
    mine, others = ({id(t) for t in _held(m)} for m in (module, twin))
    if mine & others:
        raise Unfusable("a part of it does not let itself be copied")
    return twin


def _held(module: nn.Module) -> Iterator[Any]:
    yield from module.modules()
    for m in module.modules():
        yield from (t for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)


def _is_filter(parameter: nn.Parameter) -> bool:
    return not is_lazy(parameter) and parameter.dim() == 4


def has_bare_weights(module: nn.Module) -> bool:
    """Whether it may convolve by parameters that belong to no ``nn.Conv2d``."""
    others = (m for m in module.modules() if not isinstance(m, nn.modules.conv._ConvNd))
    return any(p is not None and _is_filter(p) for m in others for p in m._parameters.values())


class _Bare(nn.Module):
    """A holder of one parameter."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def _convolutions(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """(input channels, whether it looks around with a rate) of those that keep the map's size."""
    if isinstance(module, nn.Conv2d):
        if tuple(module.stride) == (1, 1):
            yield module.in_channels, is_atrous(module.kernel_size, module.dilation)
    elif not isinstance(module, nn.modules.conv._ConvNd):
        for parameter in module._parameters.values():
            if parameter is not None and _is_filter(parameter):  # at any rate
                yield parameter.shape[1], max(parameter.shape[2:]) > 1


class _Watch(TorchFunctionMode):
    """Notes what each 2-d convolution reads."""

    def __init__(self, module: nn.Module, apart: Collection[int], deep: bool) -> None:
        super().__init__()
        self.apart = apart
        self.part_of = {
            id(p): i
            for i, part in enumerate([[m] for m in module.modules()] if deep else _parts(module))
            for m in part
            for p in m._parameters.values()
            if p is not None and id(p) not in apart
        }
        self.read: list[tuple[Tensor, int, bool]] = []  # input, which part, atrous

    def __torch_function__(
        self, function: Any, kinds: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if function in (F.conv2d, torch.conv2d):
            names = ("input", "weight", "bias", "stride", "padding", "dilation")
            given = dict(zip(names, arguments, strict=False)) | keywords
            x, weight = given.get("input"), given.get("weight")
            stride, dilation = given.get("stride", 1), given.get("dilation", 1)
            # A weight that is computed is of no part, and of another one each time.
            part = self.part_of.get(id(weight), -1 - len(self.read))
            known = isinstance(x, Tensor) and isinstance(weight, Tensor)
            if known and id(weight) not in self.apart and pair(stride) == (1, 1):
                atrous = is_atrous(weight.shape[2:], pair(dilation))
                self.read.append((x, part, atrous))
        return function(*arguments, **keywords)

    def siblings(self) -> int:
        """How many atrous ones, at most, have read one map that another part has read, too."""
        together: dict[int, list[tuple[int, bool]]] = {}
        for x, part, atrous in self.read:
            together.setdefault(id(x), []).append((part, atrous))
        several = [found for found in together.values() if len({part for part, _ in found}) > 1]
        return max((sum(atrous for _, atrous in found) for found in several), default=0)


def pair(value: Any) -> tuple[Any, Any]:
    """Both of a setting that may be one for both axes."""
    first, second = (tuple(value) * 2)[:2] if isinstance(value, (tuple, list)) else (value, value)
    return (first, second)


def siblings(
    twin: nn.Module, arguments: Sequence[Any], apart: Collection[int] = (), *, deep: bool = False
) -> int:
    """How many atrous convolutions read one map, in a run of ``twin`` on the meta device.

    Args:
        twin: a copy on the meta device.
        arguments: of its forward.
        apart: ids of weights whose convolutions do not count.
        deep: whether those in one part of it count, which is a candidate on its own.

    Returns:
        The number, or 0 where no other convolution reads the map.

    Raises:
        Unfusable: they do, but the run leaves traces in the module: a count, a setting.
        Exception: whatever the run raises, where they have not by then.
    """
    watch, left = _Watch(twin, apart, deep), _Left(twin.eval())
    with torch.no_grad(), warnings.catch_warnings(), _assignments(twin) as assigned:
        warnings.simplefilter("ignore")
        try:
            with watch:
                twin(*arguments)
        except Exception:
            if not watch.siblings():
                raise
        if not watch.siblings():
            return 0
        left.check(assigned)
        for training in (False, True):
            left = _Left(twin.train(training))
            assigned.clear()
            with contextlib.suppress(Exception):  # where it cannot train on nothing
                twin(*arguments)
            left.check(assigned)
    return watch.siblings()


class _Left:
    """What a forward may leave behind: in its modules, and in all else that it reads."""

    def __init__(self, twin: nn.Module) -> None:
        self.twin, self.before = twin, _attributes(twin)
        self.reads: Written | None = None
        self.refusal: Unfusable | None = None
        try:
            self.reads = reads(twin)
        except Unfusable as refusal:
            self.refusal = refusal

    def check(self, assigned: Sequence[str]) -> None:
        """Raises Unfusable, naming it."""
        if assigned:
            raise Unfusable(f"its forward sets {assigned[0]}")
        if self.refusal is not None:
            raise self.refusal
        changed = _attributes(self.twin)
        names = [n for n in {**self.before, **changed} if self.before.get(n) != changed.get(n)]
        if self.reads is not None and (name := self.reads.change()) is not None:
            names.append(name)
        if names:
            raise Unfusable(f"its forward changes {names[0]}")


@contextlib.contextmanager
def _assignments(twin: nn.Module) -> Iterator[list[str]]:
    """The names of attributes of its modules that are set meanwhile."""
    names: list[str] = []
    plain, own = nn.Module.__setattr__, set(map(id, twin.modules()))

    def noting(module: nn.Module, name: str, value: Any) -> None:
        if id(module) in own:
            names.append(name)
        plain(module, name, value)

    with replaced(nn.Module, "__setattr__", noting):
        yield names
    own.clear()


def _attributes(twin: nn.Module) -> dict[str, Any]:
    """Of each module what it has, but flags: a forward may fill a list, or count in an object."""
    found: dict[str, Any] = {}
    for path, module in twin.named_modules():
        for key, value in vars(module).items():
            if key != "training":
                name = f"{path}.{key}" if path else key
                if key not in _OF_TORCH and not isinstance(value, nn.Module):
                    found.update((name + inside, leaf) for inside, leaf in leaves(value))
                found[name] = (_looked_at(value), found.get(name))
    return found


def _looked_at(value: Any) -> Any:
    if isinstance(value, random.Random):
        return (type(value), value.getstate())
    if (bits := getattr(value, "bit_generator", None)) is not None:  # numpy's
        return (type(value), repr(bits.state))
    if isinstance(value, dict):
        return (type(value), [(k, id(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return (type(value), [id(v) for v in value])
    return (type(value), id(value))


def made_up(module: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Features that the module may take: one map, of the channels that a convolution reads."""
    convs = (m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
    bare = (c for m in module.modules() for c, _ in _convolutions(m))
    wide = dict.fromkeys([*convs, *bare])
    for channels in wide:
        yield (torch.empty((2, channels, *SIZES), dtype=torch.float32, device="meta"),)


def in_a_line(error: Exception) -> str:
    """The beginning of what somebody's error says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def without_values(error: Exception) -> Unfusable:
    """That a run on the meta device has failed."""
    return Unfusable(
        f"its forward does not run on a made-up map without values ({in_a_line(error)}): "
        "example_inputs may help"
    )


def to_meta(arguments: Any) -> Any:
    """Arguments without their memory, floating numbers in float32."""
    return tree_map(lambda x: _on_meta(x) if isinstance(x, Tensor) else x, arguments)


def arguments_of(model: nn.Module, example_inputs: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """What the modules of ``model`` are called with, by their names, where that is maps by place.

    Raises:
        Exception: whatever a run of a copy on the meta device raises.
    """
    twin = on_meta(model).eval()
    found: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, keywords: Any) -> None:
            if not keywords:
                found.setdefault(name, arguments)

        return hook

    for name, module in twin.named_modules():
        module.register_forward_pre_hook(note(name), with_kwargs=True)
    moved = to_meta(tuple(example_inputs))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin(*moved)
    return found
