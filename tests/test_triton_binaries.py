# SPDX-License-Identifier: BSD-3-Clause
"""Triton's kernels as they are compiled for GPUs that are not there: registers and instructions.

A kernel that spills, or that lost its tensor cores, still gives the right numbers.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from table import INTERPRETED

from aspp_ext import _triton

if _triton.missing is not None:
    pytest.skip(_triton.missing, allow_module_level=True)
if INTERPRETED:
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

import triton_mock
from triton_compiled import THOROUGH, TOOLS

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build/triton"
TRIED = ((3, 6), (3, 9))
"""Versions of Triton that the tiles have been chosen with. Another allocates registers in another
way: spills are then written down as an expected failure, and are no mistake of ours."""
NVIDIA = [gpu for gpu in triton_mock.GPUS if gpu.startswith("sm_")]
PRODUCTS = {"sm_80": r"HMMA", "sm_90": r"HGMMA", "sm_100": r"UTC\w*MMA", "sm_120": r"HMMA",
    "gfx942": r"v_mfma"}  # fmt: skip
PIPELINED = ("gather_kernel", "grad_weight_kernel")
MULTIPLYING = (*PIPELINED, "separable_kernel")
pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="Triton came without its tools"),
]
each_gpu = pytest.mark.parametrize("gpu", triton_mock.GPUS)


class Kernel(dict):
    """A line of ``triton_compiled.py``."""

    def __str__(self) -> str:
        named = {k: v for k, v in self.items() if k != "instructions"}
        return " ".join(f"{name}={value}" for name, value in named.items())

    def count(self, pattern: str) -> int:
        found = Counter(self["instructions"])
        return sum(n for name, n in found.items() if re.match(pattern, name))

    @property
    def on_tensor_cores(self) -> bool:
        """float32 products that may not be rounded are not."""
        if self["kernel"] not in MULTIPLYING:
            return False
        return self["CHUNK"] == 8 or self["PRECISION"] == "tf32"


def compiled(part: int, parts: int) -> list[Kernel]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(CACHE)}
    program = [sys.executable, "tests/triton_compiled.py", str(part), str(parts)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [Kernel(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels() -> dict[str, list[Kernel]]:
    """Of each GPU all that the operators may launch; who comes second finds it compiled."""
    parts = len(os.sched_getaffinity(0))
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(parts) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = [k for part in pool.map(compiled, range(parts), [parts] * parts) for k in part]
    return {gpu: [k for k in found if k["gpu"] == gpu] for gpu in triton_mock.GPUS}


@each_gpu
def test_everything_compiles(gpu, kernels) -> None:
    failed = [f"{k['kernel']}: {k['error'][-300:]}" for k in kernels[gpu] if "error" in k]
    assert not failed, "\n".join(failed)
    names = {k["kernel"] for k in kernels[gpu]}
    assert names >= {*MULTIPLYING}
    if gpu == THOROUGH:
        assert names >= {"finish_gather_kernel", "finish_grad_weight_kernel", "combine_kernel"}
        assert names >= {"transpose_kernel", "depthwise_kernel"}


@each_gpu
def test_shared_memory_is_there(gpu, kernels) -> None:
    most = triton_mock.GPUS[gpu].shared_bytes
    assert not [str(k) for k in kernels[gpu] if k["shared"] > most]


@each_gpu
def test_nothing_is_kept_in_local_memory(gpu, kernels) -> None:
    spilling = [k for k in kernels[gpu] if k["stack"] + k["local"] + k.count("STL|LDL") > 0]
    version = tuple(int(n) for n in str(_triton.version).split(".")[:2])
    if spilling and version not in TRIED:
        pytest.xfail(f"Triton {_triton.version} spills: " + "; ".join(map(str, spilling)))
    assert not spilling, "\n".join(map(str, spilling))


@each_gpu
def test_products_are_computed_by_the_right_units(gpu, kernels) -> None:
    for k in kernels[gpu]:
        # AMD's matrix cores multiply in full float32, too.
        on_them = k.on_tensor_cores or (gpu == "gfx942" and k["kernel"] in MULTIPLYING)
        assert (k.count(PRODUCTS[gpu]) > 0) == on_them, k
        if k["kernel"] in MULTIPLYING and not on_them:
            assert k.count("FFMA|v_(pk_)?fma") >= 64, k


@each_gpu
def test_operands_are_rounded_to_tf32(gpu, kernels) -> None:
    """Every element of both, by the threads that hold it; the tensor cores would cut bits off."""
    rounding = [k for k in kernels[gpu] if k.get("PRECISION") == "tf32"]
    assert {k["kernel"] for k in rounding} == {*MULTIPLYING}
    for k in rounding:
        lanes = k["warps"] * (64 if gpu == "gfx942" else 32)
        assert k["cuts"] * lanes >= (k["M"] + k["N"]) * k["K"], k


@pytest.mark.parametrize("gpu", NVIDIA)
def test_operands_are_copied_behind_the_registers(gpu, kernels) -> None:
    """cp.async, at least one of the operands 16 bytes at a time; in float32 the one whose sum runs
    along memory."""
    for k in kernels[gpu]:
        if k["kernel"] not in PIPELINED:
            continue
        copies, wide = k.count("LDGSTS"), k.count(r"LDGSTS\S*\.128")
        assert copies > 0, k
        assert k.count("LDGDEPBAR") >= 2, k
        assert wide == copies or k["CHUNK"] == 4, k


@each_gpu
def test_results_are_written_in_16_bytes(gpu, kernels) -> None:
    wide = "global_store_dwordx4|buffer_store_dwordx4" if gpu == "gfx942" else r"STG\S*\.128"
    for k in kernels[gpu]:
        if k["kernel"] in MULTIPLYING or k["kernel"] == "finish_gather_kernel":
            assert k.count(wide) > 0, k
            assert k.count(r"STG\S*\.U?8|STG\S*\.U16") == 0, k
