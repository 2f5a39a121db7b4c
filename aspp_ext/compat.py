# SPDX-License-Identifier: BSD-3-Clause
"""Importing torchvision where its compiled operators do not load, as with a CPU-only torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_MISSING = ("nms", "qnms")
_library: torch.library.Library | None = None  # its schemas live as long as this object


def import_torchvision() -> ModuleType:
    """Imports torchvision, even one built for another torch, and returns it.

    torchvision describes its operators to `torch.compile` while it is being imported, which fails
    where its compiled library did not load (`operator torchvision::nms does not exist`) although
    its models need none of them. Only then, the missing schemas are defined and the import is tried
    again. Call this before importing a package that imports torchvision by itself.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the import fails for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _define_missing_schemas()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


def _define_missing_schemas() -> None:
    global _library
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _MISSING:
        if not hasattr(torch.ops.torchvision, name):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
