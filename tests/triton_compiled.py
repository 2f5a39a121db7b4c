# SPDX-License-Identifier: BSD-3-Clause
"""Compiles what the operators ask for on each of ``triton_mock.GPUS`` and reads the machine code.

``python triton_compiled.py PART PARTS`` prints one line of JSON for each kernel in its part.
Compiled kernels stay in Triton's cache, what was read of them in ``TRITON_CACHE_DIR``'s readings.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import triton
from triton_mock import GPUS, Compilation, pretended

from aspp_ext.triton import operators

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
WIDTHS = (64, 128, 256)
"""Of branches: for each tile of the configurations there is one that it is taken for."""
THOROUGH = "sm_90"
"""The GPU for which everything is compiled. For the others it is the widest tiles of the kernels
with products, unless ASPP_EXT_COMPILE_ALL is set: each compilation takes seconds."""
PRODUCTS = ("gather_kernel", "grad_weight_kernel", "separable_kernel")
BRANCHES = 4
FLAGS = ("STATISTICS", "PER_SAMPLE")
"""Of a kernel that has more to do."""


def last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An image or weights that are read in place."""
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def dense_calls(width: int, dtype: torch.dtype, tf32: bool) -> None:
    """Every operator in every variant, with sums that are long enough to be cut."""
    rates, kernels = [1, 1, 2, 2, 3, 3, 4, 4], [1, 1] + [3, 3] * (BRANCHES - 1)
    x, grad = (last(1, c, 40, 40, dtype=dtype) for c in (width, BRANCHES * width))
    weights = [last(width, width, k, k, dtype=dtype) for k in kernels[::2]]
    vector = torch.empty(BRANCHES * width, dtype=dtype)
    operators.atrous_pyramid(x.contiguous(), weights, rates, None, None, False, tf32)
    operators.atrous_pyramid(x, weights, rates, vector, vector[None], True, tf32)
    operators.atrous_pyramid_statistics(x, weights, rates, tf32)
    operators.atrous_pyramid_grad_input(grad, weights, rates, tf32)
    operators.atrous_pyramid_grad_weight(grad, x, kernels, [width] * BRANCHES, rates, tf32)


def separable_calls(width: int, channels: int, dtype: torch.dtype, tf32: bool = False) -> None:
    """On few pixels: sums over many channels are cut, and over many taps where those are few."""
    rates = [1, 1, 2, 2, 3, 3, 4, 4]
    x, grad = (last(1, c, 8, 8, dtype=dtype) for c in (channels, BRANCHES * width))
    depthwise = [torch.empty(0, dtype=dtype)]
    depthwise += [torch.empty(channels, 1, 5, 5, dtype=dtype)] * (BRANCHES - 1)
    pointwise = [last(width, channels, 1, 1, dtype=dtype)] * BRANCHES
    between = [torch.empty(d.size(0), dtype=dtype) for d in depthwise]
    vector = torch.empty(BRANCHES * width, dtype=dtype)
    arguments = (x, depthwise, pointwise, rates, between, between, True)
    operators.atrous_separable_pyramid(*arguments, vector, vector, True, tf32)
    operators.atrous_separable_pyramid(*arguments, vector, vector[None], True, tf32)
    operators.atrous_separable_pyramid_backward(grad, *arguments, *[True] * 4, tf32)


def asked_for(gpu: str) -> list[Compilation]:
    """What the operators would have compiled on that GPU."""
    thorough = gpu == THOROUGH or "ASPP_EXT_COMPILE_ALL" in os.environ
    with pretended(gpu) as device:
        for width in WIDTHS if thorough else WIDTHS[-1:]:
            for dtype in (torch.bfloat16, torch.float32):
                dense_calls(width, dtype, False)
                separable_calls(width, 1024, dtype)
                separable_calls(width, 64, dtype)
            dense_calls(width, torch.float32, True)
            separable_calls(width, 1024, torch.float32, True)
            separable_calls(width, 64, torch.float32, True)
        return [c for c in device.compilations if thorough or c.kernel in PRODUCTS]


def most_demanding(found: list[Compilation]) -> list[Compilation]:
    """Less those whose code is a part of another's, which has more branches or a longer end."""

    def rest(c: Compilation) -> tuple[Any, ...]:
        others = {k: v for k, v in c.constants.items() if k not in FLAGS}
        return (c.kernel, *map(str, (c.source.signature, others, c.options["num_warps"])))

    def is_plain(c: Compilation) -> bool:
        return not any(c.constants.get(flag) for flag in FLAGS)

    found = [c for c in found if c.constants.get("BRANCHES", BRANCHES) == BRANCHES]
    flagged = {rest(c) for c in found if not is_plain(c)}
    return [c for c in found if not (is_plain(c) and rest(c) in flagged)]


def run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def cuts(listing: str) -> dict[str, int]:
    """How often the 13 bits are cleared that TF32 does not have."""
    return {"cuts": len(re.findall(r"(?:LOP3|v_and).* 0xffffe000", listing))}


def read_cuda(cubin: bytes) -> dict[str, Any]:
    """Registers, memory that stands in for them, and how often each instruction occurs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "--dump-resource-usage", file.name)
        listing = run("cuobjdump", "--dump-sass", file.name)
    numbers = {name: int(n) for name, n in re.findall(r"(\w+)(?:\[0\])?:(\d+)", usage)}
    found = Counter(m[1] for line in listing.splitlines() if (m := INSTRUCTION.match(line)))
    memory = {"stack": numbers["STACK"], "local": numbers["LOCAL"]}
    return {"registers": numbers["REG"], "instructions": found, **memory, **cuts(listing)}


def read_amd(text: str) -> dict[str, Any]:
    fields = {"registers": "vgpr_count", "stack": "private_segment_fixed_size"}
    fields["local"] = "vgpr_spill_count"
    found = Counter(re.findall(r"^\s+([vsb]\w+_\w+)", text, re.MULTILINE))
    numbers = {k: int(re.findall(rf"\.{v}:\s+(\d+)", text)[0]) for k, v in fields.items()}
    return {**numbers, "instructions": found, **cuts(text)}


def reading(c: Compilation) -> dict[str, Any]:
    """A kernel as it was compiled."""
    kernel = triton.compile(c.source, target=c.target, options=c.options)
    name = sha256(kernel.hash.encode() + Path(__file__).read_bytes()).hexdigest()
    kept = Path(os.environ["TRITON_CACHE_DIR"], "readings", f"{name}.json")
    if not kept.exists():
        is_amd = c.target.backend == "hip"
        found = read_amd(kernel.asm["amdgcn"]) if is_amd else read_cuda(kernel.asm["cubin"])
        kept.parent.mkdir(exist_ok=True)
        whole = kept.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps(found))
        whole.replace(kept)
    constants = {k: v for k, v in c.constants.items() if isinstance(v, (bool, int, str))}
    options = {"warps": c.options["num_warps"], "stages": c.options["num_stages"]}
    return json.loads(kept.read_text()) | constants | options | {"shared": kernel.metadata.shared}


def main(part: int, parts: int) -> None:
    found = [(gpu, c) for gpu in GPUS for c in most_demanding(asked_for(gpu))]
    for gpu, c in found[part::parts]:
        try:
            read = reading(c)
        except Exception as error:
            read = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"gpu": gpu, "kernel": c.kernel, **read}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
