"""A model's pass as a graph of torch's ops, and its tensors' axes read off that."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ..modules.inputs import Inputs
from .factors import Axis, Factors
from .rules import RULES, Call, Place, Traced, entrywise, opaque


@dataclass(frozen=True)
class Axes:
    """Of all parameters and buffers that a pass reads, in its order."""

    factors: Factors
    of: Mapping[str, tuple[Axis, ...]]
    read: frozenset[Place]  # dimensions that sums run over


def read_axes(model: nn.Module, inputs: Inputs) -> Axes:
    """Raises ValueError for a model that torch.export cannot trace."""
    exported = _exported(model, inputs)
    stored = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    owner = {name: first.setdefault(id(tensor), name) for name, tensor in stored.items()}
    factors, read = Factors(), set[Place]()
    of: dict[str, tuple[Axis, ...]] = {}
    values: dict[Node, Any] = {}
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            is_stored = spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in owner
            if is_stored and stored[spec.target].is_floating_point():
                name = owner[spec.target]
                shape = tuple(stored[name].shape)
                of.setdefault(name, tuple(map(factors.new, shape)))
                values[node] = Traced(of[name], tuple((name, dim) for dim in range(len(shape))))
            else:
                values[node] = _pinned(factors, node, "inputs")
        elif node.op == "call_function":
            values[node] = _called(factors, read, node, values)
        elif node.op == "output":
            for tensor in _traced(node.args, values):
                for axis in tensor.axes:
                    factors.pin(axis, "outputs")
        else:
            values[node] = _pinned(factors, node, "constants")
    return Axes(factors, of, frozenset(read))


def _exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    args, options = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), dict(inputs))
    try:
        with _in_single_ops():
            return torch.export.export(model, args, options, strict=False)
    except Exception as error:  # of any kind: it runs the model's own code
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"model must be one that torch.export can trace, got {type(error).__name__}: {lines[0]}"
        ) from error


@contextmanager
def _in_single_ops() -> Iterator[None]:
    """Attention as the ops that it is made of."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _called(factors: Factors, read: set[Place], node: Node, values: Mapping[Node, Any]) -> Any:
    if node.target is operator.getitem:
        of, place = node.args
        assert isinstance(of, Node) and isinstance(place, int)
        return values[of][place] if isinstance(values[of], list) else values[of]
    given = _given(node, values)
    name = getattr(node.target, "_schema", None)
    op = name.name.partition("::")[2] if name is not None and name.name.startswith("aten::") else str(node.target)
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if op.endswith("_") and not op.startswith("_"):  # in place
        op = op[:-1]
        plain = getattr(getattr(torch.ops.aten, op, None), getattr(node.target, "_overloadname", ""), None)
        is_pointwise = is_pointwise or torch.Tag.pointwise in getattr(plain, "tags", ())
    meta = node.meta.get("val")
    made = list(meta) if isinstance(meta, (list, tuple)) else [meta]
    shapes = [tuple(map(int, value.shape)) for value in made if isinstance(value, Tensor)]
    if not shapes:
        return None
    call = Call(op, given, shapes, factors)
    result = RULES.get(op, entrywise if is_pointwise else opaque)(call)
    read |= call.read
    if isinstance(meta, Tensor):
        return result[0] if isinstance(result, list) else result
    return result if isinstance(result, list) else [result]


def _given(node: Node, values: Mapping[Node, Any]) -> dict[str, Any]:
    """Arguments by name, with the defaults of those that are not given."""

    def known(value: Any) -> Any:
        if isinstance(value, Node):
            return values[value]
        return [known(item) for item in value] if isinstance(value, (list, tuple)) else value

    schema = getattr(node.target, "_schema", None)
    if schema is None:
        named = {str(place): value for place, value in enumerate(node.args)}
    else:
        named = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
        named |= {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)}
    return {name: known(value) for name, value in (named | node.kwargs).items()}


def _pinned(factors: Factors, node: Node, by: str) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return Traced(tuple(factors.new(int(size), by) for size in value.shape))


def _traced(value: Any, values: Mapping[Node, Any]) -> Iterator[Traced]:
    if isinstance(value, Node):
        value = values[value]
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _traced(item, values)
    elif isinstance(value, dict):
        yield from _traced(list(value.values()), values)
