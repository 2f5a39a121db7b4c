# SPDX-License-Identifier: BSD-3-Clause
"""Convolutions of one map in a forward that nobody can read: the first of them computes for all.

The module's own Python stays as it is, and calls its convolutions one by one. The first that is
called with a map computes the group by one :func:`aspp_ext.atrous_pyramid` and keeps the others'
results for them. Each takes its own where it would compute just that: for the same map, with the
parameters and settings that were used. Else it computes alone, as it does wherever somebody looks
at the graph or gives operators another meaning.

To autograd each is a convolution by itself, with a node of its own: branches that are skipped, or
that no loss reads, have no gradients rather than zeros.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from aspp_ext import _native
from aspp_ext.dispatch import Problem, select
from aspp_ext.ops import atrous_pyramid
from aspp_ext.ops.checksums import checksums
from aspp_ext.ops.family import NATIVE, TRITON
from aspp_ext.ops.formats import is_channels_last, memory_format
from aspp_ext.ops.polyphase_choice import policy
from aspp_ext.ops.precision import allows_tf32
from aspp_ext.ops.pyramid import AtrousPyramid
from aspp_ext.ops.registration import is_autocast_on, under_autocast

from .fused import forward_like, needs_plain_operators
from .parts import Unfusable, check_calls, check_classes, check_conv, dense_conv
from .tracing import in_forward_mode, is_transformed, may_be_traced

MEMBER = "_aspp_ext_member"
"""Of a convolution: its :class:`Member`."""


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class SiblingConv2d(nn.Conv2d):
    """A convolution that computes together with its siblings, of which its instance knows.

    An ``nn.Conv2d`` becomes one by assigning ``__class__``, and stays the same object with the same
    parameters, keys and hooks.
    """

    original: ClassVar[type[nn.Module]] = nn.Conv2d

    def fused_forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """The convolution of ``[N, C, H, W]``."""
        if len(arguments) == 1 and not keywords and not torch.compiler.is_compiling():
            member: Member | None = self.__dict__.get(MEMBER)
            if member is not None and (y := member.siblings.take(self, arguments[0])) is not None:
                return y
        return super().forward(*arguments, **keywords)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if (member := self.__dict__.get(MEMBER)) is not None:
            member.siblings.enter(member.place, self)


SiblingConv2d.forward = forward_like(nn.Conv2d)  # type: ignore[method-assign]


class Member(NamedTuple):
    """A convolution's place in its group."""

    siblings: Siblings
    place: int


class _Given(NamedTuple):
    """What a convolution would compute with."""

    weight: Tensor
    bias: Tensor | None
    rate: tuple[int, int]
    stamps: tuple[Any, ...]  # of the two

    def is_as(self, other: _Given) -> bool:
        """Whether that is the same: the same tensors, unchanged."""
        same = self.weight is other.weight and self.bias is other.bias
        return same and (self.rate, self.stamps) == (other.rate, other.stamps)


class _Part(NamedTuple):
    """A result that waits for its convolution, and of what and how it was computed."""

    given: _Given
    value: Tensor
    how: tuple[Any, ...]  # of its gradients: TF32, minimal filtering, family


class _Round:
    """The calls with one map, in one thread."""

    def __init__(self, x: Tensor, seen: tuple[Any, ...]) -> None:
        self.seen = seen  # of the map, and of modes
        self.came: set[int] = set()
        self.parts: dict[int, _Part] = {}
        parts = self.parts
        # In the map's last moment: what nobody can ask for any more is not kept.
        self.x = weakref.ref(x, lambda _: parts.clear())

    def is_of(self, x: Tensor, seen: tuple[Any, ...]) -> bool:
        """Whether nothing has changed since it began."""
        return self.x() is x and self.seen == seen


class Siblings:
    """A group of convolutions, which it knows by weak references: a model needs no collector to be
    freed, and a copy of a convolution, or a replica of ``DataParallel``'s, is not mistaken for it.

    Which are computed together follows from the calls. At first they are all. From then on those
    are that came with the last map, and only one of them begins: where control flow leaves out some
    that had come, their results are computed for nothing once.

    Attributes:
        size: how many there are.
        polyphase: as in :func:`aspp_ext.atrous_pyramid`.
    """

    def __init__(self, size: int) -> None:
        self.size, self.polyphase = size, True
        self._forget()

    def _forget(self) -> None:
        self._members: list[weakref.ref[nn.Module] | None] = [None] * self.size
        self._last: frozenset[int] = frozenset(range(self.size))
        self._local = threading.local()  # two threads may run the same model

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "polyphase": self.polyphase}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()  # copies of the convolutions enter when they have their own state

    def enter(self, place: int, conv: nn.Module) -> None:
        """Make ``conv`` the member of that place, if no other is."""
        if self.member(place) is None:
            self._members[place] = weakref.ref(conv)

    def member(self, place: int) -> nn.Module | None:
        """The convolution of a place, if it is still there."""
        found = self._members[place]
        return None if found is None else found()

    def members(self) -> list[nn.Module]:
        """Those that are there."""
        found = (self.member(place) for place in range(self.size))
        return [conv for conv in found if conv is not None]

    def take(self, conv: SiblingConv2d, x: Any) -> Tensor | None:
        """The convolution of x, computed with its siblings' or by one of them; None: it is to be
        computed alone."""
        place = conv.__dict__[MEMBER].place
        if self.member(place) is not conv or _is_watched(x) or not _is_map(x):
            return None
        try:
            check_calls()
            check_classes(nn.Conv2d)
            given, seen = read(conv, x), _seen(x)
        except Unfusable:
            return None
        now: _Round | None = getattr(self._local, "round", None)
        if now is None or place in now.came or not now.is_of(x, seen):
            now = self._begin(now, place, x, seen)
        now.came.add(place)
        part = now.parts.pop(place, None)
        return None if part is None or not part.given.is_as(given) else _handed_out(part, x)

    def _begin(self, last: _Round | None, place: int, x: Tensor, seen: tuple[Any, ...]) -> _Round:
        if last is not None:
            last.parts.clear()
            self._last = frozenset(last.came)
        self._local.round = now = _Round(x, seen)
        if place in self._last:
            now.parts.update(self._compute(sorted(self._last), x))
        return now

    def _compute(self, places: Sequence[int], x: Tensor) -> dict[int, _Part]:
        """The parts of those that can be computed together, if there are two."""
        given: dict[int, _Given] = {}
        for place in places:
            try:
                given[place] = read(self.member(place), x)
            except Unfusable:
                continue
        if len(given) < 2:
            return {}
        values, how = _together(list(given.values()), x, self.polyphase)
        return {
            place: _Part(given[place], value, how)
            for place, value in zip(given, values, strict=False)  # none where it is not worth it
        }


def read(conv: nn.Module | None, x: Tensor | None = None, at: str = "it") -> _Given:
    """What ``conv``, which is called ``at``, computes with; of x where there is one.

    Raises:
        Unfusable: it has to compute alone; why.
    """
    if conv is None:
        raise Unfusable(f"{at} is gone")
    conv = dense_conv(conv, at, SiblingConv2d)
    # Sharded models put views of what is not there in the parameters' place.
    weight, bias = (conv._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or weight is not conv.weight or bias is not conv.bias:
        raise Unfusable(f"the weight or bias of {at} is no parameter")
    check_conv(conv, weight.dtype)
    rate_h, rate_w = conv.dilation
    tensors: list[Tensor] = [weight] if bias is None else [weight, bias]
    if not weight.untyped_storage().nbytes():
        raise Unfusable(f"the weight of {at} is not there")
    if x is not None:
        if x.shape[1] != conv.in_channels or any(t.device != x.device for t in tensors):
            raise Unfusable(f"{at} does not take such maps")
        dtype = _dtype_in(weight, x)
        if dtype != _dtype_in(x, x) or dtype not in _DTYPES:
            raise Unfusable(f"{at} does not take maps of such a dtype")
    return _Given(weight, bias, (rate_h, rate_w), tuple(map(_stamp, tensors)))


def _dtype_in(t: Tensor, x: Tensor) -> torch.dtype:
    """What it is computed in, beside x."""
    if t.is_floating_point() and t.dtype != torch.float64 and is_autocast_on(x):
        return torch.get_autocast_dtype(x.device.type)
    return t.dtype


def _is_watched(x: Any) -> bool:
    """Whether somebody records the call, or gives operators another meaning."""
    if type(x) not in (Tensor, nn.Parameter) or needs_plain_operators() or may_be_traced():
        return True
    return in_forward_mode() or is_transformed(x)


def _is_map(x: Tensor) -> bool:
    """Whether it is ``[N, C, H, W]``, with values, where there are kernels."""
    if x.layout is not torch.strided or x.device.type not in ("cpu", "cuda"):
        return False
    return x.dim() == 4 and x.numel() > 0


def _stamp(t: Tensor) -> tuple[Any, ...]:
    """What changes where the tensor is written to."""
    if not t.is_inference():
        return t.data_ptr(), t._version
    # No version is counted of it. On the CPU its bytes are read, at the speed of memory; elsewhere
    # the host would have to wait for the answer.
    if t.device.type != "cpu" or _native.cpu_missing is not None:
        raise Unfusable("it may have been written to")
    return t.data_ptr(), int(checksums([t]))


def _seen(x: Tensor) -> tuple[Any, ...]:
    """Of the map, and of the modes that a convolution's result depends on."""
    cast = torch.get_autocast_dtype(x.device.type) if is_autocast_on(x) else None
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return (*_stamp(x), *modes, cast, stream, allows_tf32(x))


def _together(
    given: Sequence[_Given], x: Tensor, polyphase: bool
) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Each one's result, and how it was computed; none where PyTorch's convolutions compute."""
    ways = [is_channels_last(x) or is_channels_last(g.weight) for g in given]
    cast, *weights = under_autocast(x, *(g.weight for g in given))
    biases = under_autocast(x, *(g.bias for g in given))[1:]
    # Here, where it shows whether there will be gradients.
    kind = select(Problem("atrous_pyramid", cast, tuple(weights))).name
    if kind == "reference":
        return [], ()
    widths = [w.shape[0] for w in weights]
    with torch.no_grad():
        bias = None
        if any(b is not None for b in biases):
            zero = weights[0].new_zeros
            pairs = zip(biases, widths, strict=True)
            bias = torch.cat([zero(n) if b is None else b for b, n in pairs])
        rates = [g.rate for g in given]
        y = atrous_pyramid(cast, weights, rates, bias=bias, backend=kind, polyphase=polyphase)
        split = zip(y.split(widths, 1), ways, strict=True)
        # Copies: what follows writes over its map, and one map must not keep the others' memory.
        values = [p.clone(memory_format=memory_format(last)) for p, last in split]
    family = TRITON if kind == "triton" else NATIVE
    return values, (allows_tf32(cast), policy(polyphase), family)


def _handed_out(part: _Part, x: Tensor) -> Tensor:
    """The part's value, of which autograd knows what it is the convolution of."""
    weight, bias, rate, _ = part.given
    leaves = [t for t in (x, weight, bias) if t is not None]
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in leaves)):
        return part.value
    x, weight, bias = under_autocast(x, weight, bias)
    return _Convolved.apply([part.value], (list(rate), *part.how), bias, x, weight)


class _Convolved(torch.autograd.Function):
    """``apply([value], (rates, tf32, polyphase, family), bias, x, weight)``: value, which is known
    to be that convolution's."""

    @staticmethod
    def forward(ctx: Any, value: list[Tensor], how: tuple[Any, ...], *tensors: Any) -> Tensor:
        ctx.rates, ctx.tf32, ctx.polyphase, ctx.family = how
        _, x, weight = tensors
        ctx.save_for_backward(x, weight)
        return value[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *_, grad_x, grad_weight = AtrousPyramid.backward(ctx, grad)
        grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return None, None, grad_bias, grad_x, grad_weight


class Grouping(NamedTuple):
    """What was done to a module: its groups, and why no more."""

    groups: tuple[Siblings, ...]
    left: str


GROUPING = "_aspp_ext_siblings"
"""Of the module whose convolutions they are: its :class:`Grouping`."""


def switch(module: nn.Module, groups: Iterable[Sequence[str]], left: str) -> None:
    """Make each group of convolutions, by their paths in ``module``, siblings, in place."""
    made = []
    for paths in groups:
        siblings = Siblings(len(paths))
        for place, path in enumerate(paths):
            siblings.enter(place, module.get_submodule(path))
        made.append(siblings)
    resume(module, Grouping(tuple(made), left))


def resume(module: nn.Module, grouping: Grouping) -> None:
    """Make the members of its groups, where they are plain convolutions, siblings."""
    vars(module)[GROUPING] = grouping
    for siblings in grouping.groups:
        for place in range(siblings.size):
            conv = siblings.member(place)
            if conv is not None and type(conv) is nn.Conv2d:
                conv.__class__ = SiblingConv2d
                vars(conv)[MEMBER] = Member(siblings, place)
