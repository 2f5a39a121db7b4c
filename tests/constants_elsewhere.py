# SPDX-License-Identifier: BSD-3-Clause
"""Constants of a module that others' forwards read, and functions that read them."""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any

from torch import Tensor, nn

K = 2.0
CONFIG = types.SimpleNamespace(k=2.0)
KEPT = {"k": 2.0}


def by_global(y: Tensor) -> Tensor:
    return y * K


def by_object(y: Tensor) -> Tensor:
    return y * CONFIG.k


def importing(y: Tensor) -> Tensor:
    import constants_imported

    return y * constants_imported.K


def other() -> Any:
    return importlib.import_module("constants_imported")


@functools.lru_cache
def cached() -> dict[str, float]:
    return KEPT


class Static:
    @staticmethod
    def scaled(y: Tensor) -> Tensor:
        return y * K


class Parent(nn.Module):
    """Held in a list, so that it is no part."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.linear = 2.0, nn.Linear(2, 2)


PARENT = Parent()
