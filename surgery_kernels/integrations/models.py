"""The models of a toolkit's pool merged by one of our methods."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from functools import reduce

import torch
from torch import Tensor, nn

from ..merging import Method, Scope
from .tensors import mergeable

State = dict[str, Tensor]


def state_of(model: nn.Module, removed: Collection[str] = ()) -> State:
    """Empty where it is no module: FusionBench has lazy state dicts, and modules of which only a part is merged."""
    if not isinstance(model, nn.Module) or getattr(model, "_fusion_bench_target_modules", None) is not None:
        return {}
    return {name: x for name, x in model.state_dict().items() if name not in removed}


def takes(states: Sequence[State]) -> bool:
    """Whether the ops merge all tensors of all models."""
    return (
        len(states) > 1
        and len(states[0]) > 0
        and all(state.keys() == states[0].keys() for state in states)
        and all(mergeable([state[name] for state in states]) for name in states[0])
    )


def of_one_dtype(states: Sequence[State]) -> list[State]:
    """FusionBench's TIES flattens a model into one vector, integer buffers too, in the dtype that holds them all."""
    widest = reduce(torch.promote_types, (x.dtype for state in states for x in state.values()), torch.uint8)
    return [{name: x.to(widest) for name, x in state.items()} for state in states]


def fused(states: Sequence[State], method: Method, integers: str = "same") -> State | None:
    """All tensors merged: the first state is the base where the method has one. None where the toolkit has to merge.

    Args:
        integers: Buffers of whole numbers, which come from the first state, may differ between them ("first"), must not
            ("same"), or must not exist ("none").
    """
    floats, rest = ([_part(state, floating) for state in states] for floating in (True, False))
    kept = {"first": True, "same": all(_equal(other, rest[0]) for other in rest), "none": not any(rest)}[integers]
    return rest[0] | merged(floats, method) if kept and takes(floats) else None


def merged(states: Sequence[State], method: Method) -> State:
    """Not `merge_state_dicts`: here tied tensors count as often as they have names."""
    first = states[0]
    base, experts = (None, states) if method.base == "none" else (first, states[1:])
    result = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in first.items()}
    for names in [list(first)] if method.decides == "scope" else [[name] for name in first]:
        method.merge(
            Scope(
                names=names,
                base=[] if base is None else [base[name] for name in names],
                experts=[[expert[name] for expert in experts] for name in names],
                out=[result[name] for name in names],
                owner={name: name for name in names},
            )
        )
    return result


def loaded(model: nn.Module, state: State, inplace: bool = True) -> nn.Module:
    """The model, or a copy of it, with these tensors."""
    model = model if inplace else deepcopy(model)
    model.load_state_dict(state)
    return model


def _part(state: State, floating: bool) -> State:
    return {name: x for name, x in state.items() if x.is_floating_point() == floating}


def _equal(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())
