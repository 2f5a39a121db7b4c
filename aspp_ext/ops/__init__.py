# SPDX-License-Identifier: BSD-3-Clause
"""The operators: public function, fake, gradient, autocast and batching rule of each."""

from .head import aspp_inference, polyphase_weights
from .pyramid import atrous_pyramid
from .separable import atrous_separable_conv2d, atrous_separable_pyramid
from .separable_norm import atrous_separable_pyramid_batch_norm

__all__ = [
    "aspp_inference",
    "atrous_pyramid",
    "atrous_separable_conv2d",
    "atrous_separable_pyramid",
    "atrous_separable_pyramid_batch_norm",
    "polyphase_weights",
]
