"""The models of a pool as state dicts, merged by one of our methods, and the model that the result goes into."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import copy, deepcopy
from functools import reduce
from typing import Any, TypeAlias

import torch
from fusion_bench import LazyStateDict
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor, nn

from ...merging import Method, Scope
from ..tensors import mergeable

Pool: TypeAlias = "BaseModelPool | dict[str, nn.Module]"
State = Mapping[str, Tensor]  # of a lazy model every tensor is read when it is asked for


def pool_of(modelpool: Pool) -> BaseModelPool:
    return modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)


def models_of(modelpool: BaseModelPool, pretrained: bool = True) -> list[nn.Module]:
    return [modelpool.load_model(name) for name in (["_pretrained_"] if pretrained else []) + modelpool.model_names]


def whole(modelpool: BaseModelPool) -> BaseModelPool:
    """The pool with its lazy models as modules, for algorithms that put their result into one."""
    pool = copy(modelpool)

    def load_model(*args: Any, **kwargs: Any) -> Any:
        model = modelpool.load_model(*args, **kwargs)
        is_known = isinstance(model, LazyStateDict) and model.meta_module is not None
        return loaded(model, dict(model.items())) if is_known else model

    vars(pool)["load_model"] = load_model
    return pool


def state_of(model: Any, removed: Collection[str] = ()) -> State:
    """Empty where FusionBench has to merge: of a module only a part, a lazy model without a module to put it into."""
    if isinstance(model, LazyStateDict) and model.meta_module is not None and not removed:
        return model
    if not isinstance(model, nn.Module) or getattr(model, "_fusion_bench_target_modules", None) is not None:
        return {}
    return {name: x for name, x in model.state_dict().items() if name not in removed}


def takes(states: Sequence[State]) -> bool:
    """Whether the ops merge all tensors of all models."""
    return (
        len(states) > 1
        and len(states[0]) > 0
        and _same_names(states)
        and all(mergeable([state[name] for state in states]) for name in states[0])
    )


def of_one_dtype(states: Sequence[State]) -> list[State]:
    """FusionBench's TIES flattens a model into one vector, integer buffers too, in the dtype that holds them all."""
    widest = reduce(torch.promote_types, (x.dtype for state in states for x in state.values()), torch.uint8)
    return [{name: x.to(widest) for name, x in state.items()} for state in states]


def fused(states: Sequence[State], method: Method, integers: str = "same") -> dict[str, Tensor] | None:
    """All tensors merged: the first state is the base where the method has one. None where the toolkit has to merge.

    Of lazy models one tensor of each is held at a time, where a method takes one tensor at a time.

    Args:
        integers: Buffers of whole numbers, which come from the first state, may differ between them ("first"), must not
            ("same"), or must not exist ("none").
    """
    if not any(isinstance(state, LazyStateDict) for state in states):
        return _fused(states, method, integers)
    if len(states) < 2 or not _same_names(states):
        return None
    if method.decides in ("scope", "model"):
        return _fused([dict(state.items()) for state in states], method, integers)
    result: dict[str, Tensor] = {}
    for name in states[0]:
        part = _fused([{name: state[name]} for state in states], method, integers)
        if part is None:
            return None
        result |= part
    return result


def _fused(states: Sequence[State], method: Method, integers: str) -> dict[str, Tensor] | None:
    floats, rest = ([_part(state, floating) for state in states] for floating in (True, False))
    kept = {"first": True, "same": all(_equal(other, rest[0]) for other in rest), "none": not any(rest)}[integers]
    if not kept or not (takes(floats) or (not any(floats) and rest[0])):
        return None
    return rest[0] | (merged(floats, method) if floats[0] else {})


def merged(states: Sequence[State], method: Method) -> dict[str, Tensor]:
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


def loaded(model: Any, state: State, inplace: bool = True) -> nn.Module:
    """The model, or a copy of it, with these tensors; of a lazy one its module."""
    if isinstance(model, LazyStateDict):
        module = deepcopy(model.meta_module).to_empty(device=model._device)
        # a checkpoint may hold fewer names than there are, where they are tied
        unknown = module.load_state_dict(state, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"names of the merged tensors must be of the model, got {unknown}")
        return module
    model = model if inplace else deepcopy(model)
    model.load_state_dict(state)
    return model


def _same_names(states: Sequence[State]) -> bool:
    names = set(states[0])
    return all(set(state) == names for state in states)


def _part(state: State, floating: bool) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if x.is_floating_point() == floating}


def _equal(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in state.items())
