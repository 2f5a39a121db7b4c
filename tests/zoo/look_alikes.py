# SPDX-License-Identifier: BSD-3-Clause
"""What must not be fused as a pyramid, or must give exactly the module's own result."""

from __future__ import annotations

from tests.zoo.case import Case
from tests.zoo.look_alikes_choices import CHOICES
from tests.zoo.look_alikes_effects import EFFECTS
from tests.zoo.look_alikes_layers import LAYERS
from tests.zoo.look_alikes_structure import STRUCTURE

LOOK_ALIKES: dict[str, Case] = {**STRUCTURE, **LAYERS, **CHOICES, **EFFECTS}
