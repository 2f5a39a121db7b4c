# SPDX-License-Identifier: BSD-3-Clause
"""torchvision's ASPP, fused. Imported only where torchvision is."""

from __future__ import annotations

from torch import nn
from torchvision.models.segmentation import deeplabv3

from aspp_ext.modules.fused import FusedForward
from aspp_ext.modules.head import Head
from aspp_ext.modules.parts import describe_standard


class FusedASPP(FusedForward, deeplabv3.ASPP):
    """``torchvision.models.segmentation.deeplabv3.ASPP`` with the fused forward."""

    original = deeplabv3.ASPP

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        """Read the parts of ``module``; raises Unfusable."""
        return describe_standard(module, deeplabv3.ASPPConv, deeplabv3.ASPPPooling)
