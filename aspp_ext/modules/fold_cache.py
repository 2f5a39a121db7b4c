# SPDX-License-Identifier: BSD-3-Clause
"""One folded copy of a head, and when it is still true.

A write to a parameter can be seen by nobody: through ``.data``, numpy, dlpack, a collective, or
from another process, with the version counter and the address as they were. So on the CPU each call
compares a checksum of every byte that went into the copy, at the speed of memory. On other devices
the answer would make the host wait for all that is queued, and a later one come too late: there
each call folds anew.

:func:`aspp_ext.freeze` is the promise that nothing is written, and the way without either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aspp_ext import _native
from aspp_ext.ops.checksums import checksums
from aspp_ext.ops.polyphase_choice import Decided

from .folded import Folded, fold, in_range
from .head import Head
from .prepared import Prepared, PreparedWeights


class FoldCache:
    """The folded copy in one dtype on one device, and the evidence.

    Attributes:
        head: whose copy it is, if it is frozen.
        folded: the copy.
        in_range: whether its dtype holds it well enough to be used (see :func:`in_range`).
        prepared: the branches' weights as minimal filtering takes them, several times their memory.
        prepared_project: the same of a projection larger than 1x1.
    """

    def __init__(self, head: Head, dtype: torch.dtype, *, frozen: bool) -> None:
        # DataParallel's replicas share what their original has kept, on another device.
        self.dtype, self.device = dtype, head.weight.device
        # Before folding: what is written meanwhile must show. The parameters themselves are not
        # kept, which would keep the memory of those that are replaced.
        self._evidence = None if frozen else _evidence(head)
        self.head = head if frozen else None
        self.folded = _owned(fold(head, dtype))
        self.in_range = in_range(head, self.folded)
        self.prepared = PreparedWeights(self.folded.weights, self.folded.atrous_rates)
        self.prepared_project = None
        if head.project is not None and tuple(head.project.kernel_size) != (1, 1):
            assert self.folded.project_weight is not None
            rate_h, rate_w = head.project.dilation
            self.prepared_project = PreparedWeights(
                [self.folded.project_weight], [(rate_h, rate_w)]
            )

    def prepare(self, height: int, width: int, way: Decided) -> Prepared:
        """The weights for x ``[N, C, height, width]``."""
        last = self.prepared_project
        project = None if last is None else last.of(height, width, way)
        return Prepared(self.prepared.of(height, width, way), project)

    @property
    def prepared_bytes(self) -> int:
        """Of all that is kept for minimal filtering."""
        last = self.prepared_project
        return self.prepared.nbytes + (0 if last is None else last.nbytes)

    def holds(self, head: Head, dtype: torch.dtype) -> bool:
        """Whether the folded copy still is what :func:`fold` would return."""
        if (self.dtype, self.device) != (dtype, head.weight.device):
            return False
        if self._evidence is None:
            return True
        settings, sums = self._evidence
        return settings == _settings(head) and torch.equal(sums, checksums(sources(head)))


def _owned(folded: Folded) -> Folded:
    """With copies of the filters, which folding leaves as they are."""
    filters = [None if w is None else w.detach().clone() for w in folded.depthwise_weights]
    return folded._replace(depthwise_weights=filters)


def sources(head: Head) -> list[Tensor]:
    """Every parameter and buffer that goes into the folded weights."""
    return [t for t in _slots(head) if t is not None]


def _slots(head: Head) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for conv in head.convs():
        found += (conv.weight, conv.bias)
    for norm in head.folded_norms():
        found += (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return found


def can_keep(head: Head, *, frozen: bool) -> bool:
    """Whether a copy can be kept for later calls."""
    for tensor in sources(head):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return False  # may hold its values anywhere
        if tensor.device.type != ("cpu" if not frozen else head.weight.device.type):
            return False
    device = head.weight.device.type
    if device == "cuda":
        # A copy made during capture would live in the graph's private pool.
        return not torch.cuda.is_current_stream_capturing()
    return device == "cpu" and _native.cpu_missing is None


def _evidence(head: Head) -> tuple[list[object], Tensor]:
    return _settings(head), checksums(sources(head))


def _settings(head: Head) -> list[object]:
    eps = [norm.eps for norm in head.folded_norms()]
    kinds = (None if t is None else (type(t), t.layout, t.device) for t in _slots(head))
    return [*(b.rate for b in head.branches), *eps, *kinds]
