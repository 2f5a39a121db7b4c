# SPDX-License-Identifier: BSD-3-Clause
"""The promise that parameters stay as they are, for what it costs to look."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from aspp_ext.ops.checks import check_module

from .fused import FROZEN, FusedModule

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model) -> Model:
    """Promise that nobody changes the fused modules of ``model``, in place.

    In eval mode and without gradients each then uses the weights that it folded in its first call,
    and looks neither at its parameters and buffers nor at its layers again. What was changed all
    the same is not noticed, and results stay those of the folded weights, until the next
    ``train()``, ``eval()``, ``to()``, ``load_state_dict()`` or other conversion of the module or of
    one that holds it, or call in another dtype (autocast): then it folds again, and the promise
    stands. Training is as before, and so are compiled, traced and exported programs.

    Args:
        model: any module with fused ones or :class:`aspp_ext.ASPP` in it, or one of them.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there is none in it.
    """
    return _promise("freeze", model, True)


def unfreeze(model: Model) -> Model:
    """Take the promise of :func:`freeze` back, in place; raises as it does."""
    return _promise("unfreeze", model, False)


def _promise(name: str, model: Model, frozen: bool) -> Model:
    check_module(name, model)
    fused = [module for module in model.modules() if isinstance(module, FusedModule)]
    if not fused:
        raise ValueError(
            f"{name}: expected at least one fused ASPP (see aspp_ext.fuse) in the model, found "
            f"none in {type(model).__name__}"
        )
    for module in fused:
        module.drop_folded()
        vars(module).pop(FROZEN, None)
        if frozen:
            vars(module)[FROZEN] = True
    return model
