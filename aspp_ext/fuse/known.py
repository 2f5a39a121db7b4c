# SPDX-License-Identifier: BSD-3-Clause
"""Arguments by which known classes are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .observe import SIZES


def feature_list(module: Any) -> tuple[list[Tensor]]:
    """The maps of a backbone, of which mmsegmentation's decode heads take those that they name.

    ``in_index`` is the place of one, or the places of several, ``in_channels`` the channels of
    those; DeepLab v3+'s head reads its low-level map from the first place.
    """
    index, channels = module.in_index, module.in_channels
    places = [index] if isinstance(index, int) else list(index)
    widths = [channels] if isinstance(channels, int) else list(channels)
    count = max(4, *(p + 1 for p in places), *(-p for p in places))
    maps = {p % count: w for p, w in zip(places, widths, strict=False)}
    low = getattr(module, "c1_bottleneck", None)
    if isinstance(low, nn.Module):
        first = next(m for m in low.modules() if isinstance(m, nn.Conv2d))
        maps.setdefault(0, first.in_channels)
    shapes = [(2, maps.get(i, 1), *SIZES) for i in range(count)]
    return ([torch.empty(shape, device="meta") for shape in shapes],)
