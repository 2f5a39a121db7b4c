# SPDX-License-Identifier: BSD-3-Clause
"""Atrous Spatial Pyramid Pooling as one fused operator.

>>> model = aspp_ext.fuse(model)        # same parameters, same state dict, same numbers, sooner
"""

from . import autograd, compat, flops, reference
from .dispatch import explain
from .fuse import fuse, fuse_report, register_adapter, unfuse
from .modules import ASPP, freeze, unfreeze
from .ops import (
    aspp_inference,
    atrous_pyramid,
    atrous_separable_conv2d,
    atrous_separable_pyramid,
)
from .plain import decompositions

flops.register()

__version__ = "0.1.0"

__all__ = [
    "ASPP",
    "aspp_inference",
    "atrous_pyramid",
    "atrous_separable_conv2d",
    "atrous_separable_pyramid",
    "autograd",
    "compat",
    "decompositions",
    "explain",
    "freeze",
    "fuse",
    "fuse_report",
    "reference",
    "register_adapter",
    "unfreeze",
    "unfuse",
]
