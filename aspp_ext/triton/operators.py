# SPDX-License-Identifier: BSD-3-Clause
"""What Triton's operators run, by the native ones' names; arguments have been checked."""

from .pyramid import (
    atrous_pyramid,
    atrous_pyramid_grad_input,
    atrous_pyramid_grad_weight,
    atrous_pyramid_statistics,
)
from .separable import atrous_separable_pyramid, atrous_separable_pyramid_backward

__all__ = [
    "atrous_pyramid",
    "atrous_pyramid_grad_input",
    "atrous_pyramid_grad_weight",
    "atrous_pyramid_statistics",
    "atrous_separable_pyramid",
    "atrous_separable_pyramid_backward",
]
