"""Merging whole state dicts in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import arguments, looks, mix
from .method import Method
from .methods import METHODS
from .methods.linear import WiseFt
from .progress import counting_bar, progress_bar
from .scope import Scope

SCOPES = ("model", "tensor")
SMALL = 1 << 16  # elements that one more tensor, or some, may have to go by a call for another

StateDict = Mapping[str, Tensor]


def merge_state_dicts(
    base: StateDict | None,
    experts: Sequence[StateDict],
    *,
    method: str = "ties",
    scope: str | None = None,
    progress: bool | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """One state dict from several fine-tuned ones, tensor by tensor, never a copy of the model besides the result.

    Args:
        base: Pretrained state dict. Tensors of float64, float32, float16 or bfloat16 are merged; integer and boolean
            ones are copied from here. None where the method needs none: then they are those of the first expert.
        experts: num_tasks >= 1 state dicts with the names, shapes, dtypes and devices of `base`.
        method: The name of one of `surgery_kernels.merging.METHODS`; ``surgery-kernels methods NAME`` explains it.
        scope: Of methods that can decide over one tensor or over several ("ties", "breadcrumbs", "breadcrumbs_ties").
            "model": thresholds, the number kept and the sign of drawn elections are taken over all tensors together, in
            the order of `base`, as the TIES paper does; "tensor": over each alone, as mergekit and PEFT do. None:
            "model" for "ties", "tensor" for the others.
        progress: A bar on stderr: True, False, or None for one that appears after two seconds.
        **options: The parameters of the method; see its class.

    Returns:
        A dict with the names of `base`, in its order. Names that share memory in the base and in every expert (tied
        weights) share it in the result and count once. Nothing else is shared, and nothing carries a gradient.

    Raises:
        ValueError, TypeError: the state dicts differ, an option is unknown or out of range, or the model mixes float64
            with other dtypes where a scope spans it; before any work.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names tensor, expert and count.
    """
    arguments.check_one_of("method", method, tuple(METHODS))
    if not experts:
        raise ValueError("experts must be at least one state dict, got none")
    merging = method_of(method, options)
    merging.check(len(experts))
    whole = _whole(merging, scope)
    if base is None and merging.base == "required":
        raise ValueError(f"base must be given for {method}, got None")
    first = experts[0] if base is None else base
    owner = owners_of(first, experts, "experts[0]" if base is None else "base")
    merged = [name for name, tensor in first.items() if tensor.is_floating_point() and owner[name] == name]
    if whole and merging.decides_by and len({first[name].dtype == torch.float64 for name in merged}) > 1:
        raise ValueError("scope must be 'tensor' for a model that mixes float64 with other dtypes, got 'model'")
    result = {
        name: (torch.empty_like if tensor.is_floating_point() else torch.clone)(
            arguments.detached(tensor), memory_format=torch.contiguous_format
        )
        for name, tensor in first.items()
        if owner[name] == name
    }
    owner_of_merged = {name: owner[name] for name in first if first[name].is_floating_point()}
    generator = merging.generator()
    if generator is not None:
        merged = sorted(merged)  # the order in which mergekit draws
    groups = [merged] if whole else _side_by_side({name: first[name] for name in merged}, merging)
    size = sum(first[name].nbytes for name in merged)
    has_base = base is not None and merging.base != "none"
    with _followed(merging, merging.reads * (len(experts) + has_base) * size, progress) as merging, looks.put_off():
        for names in filter(None, groups):
            merging.merge(
                Scope(
                    names=names,
                    base=[arguments.detached(base[name]) for name in names] if base is not None and has_base else [],
                    experts=[[arguments.detached(expert[name]) for expert in experts] for name in names],
                    out=[result[name] for name in names],
                    owner=owner_of_merged,
                    generator=generator,
                )
            )
    return {name: result[owner[name]] for name in first}


@contextmanager
def _followed(merging: Method, total_bytes: int, shown: bool | None) -> Iterator[Method]:
    """The method under a bar of the bytes it reads, or of the steps it learns in."""
    if not merging.asks:
        with progress_bar(total_bytes, shown):
            yield merging
        return
    with counting_bar(merging.asks, "learning", "step", shown) as bar:
        objective = getattr(merging, "objective")  # noqa: B009, which what asks declares

        def counted(*arguments: Any) -> Any:
            loss = objective(*arguments)
            bar.update()
            return loss

        yield replace(merging, **{"objective": counted})


def wise_ft_curve(
    base: StateDict, expert: StateDict, ts: Sequence[float], *, nonfinite: str = "error"
) -> list[dict[str, Tensor]]:
    """``(1 - t) * base + t * expert`` for every t of `ts`, from one read of both.

    Args:
        base: Pretrained state dict; integer and boolean tensors are copied from here.
        expert: Its fine-tuned version, with the same names, shapes, dtypes and devices.
        ts: Finite numbers; 0 gives the base, 1 the expert.
        nonfinite: As in `mix`.

    Returns:
        One state dict for every t, each as ``merge_state_dicts(base, [expert], method="wise_ft", t=t)`` gives it.

    Raises:
        As `merge_state_dicts`.

    Source: Robust fine-tuning of zero-shot models (arXiv 2109.01903), equation 1.
    """
    for t in ts:
        WiseFt(t, nonfinite).check(1)
    owner = owners_of(base, [expert], "base")
    curve: list[dict[str, Tensor]] = [{} for _ in ts]
    for name, tensor in base.items():
        if owner[name] != name:
            merged = [point[owner[name]] for point in curve]
        elif tensor.is_floating_point():
            merged = list(
                mix(
                    tensor,
                    [expert[name]],
                    [[t] for t in ts],
                    base_coefficients=[1 - t for t in ts],
                    task_vectors=False,
                    nonfinite=nonfinite,
                )
                if ts
                else []
            )
        else:
            merged = [tensor.detach().clone() for _ in ts]
        for point, one in zip(curve, merged, strict=True):
            point[name] = one
    return curve


def _whole(merging: Method, scope: str | None) -> bool:
    """Whether all tensors are decided together."""
    if scope is not None:
        arguments.check_one_of("scope", scope, SCOPES)
    if merging.decides == "scope":
        return (scope or merging.scope) == "model"
    only = "model" if merging.decides == "model" else "tensor"
    if scope not in (None, only) and merging.decides != "element":
        raise ValueError(f"scope must be {only!r} for {merging.name}, got {scope!r}")
    return only == "model"


def method_of(name: str, options: Mapping[str, Any]) -> Method:
    known = [parameter.name for parameter in METHODS[name].parameters()]
    for option in options:
        if option not in known:
            raise TypeError(f"options of method={name!r} must be among {', '.join(known)}, got {option!r}")
    return METHODS[name](**options)


def _side_by_side(tensors: StateDict, merging: Method) -> list[list[str]]:
    """Where tensors decide nothing together: each alone, but all of a GPU by the same launches, and on the CPU those
    by the call for the one before that take less time than a call."""
    groups: dict[object, list[str]] = {}
    before, room = None, 0
    for name, tensor in tensors.items():
        launch = (tensor.device, tensor.dtype == torch.float64)
        if not merging.batched:
            groups[name] = [name]
        elif tensor.is_cuda:
            groups.setdefault(launch, []).append(name)
        elif before is not None and before[1:] == launch and tensor.numel() <= room:
            groups[before[0]].append(name)
            room -= tensor.numel()
        else:
            groups[name] = [name]
            before, room = (name, *launch), SMALL
    return list(groups.values())


def owners_of(first: StateDict, experts: Sequence[StateDict], argument: str) -> dict[str, str]:
    """Every name with the first name that shares its memory in all models, which have the same tensors.

    What is unlike is looked for one by one only where something is.
    """
    names = list(first)
    owners: list[int] = []
    if all(expert.keys() == first.keys() for expert in experts):
        tensors = [model[name] for name in names for model in (first, *experts)]
        if all(issubclass(kind, Tensor) for kind in set(map(type, tensors))):
            owners = torch.ops.surgery_kernels_lists.first_of_tied(tensors, 1 + len(experts))
    if not names or len(owners) < len(names) or not all(_is_known(tensor) for tensor in first.values()):
        _check_same_tensors(first, experts, argument)
    return {name: names[owner] for name, owner in zip(names, owners, strict=True)}


def _is_known(tensor: Tensor) -> bool:
    return tensor.dtype in arguments.DTYPES or not (tensor.is_floating_point() or tensor.is_complex())


def _check_same_tensors(first: StateDict, experts: Sequence[StateDict], argument: str) -> None:
    """Raises for what is unlike, in words."""
    for i, expert in enumerate(experts):
        if missing := [name for name in first if name not in expert]:
            raise ValueError(f"experts[{i}] must have the names of {argument}, got no {_some(missing)}")
        if extra := [name for name in expert if name not in first]:
            raise ValueError(f"experts[{i}] must have the names of {argument}, got also {_some(extra)}")
    for name, tensor in first.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if not _is_known(tensor):
            raise ValueError(
                f"{argument}[{name!r}] must be float64, float32, float16, bfloat16 or an integer type, "
                f"got {tensor.dtype}"
            )
        for i, expert in enumerate(experts):
            arguments.check_like(f"experts[{i}][{name!r}]", expert[name], tensor, f"{argument}[{name!r}]")


def _some(names: list[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
