"""Merging whole state dicts in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..ops import arguments
from .methods.adamerging import AdaMerging
from .methods.average import Average
from .methods.fisher import Fisher
from .methods.regmean import RegMean
from .methods.task_arithmetic import TaskArithmetic
from .methods.ties import Ties
from .progress import progress_bar
from .scope import Method, Scope

METHODS: dict[str, Any] = {  # dataclasses that are a Method
    "ties": Ties,
    "average": Average,
    "task_arithmetic": TaskArithmetic,
    "adamerging": AdaMerging,
    "fisher": Fisher,
    "regmean": RegMean,
}
SCOPES = ("model", "tensor")

StateDict = Mapping[str, Tensor]


def merge_state_dicts(
    base: StateDict,
    experts: Sequence[StateDict],
    *,
    method: str = "ties",
    scope: str = "model",
    progress: bool | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """One state dict from several fine-tuned ones, tensor by tensor, never a copy of the model besides the result.

    Args:
        base: Pretrained state dict. Tensors of float64, float32, float16 or bfloat16 are merged; integer and boolean
            ones are copied from here.
        experts: num_tasks >= 1 state dicts with the names, shapes, dtypes and devices of `base`.
        method: "ties" (options density, lam, weights, semantics, elect, reduce, normalize, rescale, nonfinite, as in
            `ties_merge`), "average" (weights, normalize: divided by their sum; nonfinite), "task_arithmetic" (lam,
            weights, nonfinite), "adamerging" (objective, granularity, density, initial, lr, steps, receive), "fisher"
            (fishers, weights, floor) or "regmean" (grams, off_diagonal); see the classes in `surgery_kernels.merging`.
        scope: "model": thresholds, the number kept and the sign of drawn elections are taken over all tensors
            together, in the order of `base`, as the TIES paper does; "tensor": over each alone, as mergekit and PEFT
            do. Other methods have nothing to take over several tensors, or learn from the whole model anyway.
        progress: A bar on stderr: True, False, or None for one that appears after two seconds.
        **options: Of the method.

    Returns:
        A dict with the names of `base`, in its order. Names that share memory in the base and in every expert (tied
        weights) share it in the result and count once. Nothing else is shared, and nothing carries a gradient.

    Raises:
        ValueError, TypeError: the state dicts differ, an option is unknown or out of range, or the model mixes float64
            with other dtypes where a scope spans it; before any work.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names tensor, expert and count.
    """
    arguments.check_one_of("method", method, tuple(METHODS))
    arguments.check_one_of("scope", scope, SCOPES)
    if not experts:
        raise ValueError("experts must be at least one state dict, got none")
    merging = _method(method, options)
    merging.check(len(experts))
    _check_same_tensors(base, experts)

    owner = _tied(base, experts)
    merged = [name for name, tensor in base.items() if tensor.is_floating_point() and owner[name] == name]
    shared = scope == "model" and merging.shares
    if shared and len({base[name].dtype == torch.float64 for name in merged}) > 1:
        raise ValueError("scope must be 'tensor' for a model that mixes float64 with other dtypes, got 'model'")
    result = {
        name: (torch.empty_like if tensor.is_floating_point() else torch.clone)(
            tensor.detach(), memory_format=torch.contiguous_format
        )
        for name, tensor in base.items()
        if owner[name] == name
    }
    owner_of_merged = {name: owner[name] for name in base if base[name].is_floating_point()}
    groups = [merged] if shared or merging.whole else _side_by_side({name: base[name] for name in merged}, merging)
    size = sum(base[name].nbytes for name in merged)
    with progress_bar(merging.reads * (len(experts) + 1) * size, progress):
        for names in filter(None, groups):
            merging.merge(
                Scope(
                    names=names,
                    base=[base[name].detach() for name in names],
                    experts=[[expert[name].detach() for expert in experts] for name in names],
                    out=[result[name] for name in names],
                    owner=owner_of_merged,
                )
            )
    return {name: result[owner[name]] for name in base}


def _method(name: str, options: Mapping[str, Any]) -> Method:
    known = [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            raise TypeError(f"options of method={name!r} must be among {', '.join(known)}, got {option!r}")
    return METHODS[name](**options)


def _side_by_side(tensors: StateDict, merging: Method) -> list[list[str]]:
    """Where tensors decide nothing together: each alone, but all of a GPU by the same launches."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        launch = (tensor.device, tensor.dtype == torch.float64)
        groups.setdefault(launch if tensor.is_cuda and not merging.shares else name, []).append(name)
    return list(groups.values())


def _check_same_tensors(base: StateDict, experts: Sequence[StateDict]) -> None:
    for i, expert in enumerate(experts):
        if missing := [name for name in base if name not in expert]:
            raise ValueError(f"experts[{i}] must have the names of base, got no {_some(missing)}")
        if extra := [name for name in expert if name not in base]:
            raise ValueError(f"experts[{i}] must have the names of base, got also {_some(extra)}")
    for name, tensor in base.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"base[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in arguments.DTYPES:
            raise ValueError(
                f"base[{name!r}] must be float64, float32, float16, bfloat16 or an integer type, got {tensor.dtype}"
            )
        for i, expert in enumerate(experts):
            arguments.check_like(f"experts[{i}][{name!r}]", expert[name], tensor, f"base[{name!r}]")


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _tied(base: StateDict, experts: Sequence[StateDict]) -> dict[str, str]:
    """Every name with the first name that shares its memory in the base and in every expert."""
    first: dict[object, str] = {}
    owner = {}
    for name, tensor in base.items():
        views = [tensor, *(expert[name] for expert in experts)]
        memory = tuple((view.data_ptr(), view.dtype, view.shape, view.stride()) for view in views)
        owner[name] = first.setdefault(memory, name) if all(view.data_ptr() for view in views) else name
    return owner
