# SPDX-License-Identifier: BSD-3-Clause
"""Fakes, autocast and batching rules, as every operator registers them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .._registrations import implement, name_of, replaced

try:
    from torch._C._functorch import is_legacy_batchedtensor
except ImportError:  # a PyTorch without that vmap
    is_legacy_batchedtensor = None  # type: ignore[assignment]


def is_batched(t: Tensor) -> bool:
    """Whether it is one of many gradients that ``is_grads_batched`` takes at once."""
    return is_legacy_batchedtensor is not None and is_legacy_batchedtensor(t)


def _cast(value: Any, dtype: torch.dtype, device_type: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype, device_type) for v in value]
    eligible = (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        and value.device.type == device_type
    )
    return value.to(dtype) if eligible else value


# Where the operators have an autocast rule.
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def is_autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for x's device, in words that torch 2.11's Dynamo can trace, too."""
    device = x.device.type
    return device in _AUTOCAST_KEYS and torch.is_autocast_enabled(device)


def under_autocast(x: Tensor, *arguments: Any) -> Any:
    """x and the arguments as the operator will see them: cast where autocast is on for x's device.

    The public functions check dtypes before the dispatcher gets to cast, so they cast first.
    """
    if not is_autocast_on(x):
        return (x, *arguments)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    return tuple(_cast(a, dtype, device) for a in (x, *arguments))


def register_fake(op: Any, fake: Callable[..., Any]) -> None:
    """``fake(*op_arguments)`` checks them and returns results without values."""
    torch.library.register_fake(op._schema.name, fake, lib=replaced(name_of(op), "fake"))


def register_autocast(op: Any, kept: str = "") -> None:
    """Under autocast the floating arguments go to the autocast dtype, as convolution's do.

    The argument of the name ``kept`` stays as it is.
    """
    cast = [a.name != kept for a in op._schema.arguments]
    for device_type, key in _AUTOCAST_KEYS.items():

        def kernel(*arguments: Any, _device: str = device_type, _key: str = key) -> Any:
            dtype = torch.get_autocast_dtype(_device)
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
            with torch._C._ExcludeDispatchKeyGuard(keys):
                pairs = zip(arguments, cast, strict=False)  # the last arguments may be left out
                return op(*[_cast(a, dtype, _device) if c else a for a, c in pairs])

        implement(name_of(op), key, kernel)


def _pick(value: Any, dim: Any, index: int) -> Any:
    if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_pick(v, d, index) for v, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, index)


def _stack(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.stack(results)
    stacked = [_stack([r[i] for r in results]) for i in range(len(first))]
    return tuple(stacked) if isinstance(first, tuple) else stacked


def _zero_dims(result: Any) -> Any:
    if isinstance(result, Tensor):
        return 0
    dims = [_zero_dims(r) for r in result]
    return tuple(dims) if isinstance(result, tuple) else dims


def register_vmap(op: Any, fold: Callable[..., Any] | None = None) -> None:
    """``fold(info, in_dims, *arguments)`` may return a fused result, else samples go one by one."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        folded = fold(info, in_dims, *arguments) if fold is not None else None
        if folded is not None:
            return folded
        results = [
            op(*[_pick(a, d, i) for a, d in zip(arguments, in_dims, strict=True)])
            for i in range(info.batch_size)
        ]
        stacked = _stack(results)
        return stacked, _zero_dims(stacked)

    torch.library.register_vmap(op._schema.name, rule, lib=replaced(name_of(op), "vmap"))
    _register_batched_gradients(op, rule)


def _register_batched_gradients(op: Any, rule: Callable[..., Any]) -> None:
    """``rule`` for ``torch.autograd.grad(is_grads_batched=True)`` and what is built of that, as
    ``jacobian(vectorize=True)``: those batch by an older vmap, which looks for it at a key."""

    if is_legacy_batchedtensor is None:
        return

    def kernel(*arguments: Any) -> Any:
        leaves, structure = tree_flatten(arguments)
        # The innermost level at which something is batched; what is left finds the rule again.
        for level in range(_MAX_LEVEL, 0, -1):
            physical = [_without_level(t, level) for t in leaves]
            sizes = [p.size(0) for p, t in zip(physical, leaves, strict=True) if p is not t]
            if sizes:
                break
        dims = [None if p is t else 0 for p, t in zip(physical, leaves, strict=True)]
        batch = SimpleNamespace(batch_size=sizes[0])
        results, _ = rule(
            batch, tree_unflatten(dims, structure), *tree_unflatten(physical, structure)
        )
        return tree_map(lambda t: torch._add_batch_dim(t, 0, level), results)

    implement(name_of(op), "Batched", kernel)


_MAX_LEVEL = 8  # of vmaps inside one another


def _without_level(value: Any, level: int) -> Any:
    """The tensor with the axis of that level in front; the same object if it has none."""
    if not isinstance(value, Tensor) or not is_legacy_batchedtensor(value):
        return value
    # Where there is none it is made up, of the size that is asked for.
    front = torch._remove_batch_dim(value, level, 0, 0)
    return front if front.size(0) else value


def fold_image(op: Any) -> Callable[..., Any]:
    """Batching rule for the first argument [N, C, H, W] when nothing else has a sample axis."""

    def fold(info: Any, in_dims: Any, image: Tensor, *rest: Any) -> Any:
        others = [d for dims in in_dims[1:] for d in (dims if isinstance(dims, list) else [dims])]
        per_sample = any(isinstance(r, Tensor) and r.dim() == 2 for r in rest)
        if in_dims[0] is None or per_sample or any(d is not None for d in others):
            return None
        image = image.movedim(in_dims[0], 0)
        out = op(image.flatten(0, 1), *rest)
        return out.unflatten(0, image.shape[:2]), 0

    return fold
