# SPDX-License-Identifier: BSD-3-Clause
"""Classes that are known by name: how each is fused, or what a look at its structure needs.

Packages add theirs by :func:`register_adapter`, or through the entry point group
``aspp_ext.adapters``, whose entries are functions without arguments that call it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from aspp_ext.modules.fused import FusedForward
from aspp_ext.ops.checks import shown

from .known import feature_list

GROUP = "aspp_ext.adapters"
ExampleInputs = Callable[[nn.Module], tuple[Any, ...]]


class Adapter(NamedTuple):
    """A known class, as "module:name", and its fused subclass, or arguments to read it by.

    Neither class is imported before an instance of the known one is met.
    """

    source: str
    fused: str | type[FusedForward] | None = None
    example_inputs: ExampleInputs | None = None

    def fused_class(self) -> type[FusedForward] | None:
        """The fused subclass, imported (its library is loaded already)."""
        if not isinstance(self.fused, str):
            return self.fused
        module, _, name = self.fused.partition(":")
        return getattr(importlib.import_module(module), name)


_OWN = (
    Adapter(
        "torchvision.models.segmentation.deeplabv3:ASPP",
        "aspp_ext.fuse.torchvision:FusedASPP",
    ),
    Adapter(
        "segmentation_models_pytorch.decoders.deeplabv3.decoder:ASPP",
        "aspp_ext.fuse.smp:FusedASPP",
    ),
    # Their forward takes the backbone's feature maps as a list, so the head's parts are no module
    # of one map.
    *(
        Adapter(f"mmseg.models.decode_heads.{source}", example_inputs=feature_list)
        for source in ("aspp_head:ASPPHead", "sep_aspp_head:DepthwiseSeparableASPPHead")
    ),
)
ADAPTERS: dict[str, Adapter] = {adapter.source: adapter for adapter in _OWN}
_loaded: set[str] = set()


def register_adapter(
    source: str | type[nn.Module],
    fused: str | type[FusedForward] | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> None:
    """Make a class known to :func:`aspp_ext.fuse` by name; the last one said of a class counts.

    Most classes need none: :func:`aspp_ext.fuse` reads their structure. One whose forward takes
    something else than one map is told ``example_inputs`` for that, and one that cannot be read so
    gets a fused class, a mix-in of :class:`aspp_ext.modules.fused.FusedForward` and the class::

        class FusedHead(FusedForward, Head):
            original = Head

            @classmethod
            def describe(cls, module):
                return aspp_ext.modules.head.Head(...)   # of module's own layers, or Unfusable

    Args:
        source: the class, or "module:qualified name" of it, not imported before it is met.
        fused: the fused class, or "module:name" of it.
        example_inputs: of a module of the class, the positional arguments of its forward, tensors
            or lists and tuples of them; of any size, on the meta device or with memory.

    Raises:
        TypeError: what is given is something else.
        ValueError: neither fused nor example_inputs is given, or a name is not "module:name".
    """
    name = source if isinstance(source, str) else path_of(source)
    if not isinstance(source, str) and not (
        isinstance(source, type) and issubclass(source, nn.Module)
    ):
        raise TypeError(
            f"register_adapter: source must be a class of modules or its name, got {shown(source)}"
        )
    ours = isinstance(fused, type) and issubclass(fused, FusedForward)
    if not (fused is None or isinstance(fused, str) or ours):
        raise TypeError(
            "register_adapter: fused must be a subclass of FusedForward or its name, got "
            f"{shown(fused)}"
        )
    if not (example_inputs is None or callable(example_inputs)):
        raise TypeError(
            f"register_adapter: example_inputs must be a function, got {shown(example_inputs)}"
        )
    for said in (name, fused):
        if isinstance(said, str) and not all(said.partition(":")):
            raise ValueError(f"register_adapter: a name must be 'module:name', got {said!r}")
    if fused is None and example_inputs is None:
        raise ValueError(
            "register_adapter: fused or example_inputs must be given, got neither: without an "
            "adapter a class is read by its structure"
        )
    ADAPTERS[name] = Adapter(name, fused, example_inputs)


def adapter_of(module: nn.Module) -> Adapter | None:
    """That of exactly the module's class."""
    _load()
    return ADAPTERS.get(path_of(type(module)))


def path_of(kind: type) -> str:
    """ "module:qualified name"."""
    return f"{kind.__module__}:{kind.__qualname__}"


def _load() -> None:
    for point in importlib.metadata.entry_points(group=GROUP):
        if point.value in _loaded:
            continue
        _loaded.add(point.value)
        try:
            point.load()()
        except Exception as error:
            warnings.warn(
                f"aspp_ext.fuse: the adapters of {point.value} could not be loaded: {error}",
                stacklevel=2,
            )
