# SPDX-License-Identifier: BSD-3-Clause
"""``atrous_separable_pyramid_batch_norm`` by the CUDA kernels on a GPU."""

from __future__ import annotations

import norm_checks as checks
import pytest
import torch
from gpu_cases import BY_CUDA, DEVICE, real
from table import LOW, dtype_id

from aspp_ext.testing import DTYPES, PROBLEMS
from aspp_ext.testing.batch_norm import check_gradients, made

pytestmark = pytest.mark.gpu
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@pytest.fixture(autouse=True)
def by_cuda(monkeypatch) -> None:
    """The kernels, whatever is known of them here; without TF32."""
    monkeypatch.setenv("ASPP_EXT_BACKEND", BY_CUDA.backend)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@each_dtype
@checks.each_filled
def test_statistics(problem, dtype) -> None:
    checks.check_statistics(problem, dtype, DEVICE)
    checks.check_stored_integers(problem, dtype, DEVICE)


@checks.each_path
@each_dtype
@checks.each_filled
def test_integers_are_exact(problem, dtype, path) -> None:
    checks.check_integers(problem, dtype, DEVICE, path)


@checks.each_store
@checks.each_shape
def test_gradients(name, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        checks.check_against_torch(PROBLEMS[name], dtype, DEVICE, tolerance)


@checks.each_store
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_low_precision(dtype, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    check_gradients(PROBLEMS["aspp"], dtype, DEVICE)


@checks.each_store
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_a_large_mean_costs_few_digits(dtype, store, monkeypatch) -> None:
    checks.choosing(monkeypatch, store)
    checks.check_large_mean(dtype, DEVICE)


@pytest.mark.parametrize("path", checks.PATHS)
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_error_law(dtype, path) -> None:
    checks.check_error_law(real("2048 channels, 33x33"), dtype, DEVICE, path)


@pytest.mark.parametrize("name", ["one_branch", "x_channels_last", "prime_sizes"])
def test_opcheck(name) -> None:
    checks.check_operators(name, torch.bfloat16, DEVICE)


def test_what_the_planner_chooses_has_the_same_bits_every_time() -> None:
    call = made(PROBLEMS["aspp"], torch.bfloat16, DEVICE)
    first, second = call(), call()
    assert all(map(torch.equal, first, second))
