# SPDX-License-Identifier: BSD-3-Clause
"""Few small calls in every pass, dtype and tile: `python -m scripts.exercise_kernels`.

Made to run under compute-sanitizer: inputs are drawn on the CPU and copied, results are copied back
and compared there, bit for bit (the values are small integers), so that the device runs nothing but
aspp_ext's own kernels. Statistics, which are divided, may be off by rounding.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aspp_ext import _native, reference

STATISTICS = "atrous_pyramid_statistics"
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


class Call(NamedTuple):
    """An operator's call and what it has to return, in float64; of `rounded` results nearly."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    expected: list[Tensor]
    rounded: tuple[int, ...] = ()


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

    def calls(self, tf32: bool) -> Iterator[Call]:
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
        yield Call(
            "forward",
            lambda: [ops.atrous_pyramid(x, weights, rates, None, None, False, tf32)],
            [y],
        )
        yield Call(
            "forward with epilogue",
            lambda: [ops.atrous_pyramid(x, weights, rates, scale, shift, True, tf32)],
            [affine.relu()],
        )
        yield Call(
            "grad_input",
            lambda: [ops.atrous_pyramid_grad_input(grad, weights, rates, tf32)],
            [grad_x],
        )
        yield Call(
            "grad_weight",
            lambda: ops.atrous_pyramid_grad_weight(grad, x, kernels, outputs, rates, tf32),
            grad_weights,
        )
        key = self.device.upper()
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aspp_ext::{STATISTICS}", key):
            seen = y.to(self.dtype).double()
            mean = seen.mean((0, 2, 3))
            squares = (seen - mean[:, None, None]).square().sum((0, 2, 3))
            yield Call(
                "statistics",
                lambda: getattr(ops, STATISTICS)(x, weights, rates, tf32),
                [y, mean, squares],
                rounded=(1, 2),
            )


def all_calls(device: str) -> Iterator[tuple[Call, torch.dtype]]:
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        case = Case(shape, dtype, device)
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            name = "tf32" if tf32 else str(dtype).removeprefix("torch.")
            for call in case.calls(tf32):
                yield call._replace(name=f"{call.name}, {name}, {shape.layout}"), dtype


def difference(results: Sequence[Tensor], call: Call, dtype: torch.dtype) -> str | None:
    """What is wrong in one sentence, or None."""
    if len(results) != len(call.expected):
        return f"expected {len(call.expected)} results, got {len(results)}"
    for place, (got, want) in enumerate(zip(results, call.expected, strict=True)):
        if got.shape != want.shape:
            return f"result {place}: expected {list(want.shape)}, got {list(got.shape)}"
        if place in call.rounded:
            right = (got.cpu().double() - want).abs() <= 1e-5 * want.abs().max()
        else:
            right = got.cpu() == want.to(dtype)
        if not right.all():
            return f"result {place}: {int((~right).sum())} of {want.numel()} elements differ"
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


def report_kernels(calls: Sequence[Call]) -> None:
    """Names every kernel of the library that no call launches."""
    from benchmarks.gpu.device import Cuda

    device = Cuda()
    launched = {kernel.name for call in calls for kernel in device.kernels(call.run)}
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
    for call, dtype in calls:
        text = difference(call.run(), call, dtype)
        if text:
            print(f"WRONG {call.name}: {text}", flush=True)
        wrong += text is not None
    if options.names and options.device == "cuda":
        report_kernels([call for call, _ in calls])
    print(f"{len(calls) - wrong} of {len(calls)} calls agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
