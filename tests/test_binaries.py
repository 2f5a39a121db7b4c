# SPDX-License-Identifier: BSD-3-Clause
"""libaspp_cuda.so, read without a GPU: architectures, registers and each kernel's instructions.

A kernel that spills, or that lost its tensor cores, still gives the right numbers.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import pytest

from aspp_ext import _native

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = _native.library_dir() / "libaspp_cuda.so"
PASSES = ("forward", "grad_input", "grad_weight", "separable")  # csrc/plan/problem.h
MATHS = ("bfloat16", "float16", "tf32", "float32", "float64")  # csrc/cuda/params.h
DEPTHWISE = ("depthwise_kernel", "between_grad_kernel")
DEPTHWISE += ("depthwise_grad_weight_kernel", "depthwise_grad_input_kernel")
MOST_REGISTERS = 255
REGISTERS_OF_A_PROCESSOR = 65536
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
NAME = re.compile(r"(?:pyramid|separable)_kernelI.*4PassE(\d).*4MathE(\d)ELi(\d)E")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which("cuobjdump", path=Path(triton.origin).parent / "backends/nvidia/bin")


CUOBJDUMP = find_cuobjdump()
pytestmark = [
    pytest.mark.settings("architectures"),
    pytest.mark.skipif(not LIBRARY.exists(), reason="libaspp_cuda.so was not built"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump: pip install triton"),
]


class Kernel(NamedTuple):
    """A dense or a fused separable kernel of one architecture."""

    architecture: str
    pass_: str
    math: str
    shape: int


def dump(what: str) -> Iterator[str]:
    """The lines of a listing, which may be a hundred megabytes."""
    with subprocess.Popen([str(CUOBJDUMP), what, str(LIBRARY)], stdout=PIPE, text=True) as listing:
        assert listing.stdout is not None
        yield from listing.stdout
    assert listing.returncode == 0


def functions(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(architecture, function, line) of every line of a dump that is about a function."""
    architecture = function = ""
    for line in lines:
        if line.startswith("arch = "):
            architecture = line.split()[-1].rstrip("af")
        elif named := re.search(r"Function\s*:?\s*(\w+)", line):
            function = named[1]
        elif function:
            yield architecture, function, line


def kernel_of(architecture: str, function: str) -> Kernel | None:
    named = NAME.search(function)
    if named is None:
        return None
    pass_, math, shape = (int(index) for index in named.groups())
    return Kernel(architecture, PASSES[pass_], MATHS[math], shape)


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, function) -> registers, stack and the like."""
    found = {}
    for architecture, function, line in functions(dump("--dump-resource-usage")):
        numbers = {name: int(n) for name, n in re.findall(r"(\w+)(?:\[0\])?:(\d+)", line)}
        if "REG" in numbers:
            found[architecture, function] = numbers
    return found


@pytest.fixture(scope="module")
def instructions() -> dict[Kernel, Counter[str]]:
    """Per kernel with products how often an instruction is in it, as HMMA.16816.F32.BF16."""
    found: dict[Kernel, Counter[str]] = defaultdict(Counter)
    for architecture, function, line in functions(dump("--dump-sass")):
        if (match := INSTRUCTION.match(line)) and (kernel := kernel_of(architecture, function)):
            found[kernel][match[1]] += 1
    return found


@pytest.fixture
def architectures(monkeypatch) -> list[str]:
    """As sm_90: what the build was asked for."""
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    import build_graph

    wished = _native.read_build_info()["architectures"]
    return re.findall(r",code=(\w+)", " ".join(build_graph.gencodes(Path("a_sm80.cu"), wished)))


EVERY = os.environ.get("ASPP_EXT_CUDA_ARCHS") == "all"


@pytest.mark.skipif(not EVERY, reason="not built for every architecture")
def test_the_library_is_for_every_architecture(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    import build_graph

    every = build_graph.split_architectures(build_graph.ARCHITECTURES)
    assert _native.read_build_info()["architectures"] == every


def count(counts: Counter[str], prefix: str) -> int:
    return sum(n for name, n in counts.items() if (name + ".").startswith(prefix + "."))


def test_every_architecture_has_every_kernel(architectures, usage) -> None:
    """The same tiles everywhere: which of them runs is chosen at run time."""
    kernels = {k for key in usage if (k := kernel_of(*key))}
    missing = ("separable", "float64")  # goes through memory
    expected = set(itertools.product(PASSES, MATHS)) - {missing}
    assert {(k.pass_, k.math) for k in kernels} == expected
    tiles = {k[1:] for k in kernels}
    for architecture in architectures:
        if architecture.startswith("compute_"):
            assert architecture.replace("compute", "sm") in "".join(dump("--list-ptx"))
            continue
        assert {k[1:] for k in kernels if k.architecture == architecture} == tiles
        others = " ".join(function for a, function in usage if a == architecture)
        assert "transpose_kernel" in others
        assert "combine_kernel" in others
        for kernel in DEPTHWISE:
            found = re.findall(rf"{kernel}I\w*?4MathE(\d)", others)
            assert {MATHS[int(math)] for math in found} == set(MATHS) - {"tf32"}, kernel


def test_nothing_is_kept_in_local_memory(usage, instructions) -> None:
    for key, numbers in usage.items():
        assert (numbers["STACK"], numbers["LOCAL"]) == (0, 0), key
    for kernel, counts in instructions.items():
        assert count(counts, "STL") + count(counts, "LDL") == 0, kernel


def test_registers_are_within_the_launch_bounds(usage) -> None:
    """256 threads of a block, and of as many blocks as the tile's bounds ask for, fit."""
    for (architecture, function), numbers in usage.items():
        assert numbers["REG"] <= MOST_REGISTERS
        if any(f"{kernel}I" in function for kernel in DEPTHWISE):
            assert 2 * 256 * 8 * -(-numbers["REG"] // 8) <= REGISTERS_OF_A_PROCESSOR
        if kernel_of(architecture, function):
            assert 256 * 8 * -(-numbers["REG"] // 8) <= REGISTERS_OF_A_PROCESSOR


PRODUCTS = {
    "bfloat16": "HMMA.16816.F32.BF16",
    "float16": "HMMA.16816.F32",
    "tf32": "HMMA.1688.F32.TF32",
    "float32": "FFMA",
    "float64": "DFMA",
}


def test_products_are_computed_by_the_right_units(instructions) -> None:
    for kernel, counts in instructions.items():
        assert count(counts, PRODUCTS[kernel.math]) >= 64, kernel
        tensor = count(counts, "HMMA") + count(counts, "DMMA")
        assert tensor == (count(counts, PRODUCTS[kernel.math]) if kernel.math in MATHS[:3] else 0)


def test_tensor_cores_take_their_operands_by_matrices(instructions) -> None:
    """Where the sum does not run along the rows in memory, ldmatrix transposes; not for 4 bytes."""
    for kernel, counts in instructions.items():
        if kernel.math not in MATHS[:2]:
            continue
        turned = sum(n for name, n in counts.items() if re.match(r"LDSM.*MT88", name))
        plain = count(counts, "LDSM") - turned
        assert bool(plain) == (kernel.pass_ != "grad_weight"), kernel
        assert bool(turned) == (kernel.pass_ not in ("forward", "separable")), kernel
    tf32 = {k: count(c, "LDSM") for k, c in instructions.items() if k.math == "tf32"}
    assert all(bool(n) == (k.pass_ != "grad_weight") for k, n in tf32.items())


def test_operands_are_copied_in_16_bytes_behind_the_registers(instructions) -> None:
    """cp.async.cg: LDGSTS past L1, in the prologue and in the loop."""
    for kernel, counts in instructions.items():
        copies = sum(n for name, n in counts.items() if name.startswith("LDGSTS"))
        assert copies == counts["LDGSTS.E.BYPASS.128"] > 0, kernel
        assert count(counts, "LDGDEPBAR") >= 2, kernel


def test_sums_of_tensor_cores_are_float32(instructions) -> None:
    for counts in instructions.values():
        assert not [n for n in counts if n.startswith("HMMA") and ".F32" not in n]
