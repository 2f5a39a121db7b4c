# SPDX-License-Identifier: BSD-3-Clause
"""Published implementations, rebuilt from descriptions: the same layouts and state-dict keys.

Sizes are small; each row of the table of implementations is there.
"""

from __future__ import annotations

from tests.zoo.case import Case
from tests.zoo.rebuilt_frameworks import FRAMEWORKS
from tests.zoo.rebuilt_github import GITHUB
from tests.zoo.rebuilt_medical import MEDICAL
from tests.zoo.rebuilt_meta import META
from tests.zoo.rebuilt_mobile import MOBILE
from tests.zoo.rebuilt_openmmlab import OPENMMLAB
from tests.zoo.rebuilt_torchvision import TORCHVISION

REBUILT: dict[str, Case] = {
    **TORCHVISION,
    **OPENMMLAB,
    **META,
    **MOBILE,
    **GITHUB,
    **FRAMEWORKS,
    **MEDICAL,
}
