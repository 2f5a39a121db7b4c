# SPDX-License-Identifier: BSD-3-Clause
"""A row of the zoo's tables: a module, what it is called with, what is odd about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]  # of the tensor arguments
    remark: str  # what is odd about it, in a few words
    pyramid: bool = True  # False: must be left alone
    row: int | None = None  # of the table of implementations, if it is one
    list_input: bool = False  # the tensors come as one list


MAP = (2, 16, 13, 15)  # what most modules of the zoo read
ONE = (MAP,)
