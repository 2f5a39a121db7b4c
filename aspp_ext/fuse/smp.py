# SPDX-License-Identifier: BSD-3-Clause
"""segmentation_models_pytorch's ASPP, dense or separable, fused. Imported only where smp is."""

from __future__ import annotations

from segmentation_models_pytorch.decoders.deeplabv3 import decoder
from torch import nn

from aspp_ext.modules.fused import FusedForward
from aspp_ext.modules.head import Head
from aspp_ext.modules.parts import describe_standard


class FusedASPP(FusedForward, decoder.ASPP):
    """``segmentation_models_pytorch.decoders.deeplabv3.decoder.ASPP`` with the fused forward."""

    original = decoder.ASPP

    @classmethod
    def describe(cls, module: nn.Module) -> Head:
        """Read the parts of ``module``; raises Unfusable."""
        return describe_standard(
            module,
            decoder.ASPPConv,
            decoder.ASPPPooling,
            separable_conv=decoder.ASPPSeparableConv,
            separable_pair=decoder.SeparableConv2d,
        )
