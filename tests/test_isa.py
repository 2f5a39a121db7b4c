# SPDX-License-Identifier: BSD-3-Clause
"""The kernels of narrower processors, on this one: ``ASPP_EXT_ISA`` steps down."""

from __future__ import annotations

import os

import pytest
import torch
from processes import isa

from aspp_ext import _native

LADDER = ["baseline", "avx2", "avx512", "avx512bf16"]


def test_an_unknown_name_does_not_raise_the_ceiling() -> None:
    assert isa("avx9000") in LADDER
    assert isa("") == isa()


def test_another_may_be_asked_for_later() -> None:
    before = _native.picked_isa()
    try:
        for name in ("", *LADDER, "avx9000"):
            assert _native.use_isa(name) == isa(name)
    finally:
        assert _native.use_isa(before) == before


@pytest.mark.settings("isa")
def test_it_is_the_one_that_was_asked_for() -> None:
    """So that ``make prove`` tests what it says."""
    wanted = os.environ.get("ASPP_EXT_ISA")
    got = torch.ops.aspp_ext.cpu_isa().removeprefix("isa_")
    assert got == (wanted or got)
