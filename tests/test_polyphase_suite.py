# SPDX-License-Identifier: BSD-3-Clause
"""The operators' own tests with minimal filtering wherever it can, and on narrower processors.

By default most problems of the table are too small for it. What a test asks beside that holds for
any form: ``always`` is no excuse.
"""

from __future__ import annotations

import os

import pytest
from test_isa import narrower, run

# Each takes at most half a minute on one core.
SUITES = {
    "forward": ["test_forward"],
    "gradients": ["test_backward", "test_second_order"],
    "calls": ["test_layouts", "test_contract", "test_opcheck"],
}
SLOW = {
    "modules": ["test_modules", "test_module_integration", "test_head_composed"],
    "system": ["test_compile", "test_autocast", "test_precision", "test_fuzz"],
    "threads": ["test_threads"],
}
each_suite = pytest.mark.parametrize(
    "name", [*SUITES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


def run_tests(files: list[str], isa: str | None = None) -> None:
    paths = [f"tests/{file}.py" for file in files]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not large and not gpu and not slow"]
    done = run(["-m", "pytest", *options, *paths], isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@each_suite
def test_suite(name, monkeypatch) -> None:
    monkeypatch.setenv("ASPP_EXT_POLYPHASE", "always")
    run_tests((SUITES | SLOW)[name], os.environ.get("ASPP_EXT_ISA"))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets(isa) -> None:
    if isa not in narrower():
        pytest.skip(f"{isa} is what the other tests ran, or this processor lacks it")
    run_tests(["test_polyphase", "test_polyphase_accuracy"], isa)
