# SPDX-License-Identifier: BSD-3-Clause
"""Modules built on the operators."""

from .aspp import ASPP
from .freezing import freeze, unfreeze

__all__ = ["ASPP", "freeze", "unfreeze"]
