# SPDX-License-Identifier: BSD-3-Clause
"""``torch.library.opcheck``: schema, autograd registration, fake against real, AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from marks import on_all, proven_interpreted, quick_interpreted, varied
from table import FAMILY, INTERPRETED, WIDEST, each_dtype
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from aspp_ext.testing import OPS, PROBLEMS

pytestmark = [on_all, proven_interpreted, varied]

WITH_OPERATOR = [n for n in OPS if not (INTERPRETED and n.startswith("head"))]
DIFFERENTIABLE = [n for n in OPS if not n.startswith("head")]
# The second derivative through an activation is refused, and opcheck would ask for it.
ONCE = [n for n in DIFFERENTIABLE if n != "separable_backward_between"]


@quick_interpreted(lambda dtype: dtype == torch.bfloat16)
@each_dtype
@pytest.mark.parametrize("name", WITH_OPERATOR)
def test_every_dtype(name, dtype) -> None:
    opcheck(OPS[name].operator(FAMILY).default, OPS[name].make(PROBLEMS["one_branch"], dtype))


STRANGE = ["x_channels_last", "x_sliced", "x_expanded_batch", "weights_channels_last", "one_pixel"]


@pytest.mark.parametrize("problem", [*STRANGE, "empty_batch", "rate_above_the_map"])
@pytest.mark.parametrize("name", WITH_OPERATOR)
def test_fake_has_the_real_strides(name, problem) -> None:
    arguments = OPS[name].make(PROBLEMS[problem], torch.float32)
    opcheck(
        OPS[name].operator(FAMILY).default, arguments, test_utils=["test_schema", "test_faketensor"]
    )


@quick_interpreted(lambda name: name in ("pyramid", "separable"))
@pytest.mark.parametrize("name", ONCE)
def test_with_gradients(name) -> None:
    arguments = OPS[name].make(PROBLEMS["kernel_1x3_3x1"], WIDEST)
    arguments = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(), arguments)
    opcheck(OPS[name].operator(FAMILY).default, arguments)
