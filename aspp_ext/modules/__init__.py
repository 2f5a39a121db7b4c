# SPDX-License-Identifier: BSD-3-Clause
"""Modules built on the operators."""

from .aspp import ASPP

__all__ = ["ASPP"]
