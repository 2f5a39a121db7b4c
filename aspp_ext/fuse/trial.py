# SPDX-License-Identifier: BSD-3-Clause
"""A description is tried before it is believed: twins with random parameters compute the same."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from aspp_ext.modules.described import no_way_out
from aspp_ext.modules.parts import Unfusable
from aspp_ext.modules.stages import DROPOUTS

from .observe import in_a_line, own_copy

LIMIT = 1e-7  # of a difference, beside the largest value; rounding makes 1e-13
_LONGEST = 24  # of the maps' sides: a rate above it leaves the centre tap


def try_out(
    twin: nn.Module,
    fuse: Callable[[nn.Module], None],
    arguments: tuple[Any, ...],
    *,
    any_size: bool = True,
) -> None:
    """Compare values, gradients and buffers of ``twin``, on the meta device, and its fused form.

    Args:
        twin: the plain one.
        fuse: makes a copy of it, with memory, the fused one, in place.
        arguments: that it takes, on the meta device.
        any_size: it is known to take maps of any size. Else those are tried, too, but where it does
            not take them its fused form must not either; if it takes none, they are as in
            ``arguments``.

    Raises:
        Unfusable: they differ.
    """
    plain = _alive(twin)
    fused = own_copy(plain)
    fuse(fused)
    # Long and narrow, so that taps of most rates are met and wide modules take no seconds.
    long = _length(twin)
    of_eval = ((2, 3, long), (1, 1, 5), (1, 5, 1), (1, 5, 3))
    for training, shapes in ((False, of_eval), (True, ((2, long, 3), (1, 3, 5)))):
        for module in (plain, fused):
            module.train(training)
        inputs = [_random(arguments, shape) for shape in shapes]
        if not training:  # by which a forward may decide
            inputs.append(tree_map(_channels_last, _random(arguments, (2, 3, 5))))
        tried = [_both(plain, fused, given, training, any_size) for given in inputs]
        if any_size or any(tried):
            continue
        own = _both(plain, fused, _random(arguments, None), training, any_size)
        if not (own or training):
            raise Unfusable("it does not run on random maps")


def _random(arguments: tuple[Any, ...], shape: tuple[int, int, int] | None) -> tuple[Any, ...]:
    def drawn(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dim() != 4 or not x.is_floating_point():
            return torch.zeros(x.shape, dtype=x.dtype)
        sizes = x.shape if shape is None else (shape[0], x.shape[1], *shape[1:])
        return torch.randn(sizes, dtype=torch.double)

    return tree_map(drawn, arguments)


def _channels_last(x: Any) -> Any:
    is_map = isinstance(x, Tensor) and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last) if is_map else x


def _both(
    plain: nn.Module, fused: nn.Module, inputs: tuple[Any, ...], training: bool, any_size: bool
) -> bool:
    """Whether the plain one takes such maps, so that they were compared."""
    mode = "training mode" if training else "eval mode"
    results: list[dict[str, Any]] = []
    for module in (plain, fused):
        try:
            with contextlib.nullcontext() if module is plain else no_way_out():
                results.append(_run(module, inputs, training))
        except Exception as error:
            if module is plain and any_size and _are_few(inputs):
                return False  # of which a norm may make nothing
            if results:
                what = "what was read of its forward does not run"
                raise Unfusable(f"{what} in {mode}: {in_a_line(error)}") from error
            if any_size:
                said = f"it does not run on random maps, in {mode}: {in_a_line(error)}"
                raise Unfusable(said) from error
    if not results:
        return False
    if len(results) == 1:  # the fused one alone took them
        raise Unfusable(f"what was read of its forward takes other maps in {mode}")
    expected, got = results
    _compare(expected, got, mode)
    return True


@contextmanager
def generators() -> Iterator[None]:
    """Leaves random numbers, and what tracks gradients, as they were; of them the CPU's alone are
    drawn."""
    drawn, drawn_by_torch = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    drawn_by_numpy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device("cpu"), torch.autocast("cpu", enabled=False):
                yield
    finally:
        random.setstate(drawn)
        torch.set_rng_state(drawn_by_torch)
        if numpy is not None:
            numpy.random.set_state(drawn_by_numpy)


def _alive(twin: nn.Module) -> nn.Module:
    """A copy in memory, in float64, with values of the usual sizes."""
    alive = own_copy(twin).to_empty(device="cpu")
    for module in alive.modules():
        if isinstance(module, DROPOUTS):
            module.p = 0.5  # which may be set later; the order of drawing shows
        for parameter in module._parameters.values():
            if parameter is None or not parameter.is_floating_point():
                continue
            parameter.data = parameter.data.double()
            inputs = math.prod(parameter.shape[1:])
            if parameter.dim() > 1:
                parameter.data.normal_(0, inputs**-0.5)
            else:
                parameter.data.uniform_(0.5, 1.5)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = torch.empty(buffer.shape, dtype=torch.double).uniform_(
                    0.5, 1.5
                )
            elif buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    return alive


def _length(twin: nn.Module) -> int:
    """That most rates fit in."""
    rates = [max(m.dilation) for m in twin.modules() if isinstance(m, nn.Conv2d)]
    return min(max([7, *(r + 2 for r in rates)]), _LONGEST)


def _run(module: nn.Module, inputs: tuple[Any, ...], training: bool) -> dict[str, Any]:
    torch.default_generator.manual_seed(1)
    random.seed(1)
    with torch.set_grad_enabled(training):
        given, structure = tree_flatten(inputs)
        leaves = [x.clone().requires_grad_(training) for x in given if _is_real(x)]
        rest = iter(leaves)
        # Copies: it may write to them, which nobody may to leaves.
        given = [next(rest).clone() if _is_real(x) else x for x in given]
        results, _ = tree_flatten(module(*tree_unflatten(given, structure)))
        found: dict[str, Any] = {f"result {i}": _detached(r) for i, r in enumerate(results)}
        found.update((f"input {i}", _detached(x)) for i, x in enumerate(given))
        if training:
            for p in module.parameters():
                p.grad = None
            numbers = filter(_is_real, results)
            total = sum((r * torch.randn(r.shape, dtype=r.dtype)).sum() for r in numbers)
            if isinstance(total, Tensor) and total.requires_grad:
                total.backward()
            for i, leaf in enumerate(leaves):
                found[f"gradient of input {i}"] = _given(leaf.grad)
            for name, p in module.named_parameters():
                found[f"gradient of {name}"] = _given(p.grad)
    found.update((name, b.clone()) for name, b in module.named_buffers())
    return found


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _given(grad: Tensor | None) -> Tensor:
    return torch.zeros(()) if grad is None else grad


def _are_few(inputs: tuple[Any, ...]) -> bool:
    maps = (x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor))
    return any(x.shape[0] == 1 or 1 in x.shape[2:] for x in maps)


def _compare(plain: dict[str, Any], fused: dict[str, Any], mode: str) -> None:
    tensors = [v for v in plain.values() if isinstance(v, Tensor)]
    numbers = [v for v in tensors if v.numel() and v.is_floating_point()]
    largest = max((v.abs().max().item() for v in numbers), default=0.0)
    for name, value in plain.items():
        other = fused.get(name)
        if not isinstance(value, Tensor):
            if type(other) is not type(value) or other != value:
                raise Unfusable(f"what was read of its forward gives another {name} in {mode}")
            continue
        if (
            not isinstance(other, Tensor)
            or other.shape != value.shape
            or other.dtype != value.dtype
        ):
            raise Unfusable(f"what was read of its forward gives another {name} in {mode}")
        if not value.numel():
            continue
        value, other = (t if t.is_complex() else t.double() for t in (value, other))
        # A gradient that a norm cancels is rounding alone.
        size = max(value.abs().max().item(), 1e-3 * largest)
        if not (other - value).abs().max().item() <= LIMIT * size:
            raise Unfusable(f"what was read of its forward gives another {name} in {mode}")
