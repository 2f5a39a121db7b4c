# SPDX-License-Identifier: BSD-3-Clause
"""Folded weights as minimal filtering takes them, kept for the sizes of image that come again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aspp_ext.ops import polyphase_weights
from aspp_ext.ops.polyphase_choice import Decided

BUDGET = 2**30  # bytes of one module
ALWAYS = 2  # sizes, whatever they take: images upright and across
STALE = 16  # calls that did not ask for a size, after which another may take its place
REMEMBERED = 128  # sizes

Size = tuple[int, int, Decided]
"""H and W of x, and what minimal filtering is allowed."""


class Prepared(NamedTuple):
    """What minimal filtering takes for one size of x, or None: to be made within the call."""

    branches: list[Tensor] | None = None
    project: list[Tensor] | None = None  # of a projection larger than 1x1


class PreparedWeights:
    """What :func:`polyphase_weights` makes of a folded pyramid, by the size of x.

    A size is prepared when it first comes, as long as there is room. Then those that are kept stay:
    were each newcomer to push another out, sizes that alternate would all be prepared in every
    call, which costs more than minimal filtering saves. A newcomer takes the place of a size that
    has not been asked for in a while, and not before its second call.

    Without locks: a process forked while one is held would wait for ever. Threads that meet here
    may prepare the same size twice.
    """

    def __init__(self, weights: list[Tensor], rates: list[tuple[int, int]]) -> None:
        self._weights, self._rates = weights, rates
        self._kept: dict[Size, list[Tensor]] = {}
        self._last: dict[Size, int] = {}  # the call in which a size, kept or not, last came
        self._bytes: dict[Size, int] = {}  # what a size took when it was prepared
        self._calls = 0

    def of(self, height: int, width: int, way: Decided) -> list[Tensor] | None:
        """The weights for x ``[N, C, height, width]``, or None: to be made within the call."""
        size = (height, width, way)
        self._calls += 1
        again = size in self._last
        self._last.pop(size, None)
        self._last[size] = self._calls
        for forgotten in list(self._last)[:-REMEMBERED]:
            self._forget(forgotten)
        kept = self._kept.get(size)
        if kept is not None:
            return kept
        if not self._has_room(size) and not (again and self._make_room(size)):
            return None
        # Outside inference mode, as the folded copy.
        with torch.inference_mode(False), torch.no_grad():
            made = polyphase_weights(self._weights, self._rates, height, width, polyphase=way)
        self._bytes[size] = sum(t.nbytes for t in made)
        if self._has_room(size):
            self._kept[size] = made
        return made

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(t.nbytes for tensors in list(self._kept.values()) for t in tensors)

    def _has_room(self, size: Size, *, without: Size | None = None) -> bool:
        """Whether there is room; until a size is known it counts as much as the largest."""
        taken = [self._bytes.get(kept, 0) for kept in list(self._kept) if kept != without]
        if len(taken) < ALWAYS:
            return True
        return sum(taken) + self._bytes.get(size, max(taken)) <= BUDGET

    def _make_room(self, size: Size) -> bool:
        oldest = next((size for size in list(self._last) if size in self._kept), None)
        if oldest is None or self._calls - self._last.get(oldest, 0) <= STALE:
            return False
        if not self._has_room(size, without=oldest):
            return False
        self._forget(oldest)
        return True

    def _forget(self, size: Size) -> None:
        self._last.pop(size, None)
        self._kept.pop(size, None)
        self._bytes.pop(size, None)
