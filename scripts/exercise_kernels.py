# SPDX-License-Identifier: BSD-3-Clause
"""Few small calls in every pass, dtype and tile: `python -m scripts.exercise_kernels`.

Made to run under compute-sanitizer: inputs are drawn on the CPU and copied, results are copied back
and compared there, bit for bit (the values are small integers), so that the device runs nothing but
aspp_ext's own kernels.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aspp_ext import _native, reference

Call = Callable[[], list[Tensor]]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Shape:
    """A problem: x [N, C, H, W] and branches (out_channels, kernel, rate)."""

    x: tuple[int, int, int, int]
    branches: tuple[tuple[int, int, int], ...]
    layout: str

    @property
    def rates(self) -> list[int]:
        return [rate for _, _, rate in self.branches]

    @property
    def pairs(self) -> list[int]:
        return [rate for rate in self.rates for _ in range(2)]


# Wide enough for the widest tile, long enough in k for sums in slices, channels read in place; and
# narrow, with channels to be padded, NCHW, a dead tap and an empty rectangle.
SHAPES = (
    Shape((2, 160, 17, 13), ((144, 1, 1), (136, 3, 4), (136, 3, 9)), "channels_last"),
    Shape((3, 43, 9, 11), ((21, 3, 2), (8, 1, 1), (3, 3, 20)), "contiguous_format"),
)


def integers(generator: torch.Generator, most: int, *size: int) -> Tensor:
    return torch.randint(-most, most + 1, size, generator=generator).double()


class Case:
    """A shape's tensors in float64 and on the device in a dtype."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        draw = torch.Generator().manual_seed(0)
        outputs = sum(out for out, _, _ in shape.branches)
        self.x = integers(draw, 2, *shape.x)
        self.weights = [integers(draw, 1, o, shape.x[1], k, k) for o, k, _ in shape.branches]
        self.grad = integers(draw, 1, shape.x[0], outputs, *shape.x[2:])
        self.scale, self.shift = integers(draw, 2, outputs), integers(draw, 9, outputs)

    def there(self, t: Tensor) -> Tensor:
        layout = {"memory_format": getattr(torch, self.shape.layout)} if t.dim() == 4 else {}
        return t.to(self.dtype).contiguous(**layout).to(self.device)

    def calls(self, tf32: bool) -> Iterator[tuple[str, Call, list[Tensor]]]:
        """(name, the operator's call, what it has to return in float64)."""
        x, grad = self.there(self.x), self.there(self.grad)
        weights = [self.there(w) for w in self.weights]
        scale, shift = self.there(self.scale), self.there(self.shift)
        rates, kernels = self.shape.pairs, [k for w in self.weights for k in w.shape[2:]]
        outputs = [w.shape[0] for w in self.weights]
        ops = torch.ops.aspp_ext

        leaves = [t.clone().requires_grad_() for t in (self.x, *self.weights)]
        y = reference.atrous_pyramid(leaves[0], leaves[1:], self.shape.rates)
        grad_x, *grad_weights = torch.autograd.grad(y, leaves, self.grad)
        y = y.detach()
        affine = y * self.scale[:, None, None] + self.shift[:, None, None]
        yield (
            "forward",
            lambda: [ops.atrous_pyramid(x, weights, rates, None, None, False, tf32)],
            [y],
        )
        yield (
            "forward with epilogue",
            lambda: [ops.atrous_pyramid(x, weights, rates, scale, shift, True, tf32)],
            [affine.relu()],
        )
        yield (
            "grad_input",
            lambda: [ops.atrous_pyramid_grad_input(grad, weights, rates, tf32)],
            [grad_x],
        )
        yield (
            "grad_weight",
            lambda: ops.atrous_pyramid_grad_weight(grad, x, kernels, outputs, rates, tf32),
            grad_weights,
        )


def all_calls(device: str) -> Iterator[tuple[str, Call, list[Tensor], torch.dtype]]:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        case = Case(shape, dtype, device)
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            for what, call, expected in case.calls(tf32):
                yield f"{what}, {name}, {shape.layout}", call, expected, dtype


def difference(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong in one sentence, or None."""
    if len(results) != len(expected):
        return f"expected {len(expected)} results, got {len(results)}"
    for place, (got, want) in enumerate(zip(results, expected, strict=True)):
        unequal = got.cpu() != want.to(dtype)
        if got.shape != want.shape or unequal.any():
            return f"result {place}: {int(unequal.sum())} of {want.numel()} elements differ"
    return None


def kernels_of(symbols: str) -> set[str]:
    """The mangled names of the kernels whose host stubs are among nm's lines."""
    stubs = re.findall(r"(?<!\d)(\d+)(__device_stub__\S+)", symbols)
    return {name[: int(length)].removeprefix("__device_stub_") for length, name in stubs}


def built_kernels() -> set[str]:
    """The kernels in libaspp_cuda.so; empty where that cannot be seen."""
    library = _native.library_dir() / "libaspp_cuda.so"
    if not library.exists() or not shutil.which("nm") or not shutil.which("c++filt"):
        return set()
    symbols = subprocess.run(["nm", str(library)], capture_output=True, text=True).stdout
    mangled = "\n".join(kernels_of(symbols))
    names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True).stdout
    return set(names.splitlines())


def report_kernels(calls: list[tuple[Any, ...]]) -> None:
    """Names every kernel of the library that no call launches."""
    from benchmarks.gpu.device import Cuda

    device = Cuda()
    launched = {kernel.name for _, call, *_ in calls for kernel in device.kernels(call)}
    built = built_kernels()
    for name in sorted(built - launched):
        print(f"not launched: {name}")
    for name in sorted(n for n in launched if "aspp" in n):
        print(f"launched: {name}")
    print(f"{len(built & launched)} of {len(built)} kernels of the library launched")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts.exercise_kernels", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--names", action="store_true", help="also list the kernels launched")
    options = parser.parse_args(arguments)
    missing = _native.cpu_missing or (options.device == "cuda" and _native.cuda_missing)
    if missing:
        print(missing)
        return 1
    wrong = 0
    calls = list(all_calls(options.device))
    for name, call, expected, dtype in calls:
        text = difference(call(), expected, dtype)
        if text:
            print(f"WRONG {name}: {text}", flush=True)
        wrong += text is not None
    if options.names and options.device == "cuda":
        report_kernels(calls)
    print(f"{len(calls) - wrong} of {len(calls)} calls agree bit for bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
