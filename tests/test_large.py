# SPDX-License-Identifier: BSD-3-Clause
"""Sizes and offsets beyond 32 and 64 bits work or are refused; they never wrap."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys

import pytest
import torch
from interpreting import overflow_refused
from marks import on_all, on_cpu, on_native, proven_emulated, proven_interpreted
from processes import run_python
from table import INTERPRETED, call_of

import aspp_ext
from aspp_ext.testing import OPS, Branch, Problem, outputs

pytestmark = [proven_emulated, on_native]

# Of a power of two pixels, so that their mean rounds nothing in whichever order it is taken.
SMALL = Problem("far apart", (2, 8, 4, 4), (Branch(8, (3, 1), (1, 1)), Branch(16, (1, 1), (1, 1))))
MAP_NORESERVE = 0x4000  # Linux: pages that are never touched cost nothing


def strides_of(t: torch.Tensor, apart: str) -> list[int]:
    """What is apart is so by 2**31 elements and more; of planes and pixels in whole 16 bytes."""
    height, width = (1, *t.shape)[-2:]
    pixel = 2**31 + 64
    strides = {
        "elements": [2**33 + 99991, 2**32 + 1009, 2**31 + 101, 2**31 - 7],
        "planes": [2**36 + 64, 2**31 + 8, width, 1],
        "pixels": [height * width * pixel, 1, width * pixel, pixel],
    }[apart if t.dim() == 4 else "elements"]
    return strides[: t.dim()]


def spread_out(t: torch.Tensor, apart: str) -> torch.Tensor:
    """``t`` in memory that is not touched elsewhere."""
    strides = strides_of(t, apart)
    last = sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, (last + 1) * t.element_size(), flags)
    far = torch.as_strided(torch.frombuffer(memory, dtype=t.dtype), t.shape, strides)
    assert torch.equal(far.copy_(t), t)  # no two elements share a place
    return far


@on_all
@proven_interpreted
@pytest.mark.skipif(sys.platform != "linux", reason="needs lazily reserved memory")
@pytest.mark.parametrize("apart", ["elements", "planes", "pixels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPS)
def test_offsets_beyond_32_bits(name, dtype, apart) -> None:
    """Every argument in turn; an index of 32 bits would reach nothing valid."""
    op = OPS[name]
    arguments = op.make(SMALL, dtype, integer=True)
    call = call_of(op)
    expected = outputs(call(*arguments))
    for i, argument in enumerate(arguments):
        many = isinstance(argument, list)
        tensors = [a for a in (argument if many else [argument]) if isinstance(a, torch.Tensor)]
        if not any(a.numel() for a in tensors):
            continue
        far = [spread_out(a, apart) if a.numel() else a for a in tensors]
        changed = [*arguments[:i], far if many else far[0], *arguments[i + 1 :]]
        with overflow_refused() if INTERPRETED else contextlib.nullcontext():
            got = outputs(call(*changed))
        assert all(map(torch.equal, got, expected)), f"argument {i}"


@pytest.mark.large
@pytest.mark.prove
@on_cpu
@pytest.mark.parametrize("separable", [False, True], ids=["pyramid", "separable"])
def test_more_than_2_to_31_outputs(separable) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass less over 4 GiB
    sample = torch.randint(-2, 3, (1, 2, 512, 512)).bfloat16()
    x = sample.expand(265, -1, -1, -1)
    w, d, p = (
        torch.randint(-2, 3, s).bfloat16() for s in ((31, 2, 1, 3), (2, 1, 3, 1), (31, 2, 1, 1))
    )
    torch.set_num_threads(os.cpu_count() or 1)

    def call(x):
        if separable:
            return aspp_ext.atrous_separable_conv2d(x, d, p, 400)
        return aspp_ext.atrous_pyramid(x, [w], [400])

    y = call(x)
    assert y.numel() > 2**31
    expected = call(sample)[0]
    assert all(torch.equal(image, expected) for image in y)


# Tensors of one element and stride 0 have any size for nothing.
TOO_LARGE = {
    "output_bytes": "o.atrous_pyramid(e(1, 1, B, B), [e(1, 1, 1, 1)], [1, 1])",
    "output_of_a_terabyte": "o.atrous_pyramid(e(1, 1, 2**20, 2**20), [e(1, 1, 3, 3)], [1, 1])",
    "batch": "o.atrous_pyramid(e(2**60, 1, 1, 1), [e(1, 1, 3, 3)], [1, 1])",
    "shift_per_sample": "o.atrous_pyramid(e(2**60, 1, 1, 1), [e(1, 1, 3, 3)], [1, 1], None, "
    "e(2**60, 1))",
    "packed_weight_wraps": "o.atrous_pyramid(e(1, 2**60, 1, 1), [e(1, 2**60, 1, 1)], [1, 1])",
    "packed_weight": "o.atrous_pyramid(e(1, 2**59, 1, 1), [e(1, 2**59, 1, 1)], [1, 1])",
    "sum_of_outputs_wraps": "o.atrous_pyramid(e(1, 1, 1, 1), [e(2**62, 1, 1, 1)] * 5, [1, 1] * 5)",
    "depthwise": "o.atrous_separable_pyramid(e(1, 2**60, 1, 1), [e(2**60, 1, 3, 1)], "
    "[e(1, 2**60, 1, 1)], [1, 1], [], [])",
    "grad_rows_wrap": "o.atrous_separable_pyramid_backward(e(1, 1, B, B), e(1, 1, B, B), "
    "[e(1, 1, 3, 3)], [e(1, 1, 1, 1)], [1, 1], [], [], False, False, True, True, False)",
    "grad_batch_wraps": "o.atrous_separable_pyramid_backward(e(2**59, 1, 1, 1), "
    "e(2**59, 1, 1, 1), [e(1, 1, 3, 3)], [e(1, 1, 1, 1)], [1, 1], [], [], False, False, True, "
    "True, False)",
    "grad_weight": "o.atrous_pyramid_grad_weight(e(1, 2**62, 1, 1), e(1, 2, 1, 1), [1, 1], "
    "[2**62], [1, 1])",
    "grad_input": "o.atrous_pyramid_grad_input(e(1, 1, 1, 1), [e(1, 2**61, 1, 1)], [1, 1])",
    "head_plane": "o.aspp_inference(e(1, 1, B, B), [e(0)], [e(1, 1, 3, 3)], [1, 1], e(1), None, "
    "None, e(1, 1), e(1))",
    "head_channels_wrap": "o.aspp_inference(e(1, 2**60, 1, 1), [e(0)], [e(1, 2**60, 1, 1)], [1, 1],"
    " e(1), e(1, 2**60), e(1), e(1, 2), e(1))",
    "head_project": "o.aspp_inference(e(1, 1, 1, 1), [e(0)], [e(1, 1, 1, 1)], [1, 1], e(1), None, "
    "None, e(2**62, 1), e(2**62))",
    "head_pool": "o.aspp_inference(e(1, 1, 1, 1), [e(0)], [e(1, 1, 1, 1)], [1, 1], e(1), "
    "e(2**62, 1), e(2**62), e(1, 2**62 + 1), e(1))",
}
EACH_IN_A_FORK = """
import json, os, resource, sys, torch, aspp_ext
o, B = torch.ops.aspp_ext, 2**31
def e(*shape): return torch.zeros(1).expand(*shape)
def attempt(call):
    resource.setrlimit(resource.RLIMIT_CPU, (900, 900))  # a size that wrapped may take days
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    try:
        eval(call)
        return "computed"
    except (RuntimeError, MemoryError, ValueError) as error:
        return str(error).partition(chr(10))[0]
verdicts = {}
for name, call in json.loads(sys.argv[1]).items():
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, attempt(call).encode())
        os._exit(0)
    os.close(write)
    text = os.read(read, 4000).decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    verdicts[name] = text if status == 0 else f"exit {status}"
print(json.dumps(verdicts))
"""


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    """What each of ``TOO_LARGE`` ended with; a wrapped size ends in a crash."""
    done = run_python("-c", EACH_IN_A_FORK, json.dumps(TOO_LARGE), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_too_large_is_refused(name, verdicts) -> None:
    words = ("memory", "overflow", "pixels on CUDA")
    assert any(word in verdicts[name] for word in words), verdicts[name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rates_near_2_to_31_in_the_reference(dtype) -> None:
    """PyTorch's convolution divides by zero there in a low precision."""
    code = (
        f"import torch, aspp_ext; x, w = (torch.ones(s, dtype=torch.{dtype}, requires_grad=True) "
        "for s in ((1, 3, 2, 411), (2, 3, 3, 3)));"
        "y = aspp_ext.atrous_pyramid(x, [w], [2**31 - 1], backend='reference');"
        "y.sum().backward(); assert (y == 3).all() and (x.grad == 2).all()"
    )
    done = run_python("-c", code, OMP_NUM_THREADS="1")
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-300:]}"
