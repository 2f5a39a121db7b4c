# SPDX-License-Identifier: BSD-3-Clause
"""What tests and benchmarks share: the tables ``OPS`` x ``PROBLEMS``, and the error law.

An operator in ``OPS`` is run on every problem in ``PROBLEMS``, in every dtype, by every
implementation. Adding a line to either table enrols it everywhere.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _triton, reference
from .dispatch import IMPLEMENTATIONS
from .ops.family import NATIVE, TRITON, Family

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Pair = tuple[int, int]


@dataclass(frozen=True)
class Branch:
    """One branch; the separable operators take a 1x1 kernel at rate 1 as a plain convolution."""

    out_channels: int
    kernel: Pair = (3, 3)
    rate: Pair = (1, 1)

    @property
    def plain(self) -> bool:
        return self.kernel == (1, 1) and self.rate == (1, 1)


@dataclass(frozen=True)
class Problem:
    """A small input ``[N, C, H, W]``, its branches, and how the tensors lie in memory."""

    name: str
    shape: tuple[int, int, int, int]
    branches: tuple[Branch, ...]
    layout: str = "contiguous"
    weight_layout: str = "contiguous"

    @property
    def rates(self) -> list[int]:
        return [r for b in self.branches for r in b.rate]

    @property
    def out_channels(self) -> int:
        return sum(b.out_channels for b in self.branches)


Spec = tuple[int] | tuple[int, int | Pair] | tuple[int, int | Pair, int | Pair]


def _branch(out_channels: int, kernel: int | Pair = 3, rate: int | Pair = 1) -> Branch:
    def pair(v: int | Pair) -> Pair:
        return (v, v) if isinstance(v, int) else v

    return Branch(out_channels, pair(kernel), pair(rate))


def _problem(
    name: str, shape: tuple[int, int, int, int], *branches: Spec, **layouts: str
) -> Problem:
    """Branches: (out_channels, kernel = 3, rate = 1)."""
    return Problem(name, shape, tuple(_branch(*spec) for spec in branches), **layouts)


def _aspp(out_channels: int, *rates: int) -> list[Spec]:
    return [(out_channels, 1), *((out_channels, 3, rate) for rate in rates)]


_HUGE = 2**31 - 1
_CUT_OUT = {"channel_slice": (16, 0, 0), "row_slice": (0, 1, 0), "column_slice": (0, 0, 2)}
"""Layout -> channels, rows and columns of NaN before and behind those of a channels_last image."""
_X_LAYOUTS = (
    *("channels_last", "offset", "sliced", "strided", "transposed"),
    *("expanded_batch", "expanded_channels", "expanded_plane"),
    *_CUT_OUT,
)
_WEIGHT_LAYOUTS = ("channels_last", "outputs_last", "sliced", "strided", "offset", *_CUT_OUT)
_ANY_LAYOUT: tuple[Spec, ...] = ((16, 1), (5, 3, 2), (32, 3, (1, 4)))

_PROBLEMS = (
    _problem("aspp", (2, 16, 17, 17), *_aspp(16, 3, 6, 9)),
    _problem("one_branch", (1, 8, 6, 8), (8, 3, 2)),
    _problem("seven_branches", (1, 6, 9, 8), *_aspp(4, 1, 2, 3, 5, 8), (3, 5, 2)),
    _problem("prime_sizes", (3, 13, 7, 11), (5, 3, 2), (17, 1), (1, 3, 5)),
    _problem("one_channel", (1, 1, 4, 5), (1,), (2, 1)),
    _problem("channels_not_of_8", (2, 43, 5, 6), (11, 3, 2), (9, 1)),
    _problem("channel_blocks", (1, 301, 4, 5), (3, 3, 2), (4, 1)),
    _problem("channel_blocks_dense", (1, 144, 3, 4), (18,), (18, 3, 2)),
    _problem("outputs_not_of_16", (1, 5, 8, 7), (33, 3, 3), (70, 1), (15,)),
    _problem("rate_of_the_map", (2, 4, 6, 5), (3, 3, 6), (3, 3, 5), (3, 3, 4)),
    _problem("rate_above_the_map", (2, 5, 4, 6), (3, 3, 9), (4, 5, 100), (2, 3, (7, 1))),
    _problem("rate_maximum", (1, 3, 4, 5), (2, 3, _HUGE), (3, 5, (1, _HUGE))),
    _problem("rate_maximum_in_a_window", (1, 3, 2, 411), (2, 3, _HUGE), (3, 5, (1, _HUGE))),
    _problem("one_pixel", (3, 6, 1, 1), *_aspp(5, 1, 7)),
    _problem("one_row", (1, 4, 1, 29), (5, 3, 4), (4, (1, 3), 6), (4, (1, 5), 2)),
    _problem("one_column", (2, 4, 23, 1), (5, 3, 4), (4, (3, 1), 6)),
    _problem("empty_batch", (0, 5, 6, 7), *_aspp(4, 2)),
    _problem("kernel_5x5", (1, 6, 12, 13), (5, 5, 2), (4, 5, 1)),
    _problem("kernel_1x3_3x1", (1, 6, 7, 9), (5, (1, 3), 2), (4, (3, 1), 3)),
    _problem("kernel_7x1_3x5", (2, 3, 11, 9), (5, (7, 1), 2), (4, (3, 5), (4, 1))),
    _problem("kernel_1x1_at_a_rate", (1, 7, 5, 6), (5, 1, 3), (3, 1)),
    _problem("kernel_63x63", (1, 2, 9, 8), (3, 63, 1), (2, (63, 1), 2)),
    _problem("many_triples", (8, 56, 9, 9), *_aspp(56, 3)),
    _problem("rates_per_axis", (2, 9, 10, 14), (6, 3, (1, 6)), (6, 3, (5, 2))),
    _problem("many_chunks", (1, 3, 41, 40), (5, 3, 12), (4, 3, 7), (3, 1)),
    _problem("row_windows", (1, 3, 3, 431), (4, 3, (1, 150)), (2, 3, (2, 3)), (2, 1)),
    _problem("row_windows_batch", (2, 2, 2, 811), (3, (1, 3), 6), (2, 3, (1, 500))),
    _problem("row_at_the_chunk_limit", (1, 4, 3, 384), (3, 3, (1, 9)), (2, 1)),
    _problem("row_below_the_chunk_limit", (1, 4, 4, 191), (3, 3, (2, 90)), (2, 1)),
    *(_problem(f"x_{k}", (2, 20, 6, 18), *_ANY_LAYOUT, layout=k) for k in _X_LAYOUTS),
    *(
        _problem(f"weights_{k}", (1, 6, 5, 7), *_ANY_LAYOUT, weight_layout=k)
        for k in _WEIGHT_LAYOUTS
    ),
    # Of whole 16 bytes in every dtype, so that kernels read them in place: weights too.
    *(
        _problem(f"in_place_{k}", (1, 40, 6, 18), *_ANY_LAYOUT, layout=k, weight_layout=k)
        for k in _CUT_OUT
    ),
)
PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in _PROBLEMS}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """``t`` with other strides. Memory between the elements is NaN, so that touching it shows.

    The ``expanded`` layouts repeat a slice of ``t`` (stride 0), hence change its values.
    """
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()
    if layout == "outputs_last":  # stride 1 over O: the kernels read such weights in place
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t
    if layout.startswith("expanded_"):
        kept = {"batch": (0,), "channels": (1,), "plane": (2, 3)}[layout.removeprefix("expanded_")]
        index = tuple(slice(0, 1) if d in kept else slice(None) for d in range(t.dim()))
        return t[index].expand(t.shape)
    if layout in _CUT_OUT:
        return _cut_out(t, _CUT_OUT[layout]) if t.dim() == 4 else t.contiguous()
    first, step, extra = {"offset": (0, 1, 0), "sliced": (1, 1, 3), "strided": (1, 2, 1)}[layout]
    sizes = [s * step + extra for s in t.shape]
    places = 1 + int(torch.Size(sizes).numel())
    memory = torch.full((places,), torch.nan, dtype=t.dtype, device=t.device)
    view = memory[1:].view(sizes)[tuple(slice(first, first + s * step, step) for s in t.shape)]
    return view.copy_(t)


def _cut_out(t: Tensor, around: tuple[int, int, int]) -> Tensor:
    """``t [N, C, H, W]`` as a part of a channels_last image whose memory ends with the part's last
    element, so that reading on is reading somebody else's."""
    sizes = zip(t.shape[1:], around, strict=True)
    channels, rows, columns = (size + 2 * nan for size, nan in sizes)
    strides = (rows * columns * channels, 1, columns * channels, channels)
    first = sum(a * s for a, s in zip(around, strides[1:], strict=True))
    last = first + sum((s - 1) * stride for s, stride in zip(t.shape, strides, strict=True))
    memory = torch.full((max(last + 1, 0),), torch.nan, dtype=t.dtype, device=t.device)
    return memory.as_strided(t.shape, strides, first if t.numel() else 0).copy_(t)


class Values:
    """Tensors for a problem: small integers (``integer``), or normal values scaled by fan-in.

    The integers are so small that bfloat16 holds every intermediate result of every problem. The
    values are the same on every device, for they are drawn on the CPU.
    """

    def __init__(
        self, dtype: torch.dtype, integer: bool, seed: str, device: str | torch.device = "cpu"
    ) -> None:
        self.dtype, self.integer, self.device = dtype, integer, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def __call__(self, *shape: int, fan_in: int = 1, layout: str = "contiguous") -> Tensor:
        if self.integer:
            most = 1 if fan_in > 1 else 2
            t = torch.randint(-most, most + 1, shape, generator=self.generator).double()
        else:
            t = torch.randn(shape, generator=self.generator, dtype=torch.float64) / fan_in**0.5
        return laid_out(t.to(self.device, self.dtype), layout)


def _image(p: Problem, v: Values, channels: int | None = None) -> Tensor:
    n, c, h, w = p.shape
    return v(n, c if channels is None else channels, h, w, layout=p.layout)


def _dense(p: Problem, v: Values) -> list[Tensor]:
    c, layout = p.shape[1], p.weight_layout
    return [
        v(b.out_channels, c, *b.kernel, fan_in=c * b.kernel[0] * b.kernel[1], layout=layout)
        for b in p.branches
    ]


def _depthwise(p: Problem, v: Values) -> list[Tensor]:
    c, layout = p.shape[1], p.weight_layout
    return [
        v(0) if b.plain else v(c, 1, *b.kernel, fan_in=b.kernel[0] * b.kernel[1], layout=layout)
        for b in p.branches
    ]


def _pointwise(p: Problem, v: Values) -> list[Tensor]:
    c, layout = p.shape[1], p.weight_layout
    return [v(b.out_channels, c, 1, 1, fan_in=c, layout=layout) for b in p.branches]


def _between(p: Problem, v: Values) -> list[Tensor]:
    return [v(0) if b.plain else v(p.shape[1]) for b in p.branches]


def _head(p: Problem, v: Values, separable: bool, pool: bool) -> tuple[Any, ...]:
    depthwise = _depthwise(p, v) if separable else [v(0) for _ in p.branches]
    weights = _pointwise(p, v) if separable else _dense(p, v)
    c, pooled, projected = p.shape[1], 6 if pool else 0, 19
    of_pool = (v(pooled, c, fan_in=c), v(pooled)) if pool else (None, None)
    of_project = (v(projected, p.out_channels + pooled, fan_in=p.out_channels), v(projected))
    return (_image(p, v), depthwise, weights, p.rates, v(p.out_channels), *of_pool, *of_project)


def outputs(result: Any) -> list[Tensor]:
    """The tensors of an operator's result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in outputs(part)]


def converted(arguments: Any, dtype: torch.dtype, device: str | torch.device | None = None) -> Any:
    """A copy of an operator's arguments in another dtype, and on another device if one is given."""
    if isinstance(arguments, Tensor):
        return arguments.detach().to(device or arguments.device, dtype)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(converted(a, dtype, device) for a in arguments)
    return arguments


def has_triton(device: str) -> bool:
    """Whether Triton's kernels can run on "cpu" or "cuda"."""
    return _triton.why_not(torch.empty(1, 1, 1, 1, device=device), 1) is None


def _by_reference(name: str) -> Callable[..., Any]:
    return next(i.call for i in IMPLEMENTATIONS[name] if i.name == "reference")


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def _pairs(rates: Sequence[int]) -> list[Pair]:
    return list(zip(rates[::2], rates[1::2], strict=True))


def _expected_grad_input(grad: Tensor, weights: list[Tensor], rates: list[int]) -> Tensor:
    n, _, h, w = grad.shape
    x = grad.new_zeros(n, weights[0].size(1), h, w).requires_grad_()
    return torch.autograd.grad(reference.atrous_pyramid(x, weights, _pairs(rates)), x, grad)[0]


def _expected_grad_weight(
    grad: Tensor, x: Tensor, kernels: list[int], out_channels: list[int], rates: list[int]
) -> list[Tensor]:
    shapes = zip(out_channels, _pairs(kernels), strict=True)
    weights = _leaves([x.new_zeros(o, x.size(1), *kernel) for o, kernel in shapes])
    y = reference.atrous_pyramid(x, weights, _pairs(rates))
    return list(torch.autograd.grad(y, weights, grad))


def _expected_separable_backward(grad: Tensor, x: Tensor, *rest: Any) -> Any:
    depthwise, pointwise, rates, scale, shift, relu, *needs = rest
    (x,), depthwise, pointwise = _leaves([x]), _leaves(depthwise), _leaves(pointwise)
    scale, shift = _leaves(scale), _leaves(shift)
    y = _by_reference("atrous_separable_pyramid")(
        x, depthwise, pointwise, rates, scale, shift, relu, None, None, False
    )
    given = ([x], depthwise, pointwise, scale, shift)
    flat = [t for tensors in given for t in tensors]
    # What no output depends on is an empty tensor: a plain branch's depthwise weight.
    of = iter(torch.autograd.grad(y, flat, grad, materialize_grads=True))
    grads = [[next(of) for _ in tensors] for tensors in given]
    wanted = [*needs, needs[-1]]
    lists = [g if need else [] for g, need in zip(grads, wanted, strict=True)]
    return (*(lists[0] or [x.new_empty(0)]), *lists[1:])


def _always(problem: Problem) -> bool:
    return True


def _power_of_two_pixels(problem: Problem) -> bool:
    """Where the mean of integers over the plane is exact."""
    return (problem.shape[2] * problem.shape[3]).bit_count() == 1


@dataclass(frozen=True)
class Op:
    """An operator with a choice of arguments.

    ``arguments(problem, values)`` are the native operator's; ``expected(*arguments)`` is the same
    in plain PyTorch; ``exact(problem)``: with integers nothing is rounded before the last step.
    """

    name: str
    arguments: Callable[[Problem, Values], tuple[Any, ...]]
    expected: Callable[..., Any]
    exact: Callable[[Problem], bool] = _always

    @property
    def native(self) -> Any:
        return self.operator(NATIVE)

    def operator(self, family: Family) -> Any:
        return family.op(self.name)

    def implementations(self, device: str = "cpu") -> dict[str, Callable[..., Any]]:
        """What computes this operator on a device: for gradients the families' operators.

        Triton's are there where they can run: on a GPU, and under the interpreter on the CPU.
        """
        names = [device, *(["triton"] if has_triton(device) else []), "reference"]
        if self.name in IMPLEMENTATIONS:
            return {i.name: i.call for i in IMPLEMENTATIONS[self.name] if i.name in names}
        families = {device: NATIVE, "triton": TRITON}
        return {n: self.operator(family) for n, family in families.items() if n in names}

    def make(
        self,
        problem: Problem,
        dtype: torch.dtype,
        integer: bool = False,
        draw: int = 0,
        device: str | torch.device = "cpu",
    ) -> tuple[Any, ...]:
        """The same values for the same problem and ``draw``, whatever the dtype and the device."""
        seed = f"{self.name} {problem.name} {draw}"
        return self.arguments(problem, Values(dtype, integer, seed, device))


def _forward(name: str, arguments: Callable[..., Any], exact: Any = _always) -> Op:
    return Op(name, arguments, _by_reference(name), exact)


def _separable(p: Problem, v: Values, between: bool = False, grad: bool = False) -> tuple[Any, ...]:
    first = (_image(p, v, p.out_channels),) if grad else ()
    scale, shift = (_between(p, v), _between(p, v)) if between else ([], [])
    return (
        *first,
        _image(p, v),
        _depthwise(p, v),
        _pointwise(p, v),
        p.rates,
        scale,
        shift,
        between,
    )


OPS: dict[str, Op] = {
    "pyramid": _forward(
        "atrous_pyramid", lambda p, v: (_image(p, v), _dense(p, v), p.rates, None, None, False)
    ),
    "pyramid_epilogue": _forward(
        "atrous_pyramid",
        lambda p, v: (
            *(_image(p, v), _dense(p, v), p.rates),
            *(v(p.out_channels), v(p.shape[0], p.out_channels), True),
        ),
    ),
    "pyramid_grad_input": Op(
        "atrous_pyramid_grad_input",
        lambda p, v: (_image(p, v, p.out_channels), _dense(p, v), p.rates),
        _expected_grad_input,
    ),
    "pyramid_grad_weight": Op(
        "atrous_pyramid_grad_weight",
        lambda p, v: (
            *(_image(p, v, p.out_channels), _image(p, v)),
            *([k for b in p.branches for k in b.kernel], [b.out_channels for b in p.branches]),
            p.rates,
        ),
        _expected_grad_weight,
    ),
    "separable": _forward(
        "atrous_separable_pyramid", lambda p, v: (*_separable(p, v), None, None, False)
    ),
    "separable_between_epilogue": _forward(
        "atrous_separable_pyramid",
        lambda p, v: (*_separable(p, v, True), v(p.out_channels), v(p.out_channels), True),
    ),
    "separable_backward": Op(
        "atrous_separable_pyramid_backward",
        lambda p, v: (*_separable(p, v, grad=True), True, True, True, False),
        _expected_separable_backward,
    ),
    "separable_backward_between": Op(
        "atrous_separable_pyramid_backward",
        lambda p, v: (*_separable(p, v, True, grad=True), True, True, True, True),
        _expected_separable_backward,
    ),
    "head": _forward("aspp_inference", lambda p, v: _head(p, v, False, True), _power_of_two_pixels),
    "head_separable": _forward(
        "aspp_inference", lambda p, v: _head(p, v, True, True), _power_of_two_pixels
    ),
    "head_without_pool": _forward("aspp_inference", lambda p, v: _head(p, v, True, False)),
}


def _summary(error: Tensor, oracle: Tensor) -> dict[str, float]:
    size = error.abs()
    # A signed mean hides truncation towards zero where values are symmetric; the mean along the
    # value's own sign does not.
    return {
        "max": size.max().item(),
        "99.9 %": size.quantile(0.999).item() if size.numel() < 2**24 else size.max().item(),
        "mean": error.mean().abs().item(),
        "mean along the sign": (error * oracle.sign()).mean().abs().item(),
    }


def assert_no_worse_than_torch(
    actual: Tensor, baseline: Tensor, reference64: Tensor, factor: float = 2.0
) -> None:
    """The error law: at most ``factor`` times PyTorch's own error, plus one rounding.

    Holds for the largest error and the 99.9 percentile. The mean error, as it is and along the
    sign of the value, may exceed ``factor`` times PyTorch's own only by what chance explains.

    Args:
        actual: the result under test.
        baseline: PyTorch's own result in the same dtype.
        reference64: the same from the same inputs in float64.

    Raises:
        AssertionError: with both errors, for each of the four measures that is too large.
    """
    __tracebackhide__ = True
    assert actual.dtype == baseline.dtype, f"dtype {actual.dtype}, expected {baseline.dtype}"
    assert actual.shape == reference64.shape, f"{actual.shape}, expected {reference64.shape}"
    assert reference64.dtype == torch.float64, "the oracle must be float64"
    if actual.numel() == 0:
        return
    assert reference64.isfinite().all(), "the oracle must be finite"
    assert actual.isfinite().all(), f"{(~actual.isfinite()).sum()} values are not finite"
    oracle = reference64.flatten()
    ours = _summary(actual.double().flatten() - oracle, oracle)
    theirs = _summary(baseline.double().flatten() - oracle, oracle)
    rounding = torch.finfo(actual.dtype).eps / 2 * oracle.abs().max().item()
    by_chance = 6 * max(theirs["99.9 %"], rounding) / oracle.numel() ** 0.5
    slack = {"max": rounding, "99.9 %": rounding}
    bad = [
        f"{measure}: {ours[measure]:.3g}, PyTorch's {theirs[measure]:.3g}"
        for measure in ours
        if not ours[measure] <= factor * theirs[measure] + slack.get(measure, by_chance)
    ]
    assert not bad, f"errors above {factor}x PyTorch's own plus one rounding: {'; '.join(bad)}"


@contextlib.contextmanager
def nan_poison() -> Iterator[None]:
    """Memory PyTorch hands out uninitialised, to C++ as well, is full of NaN inside."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
