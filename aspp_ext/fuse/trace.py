# SPDX-License-Identifier: BSD-3-Clause
"""A module's forward as steps, by ``torch.export`` of a copy without memory, for maps of any size.

It is exported in eval and in training mode; a module of which the two differ in more than training
flags is refused, and so is one that decides by the sizes or the values of its maps. Where export
cannot read what may well be harmless, the refusal is an :class:`Unread`.
"""

from __future__ import annotations

import inspect
import operator
import random
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_map, tree_unflatten

from aspp_ext.modules.parts import Unfusable, Unread
from aspp_ext.modules.program import Device, Dtype, Layer, Operator, Param, Ref, Training, find

from .apart import quiet
from .decisions import decisions_by_size
from .observe import in_a_line


class Traced(NamedTuple):
    """The steps in order, and of each value what is known."""

    steps: list[Layer | Operator]
    shapes: dict[int, Sequence[Any] | None]  # of a value: sizes, symbols among them
    roots: dict[int, int]  # of a value: that in whose memory it lies
    mutated: dict[int, int]  # of a step, by what it gives: the value that it writes to
    owners: dict[int, str]  # of a step, by what it gives: the module whose forward has it
    arguments: tuple[Any, ...]
    channels: tuple[int, ...]
    result: Any


def trace(twin: nn.Module, arguments: tuple[Any, ...], whole: Collection[str] = ()) -> Traced:
    """The steps of ``twin(*arguments)``, both on the meta device.

    The submodules ``whole``, named by their paths, are called as they are.

    Raises:
        Unfusable: in words.
    """
    drawn = _outer_state()
    # In another dtype, too: what differs like that is not a constant.
    wide = tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, arguments)
    eval_ = _steps(twin.eval(), arguments, whole)
    try:
        train = _steps(twin.train().double(), wide, whole)
    except Unfusable as refusal:
        raise _by_cumulative_norms(twin, wide, whole) or refusal from None
    finally:
        twin.float()
    if drawn != _outer_state():
        raise Unfusable("its forward draws random numbers outside of PyTorch")
    return _merged(eval_, train)


def _by_cumulative_norms(
    twin: nn.Module, arguments: tuple[Any, ...], whole: Collection[str]
) -> Unread | None:
    """The refusal, if norms that count their batches are all that cannot be read in training."""
    norms = [m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    norms = [m for m in norms if m.momentum is None]
    try:
        for norm in norms:
            norm.momentum = 0.1
        _steps(twin, arguments, whole)
    except Unfusable:
        return None
    finally:
        for norm in norms:
            norm.momentum = None
    return Unread("it has a batch norm with momentum=None") if norms else None


def _outer_state() -> tuple[Any, ...]:
    """Of the generators of Python and, if somebody has imported it, of numpy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else str(numpy.random.get_state())


def _steps(twin: nn.Module, arguments: tuple[Any, ...], whole: Collection[str]) -> Traced:
    exported = _export(twin, arguments)
    return _Reader(twin, exported, arguments, whole).read()


def _export(twin: nn.Module, arguments: tuple[Any, ...]) -> torch.export.ExportedProgram:
    count = iter(range(1000))
    batch = torch.export.Dim("n", min=2)

    def dims(x: Tensor) -> dict[int, Any]:
        i = next(count)
        height, width = (torch.export.Dim(f"{axis}{i}", min=2) for axis in "hw")
        return {0: batch, 2: height, 3: width}

    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if deterministic:  # in which one operator becomes many
            torch.use_deterministic_algorithms(False)
        with warnings.catch_warnings(), quiet(), decisions_by_size() as decided:
            warnings.simplefilter("ignore")
            named = inspect.signature(twin.forward).bind(*arguments).arguments
            shapes = tree_map(dims, dict(named))  # of *arguments those are one
            exported = torch.export.export(twin, arguments, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _refusal(error, bool(decided)) from error
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=warns)
    # Of these no step and no range tells. That maps are of one batch is asked for above.
    guards = getattr(exported, "_guards_code", None) or []
    if any(_EQUAL_BATCHES.fullmatch(guard) is None for guard in guards):
        raise _by_sizes(bool(decided))
    return exported


_EQUAL_BATCHES = re.compile(r"L\['\w+'\]\S*\.size\(\)\[0\] == L\['\w+'\]\S*\.size\(\)\[0\]")


def _refusal(error: Exception, decides: bool) -> Unfusable:
    """In words, where the module's own Python ``decides`` by sizes or does not."""
    text, kind = str(error), type(error).__name__
    if "DataDependent" in kind or "DataDependent" in text or ".item()" in text:
        return Unfusable("its forward decides by the values of its maps")
    if "specialized" in text and not decides:
        return Unread("its forward makes numbers of the sizes of its maps")
    if decides or "Constraints violated" in text:
        return _by_sizes(decides)
    return Unread(f"torch.export cannot read it: {kind}: {in_a_line(error)}")


def _by_sizes(decides: bool) -> Unfusable:
    if decides:
        return Unfusable("its forward decides by the sizes of its maps")
    return Unread("its forward takes maps of some sizes alone")


class _Reader:
    """Numbers the values of an exported program and gathers the nodes of each layer."""

    def __init__(
        self, twin: nn.Module, exported: Any, arguments: tuple[Any, ...], whole: Collection[str]
    ) -> None:
        self.twin, self.exported, self.given, self.whole = twin, exported, arguments, whole
        self.values: dict[Node, Any] = {}  # Ref, Param, or what stands for either
        self.traced = Traced([], {}, {}, {}, {}, (), (), None)
        signature = exported.graph_signature
        self.parameters = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.constants = set(signature.inputs_to_lifted_tensor_constants)

    def read(self) -> Traced:
        graph = self.exported.graph
        inputs = []
        for node in graph.find_nodes(op="placeholder"):
            if node.name in self.constants:
                raise Unread("its forward makes a constant tensor")
            if node.name in self.parameters:
                self.values[node] = Param(self.parameters[node.name])
            else:
                inputs.append(self._new(node))
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        for layer, group in self._groups(nodes):
            one = layer is not None and self._add_layer(layer, group)
            if not one and layer in self.whole:
                raise Unfusable(f"{layer} takes or gives more than one map")
            if not one:
                for node in group:
                    self._add(node)
        (output,) = graph.find_nodes(op="output")
        leaves = [self._argument(a) for a in output.args[0]]
        if not all(isinstance(leaf, Ref) for leaf in leaves):
            raise Unread("its forward returns something else than maps")
        spec = self.exported.call_spec.out_spec
        if not _plain_result(result := tree_unflatten(leaves, spec)):
            raise Unread(f"its forward returns a {type(result).__name__}")
        refs = iter(inputs)
        channels = tuple(int(n.meta["val"].shape[1]) for n in self._user_inputs())
        return self.traced._replace(
            arguments=tree_map(lambda _: next(refs), self.given), channels=channels, result=result
        )

    def _user_inputs(self) -> list[Node]:
        found = self.exported.graph.find_nodes(op="placeholder")
        return [n for n in found if n.name not in self.parameters]

    def _new(self, node: Node) -> Ref:
        number = len(self.traced.shapes)
        value = node.meta.get("val")
        self.traced.shapes[number] = tuple(value.shape) if isinstance(value, Tensor) else None
        self.traced.roots[number] = number
        self.values[node] = Ref(number)
        return Ref(number)

    def _groups(self, nodes: list[Node]) -> Iterator[tuple[str | None, list[Node]]]:
        """Neighbours that belong to one call of a layer, by its path."""
        group: list[Node] = []
        current: tuple[str, str] | None = None
        for node in nodes:
            key = self._layer_of(node)
            if group and (key is None or key != current):
                yield (None if current is None else current[1]), group
                group = []
            group, current = [*group, node], key
        if group:
            yield (None if current is None else current[1]), group

    def _layer_of(self, node: Node) -> tuple[str, str] | None:
        """(call, path) of the outermost module around the node that is called as a whole."""
        for call, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if not isinstance(path, str) or path.startswith("_"):
                continue
            path = path.split("@")[0]
            if path and (path in self.whole or _is_layer(find(self.twin, path))):
                return call, path
        return None

    def _add_layer(self, path: str, group: list[Node]) -> bool:
        """As one step, if the call has one map and gives one."""
        layer = find(self.twin, path)
        own = path not in self.whole and not type(layer).__module__.startswith("torch.nn.")
        if own and len(group) == 1:
            return False  # one operator, under somebody's own name
        inside = set(group)
        for node in group:  # a count goes on where it is
            first = node.args[0] if node.args else None
            written = self.values.get(first) if isinstance(first, Node) else None
            if _writes(node.target) and isinstance(written, Param):
                self.values[node] = written
        read = dict.fromkeys(
            a for n in group for a in n.all_input_nodes if a not in inside and self._is_map(a)
        )
        given = [n for n in group if n not in self.values and any(u not in inside for u in n.users)]
        if len(read) != 1 or len(given) != 1:
            return False
        source = self.values[next(iter(read))]
        if not isinstance(source, Ref):
            return False
        out = self._new(given[0])
        self.traced.steps.append(Layer(path, source.number, out.number))
        lies: dict[Node, int] = {next(iter(read)): source.number}
        for node in group:
            first = node.args[0] if node.args else None
            if isinstance(first, Node) and first in lies and _shares(node.target):
                lies[node] = lies[first]
                if _writes(node.target):
                    self.traced.mutated[out.number] = source.number
            elif isinstance(first, Node) and first in lies and _writes(node.target):
                self.traced.mutated[out.number] = source.number
        if given[0] in lies:
            self.traced.roots[out.number] = self.traced.roots[source.number]
        return True

    def _is_map(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), Tensor) and not isinstance(
            self.values.get(node), Param
        )

    def _add(self, node: Node) -> None:
        if node.op != "call_function":  # the body of a context manager
            raise Unfusable("its forward has a region of its own, as no_grad or autocast make one")
        target = node.target
        if _is_check(target):
            return
        name = _name_of(target)
        if name is None:
            raise Unread(f"its forward calls {target}, which cannot be read")
        if name == "aten.expand_as.default" and (sizes := self._sizes(node)) is not None:
            # Of the other map only the size is read, which others have.
            name, arguments = "aten.expand.default", (self._argument(node.args[0]), sizes)
        else:
            arguments = tuple(self._argument(a) for a in node.args)
        keywords = tuple((k, self._argument(v)) for k, v in node.kwargs.items())
        out = self._new(node)
        self.traced.steps.append(Operator(name, arguments, keywords, out.number))
        self.traced.owners[out.number] = _owner(node)
        first = arguments[0] if arguments else None
        if _writes(target):
            if not isinstance(first, Ref):
                raise Unfusable(f"its forward writes to {_shown(first)}")
            self.traced.mutated[out.number] = first.number
        if isinstance(first, Ref) and _shares(target):
            self.traced.roots[out.number] = self.traced.roots[first.number]

    def _sizes(self, node: Node) -> tuple[Any, ...] | None:
        """The sizes of an image, of which H and W are read off a map that comes in."""
        shape = node.meta["val"].shape
        found: list[Any] = [-1, -1]
        for size in map(str, shape[2:]):
            places = (
                (n, d)
                for n in self._user_inputs()
                for d in (2, 3)
                if str(n.meta["val"].shape[d]) == size
            )
            place = next(places, None)
            if place is None:
                return None
            source, dim = place
            number = len(self.traced.shapes)
            self.traced.shapes[number], self.traced.roots[number] = None, number
            step = Operator("aten.sym_size.int", (self.values[source], dim), (), number)
            self.traced.steps.append(step)
            self.traced.owners[number] = ""
            found.append(Ref(number))
        return tuple(found) if len(found) == 4 else None

    def _argument(self, given: Any) -> Any:
        if isinstance(given, Node):
            return self.values[given]
        if isinstance(given, (list, tuple)):
            return tuple(self._argument(a) for a in given)
        if isinstance(given, torch.device):
            if given.type == "meta":  # the maps'
                return Device(0)
            raise Unread("its forward makes tensors on a device of its choice")
        return given


def _owner(node: Node) -> str:
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {"": ("", "")}).values()]
    return "" if stack[-1].startswith("_") else stack[-1].split("@")[0]


def _shown(given: Any) -> str:
    return given.path if isinstance(given, Param) else "a constant"


def _is_layer(module: nn.Module) -> bool:
    """Whether it is called as a whole: a module without parts, of one map."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return True
    if next(module.children(), None) is not None or isinstance(module, nn.Conv2d):
        return type(module) is nn.Conv2d
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 1 and all(p.kind in positional for p in parameters)


def _name_of(target: Any) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name if name.split(".")[0] in ("aten",) else None
    name = getattr(target, "__name__", "")
    return f"operator.{name}" if getattr(operator, name, None) is target else None


_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_assert_async")


def _is_check(target: Any) -> bool:
    name = str(target)
    if "_assert_tensor_metadata" in name:
        return True
    if any(check in name for check in _CHECKS):
        raise Unfusable("its forward decides by the sizes of its maps")
    return False


# Operators of PyTorch's that may return their argument, though their schemas do not say so.
_MAY_SHARE = {
    *("contiguous", "reshape", "flatten", "dropout", "feature_dropout", "to", "expand_as"),
    *("view_as", "reshape_as", "type_as", "chunk", "narrow", "unflatten", "squeeze", "movedim"),
    *("alpha_dropout", "feature_alpha_dropout", "float", "double", "half", "swapaxes", "ravel"),
    *("tensor_split", "hsplit", "vsplit", "dsplit", "pad", "adaptive_avg_pool2d", "moveaxis"),
}


def _shares(target: Any) -> bool:
    """Whether what it gives may lie in the memory of its first argument."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    if any(r.alias_info is not None for r in schema.returns):
        return True
    return schema.name.partition("::")[2] in _MAY_SHARE


def _writes(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _plain_result(result: Any) -> bool:
    if isinstance(result, Ref):
        return True
    if type(result) in (tuple, list):
        return all(map(_plain_result, result))
    return type(result) is dict and all(map(_plain_result, result.values()))


def _merged(eval_: Traced, train: Traced) -> Traced:
    """The steps of both modes, with flags where they differ in those alone."""
    different = Unfusable("its forward computes something else in training mode")
    if len(eval_.steps) != len(train.steps) or eval_.result != train.result:
        raise different
    steps: list[Layer | Operator] = []
    for one, other in zip(eval_.steps, train.steps, strict=True):
        if one == other:
            steps.append(one)
            continue
        if not (isinstance(one, Operator) and isinstance(other, Operator)):
            raise different
        if one.target != other.target or one.out != other.out:
            raise different
        names = [name for name, _ in one.keywords]
        if names != [name for name, _ in other.keywords]:
            raise different
        flag = Training(train.owners[one.out])
        arguments = _with_flags(one.arguments, other.arguments, flag)
        mine, theirs = ([v for _, v in step.keywords] for step in (one, other))
        values = _with_flags(mine, theirs, flag)
        if arguments is None or values is None:
            raise different
        keywords = tuple(zip(names, values, strict=True))
        steps.append(one._replace(arguments=arguments, keywords=keywords))
    mutated = {**eval_.mutated, **train.mutated}
    return train._replace(steps=steps, mutated=mutated)


def _with_flags(
    eval_: Sequence[Any], train: Sequence[Any], flag: Training
) -> tuple[Any, ...] | None:
    if len(eval_) != len(train):
        return None
    merged: list[Any] = []
    for one, other in zip(eval_, train, strict=True):
        if one is False and other is True:
            merged.append(flag)
        elif (one, other) == (torch.float32, torch.float64):
            merged.append(Dtype(0))
        elif type(one) is type(other) and one == other:
            merged.append(one)
        else:
            return None
    return tuple(merged)


__all__ = ["Traced", "trace"]
