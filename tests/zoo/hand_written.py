# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids as users write them, in as many ways as we could think of."""

from __future__ import annotations

from tests.zoo.case import Case
from tests.zoo.hand_written_around import AROUND
from tests.zoo.hand_written_forms import FORMS
from tests.zoo.hand_written_layers import LAYERS

HAND_WRITTEN: dict[str, Case] = {**FORMS, **LAYERS, **AROUND}
