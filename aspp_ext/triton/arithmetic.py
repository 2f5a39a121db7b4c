# SPDX-License-Identifier: BSD-3-Clause
"""Products of tiles, roundings, and the sums of slices."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import interpreted

INTERPRETED = tl.constexpr(interpreted)


@triton.jit
def to_tf32(value):
    """float32 with 10 bits of fraction: to nearest, ties away from zero."""
    bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """``sums + a @ b`` in float32; float32 operands in PRECISION, "tf32" or "ieee"."""
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "tf32":  # tensor cores, and the interpreter, would not round
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def rounded(y, DTYPE: tl.constexpr):
    """``y`` in that dtype: to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # the interpreter would cut the bits off
        bits = y.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = tl.where(y == y, bits.to(tl.float32, bitcast=True), y)
    return y.to(DTYPE)


@triton.jit
def store_partial(sums, partials, slot, M: tl.constexpr, N: tl.constexpr):
    """Writes the sums of a slice to ``partials[slot]``."""
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(partials + slot.to(tl.int64) * (M * N) + at, sums)


@triton.jit
def sum_of_slices(partials, slot, slices, first, M: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """Columns [first, first + W) of the sum of ``partials[slot : slot + slices]``, in order."""
    at = tl.arange(0, M)[:, None] * N + (first + tl.arange(0, W))[None, :]
    sums = tl.zeros((M, W), tl.float32)
    for s in range(slices):
        sums += tl.load(partials + (slot + s).to(tl.int64) * (M * N) + at)
    return sums
