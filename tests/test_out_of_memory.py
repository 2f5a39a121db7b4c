# SPDX-License-Identifier: BSD-3-Clause
"""Memory that there is not: PyTorch's phrase, by which accelerate and Lightning know it and try a
smaller batch, whichever allocation fails; no word of C++ beside it."""

from __future__ import annotations

import pytest
import torch
from marks import on_cpu
from processes import said_by_python

import aspp_ext

pytestmark = on_cpu
PHRASE = "DefaultCPUAllocator: can't allocate memory"
OF_CPP = ("API call failed", "aoti_torch", "torch_call", ".cpp", ".h,", "bad_alloc", "std::")


def assert_tells(error: BaseException) -> None:
    """As their detectors look: one argument, a RuntimeError, the phrase."""
    assert type(error) is RuntimeError
    (said,) = error.args
    assert PHRASE in said
    first = said.splitlines()[0]
    assert not any(word in first for word in OF_CPP), first


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_that_no_memory_holds(layout) -> None:
    """x and the gradients are a number that expands."""
    x = torch.ones(1, 1, 1, 1).expand(1 << 16, 4, 1 << 14, 1 << 8)
    grad = torch.ones(1, 1, 1, 1).expand(1 << 16, 64, 1 << 14, 1 << 8)
    w, d, p = torch.ones(64, 4, 3, 3), torch.ones(4, 1, 3, 3), torch.ones(64, 4, 1, 1)
    w, p = (t.to(memory_format=layout) for t in (w, p))
    zero, none = torch.zeros(64), torch.zeros(0)
    project, operators = torch.ones(32, 64), torch.ops.aspp_ext
    for call in (
        lambda: aspp_ext.atrous_pyramid(x, [w], [2]),
        lambda: aspp_ext.atrous_pyramid(x, [w], [2], polyphase=False),
        lambda: aspp_ext.atrous_separable_pyramid(x, [d], [p], [2]),
        lambda: aspp_ext.aspp_inference(x, [d], [p], [2], zero, None, None, project, zero[:32]),
        lambda: operators.atrous_pyramid_grad_input(grad, [w], [2, 2]),
        lambda: operators.atrous_pyramid_grad_weight(grad, x, [3, 3], [64], [2, 2]),
        lambda: operators.atrous_separable_pyramid_backward(
            *(grad, x, [d], [p], [2, 2], [none], [none]), False, True, True, True, False
        ),
    ):
        with pytest.raises(RuntimeError) as caught:
            call()
        assert_tells(caught.value)


LIMITED = r"""
import os, resource, sys, warnings, torch
import aspp_ext
warnings.simplefilter("ignore")
torch.set_num_threads(1)
ops, rates = torch.ops.aspp_ext, [12, 12, 24, 24]
x, g = torch.randn(1, 256, 65, 65), torch.randn(1, 256, 65, 65)
w = [torch.randn(128, 256, 3, 3) / 50 for _ in range(2)]
d, p = [torch.randn(256, 1, 3, 3)] * 2, [torch.randn(128, 256, 1, 1)] * 2
none, zero, each = [torch.zeros(0)] * 2, torch.zeros(256), (True, True, True, False)
pool, project = torch.randn(32, 256), torch.randn(64, 288)
large, small = torch.randn(1, 2, 1500, 1500), [torch.randn(2, 2, 3, 3)]
head = (rates, zero, pool, zero[:32], project, zero[:64])
calls = [
    lambda: ops.aspp_inference(x, none, w, *head),
    lambda: ops.aspp_inference(x, d, p, *head),
    *(lambda on=on: ops.atrous_pyramid(x, w, rates, polyphase=on) for on in (0, 1)),
    lambda: ops.atrous_pyramid_grad_input(g, w, rates),
    lambda: ops.atrous_pyramid_grad_weight(g, x, [3] * 4, [128] * 2, rates),
    lambda: ops.atrous_separable_pyramid_backward(g, x, d, p, rates, none, none, False, *each),
    lambda: ops.atrous_pyramid(large, small, [3, 3], polyphase=2),
]
here = [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")][0]
for number, call in enumerate(calls):
    for megabytes in range(0, 40, 3):
        if os.fork() == 0:
            resource.setrlimit(resource.RLIMIT_AS, (here * 1024 + megabytes * 1000000,) * 2)
            try:
                call()
            except (RuntimeError, MemoryError) as error:
                os.write(1, f"{number} {str(error).splitlines()[0]}\n".encode())
            os._exit(0)
        if os.wait()[1]:
            print("crashed", flush=True)
"""


def test_whichever_allocation_fails() -> None:
    """With less and less memory to be had, the result, operands, or buffers are one too many.

    No gradient by oneDNN is among these: it does not look whether it got its own buffers, and
    PyTorch's convolutions crash with it.
    """
    said = [line.split(" ", 1) for line in said_by_python(LIMITED).splitlines()]
    assert {number for number, _ in said} == {*map(str, range(8))}
    for _, sentence in said:
        assert_tells(RuntimeError(sentence))
