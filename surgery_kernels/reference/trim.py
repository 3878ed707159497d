"""Exact thresholds, by a sort."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .scope import Entry, Experts, load_scope, one_tensor_scope, per_expert, scope_keys


def keep_count(num_params: int, density: float, semantics: str) -> int:
    """How many of `num_params` entries `density` keeps; the product is a float64 floor in every toolkit."""
    if density >= 1:
        return num_params
    floor = int(density * num_params)
    return min(
        {"paper": floor + 1, "mergekit": max(1, floor), "exact": max(1, floor), "peft": floor}[semantics], num_params
    )


def trim_thresholds(base: Tensor | None, experts: Experts, **options: Any) -> Tensor:
    """The keep-th largest abs(expert - base) of each expert.  # [num_tasks]"""
    return scope_thresholds(*one_tensor_scope(base, experts), **options)


def scope_thresholds(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float | Sequence[float],
    semantics: str = "paper",
    nonfinite: str = "error",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    keys = scope_keys(load_scope(bases, experts, nonfinite, compute_dtype))
    densities = per_expert(density, len(experts))
    keeps = [keep_count(keys.shape[1], d, semantics) for d in densities]
    return torch.stack([threshold_of(keys_t, keep) for keys_t, keep in zip(keys, keeps, strict=True)])


def trim(
    scope: Sequence[Entry],
    densities: Sequence[float],
    semantics: str,
    thresholds: Tensor | Sequence[float] | None,
    cuts: Sequence[int] | None = None,
    upper: Tensor | Sequence[float] | None = None,
    upper_cuts: Sequence[int] | None = None,
) -> None:
    keys = scope_keys(scope)
    kept = torch.zeros_like(keys, dtype=torch.bool)
    index = torch.arange(keys.shape[1])
    for t, keys_t in enumerate(keys):
        if thresholds is not None:
            threshold = torch.as_tensor(thresholds[t], dtype=keys.dtype)
            kept[t] = kept_entries(keys_t, threshold, None)
            if cuts is not None:
                kept[t] &= ~((keys_t == threshold) & (index >= cuts[t]))
        else:
            keep = keep_count(keys_t.numel(), densities[t], semantics)
            kept[t] = kept_entries(keys_t, threshold_of(keys_t, keep), None if semantics == "paper" else keep)
        if upper is not None:
            limit = torch.as_tensor(upper[t], dtype=keys.dtype)
            kept[t] &= ~((keys_t > limit) | ((keys_t == limit) & (index < (upper_cuts[t] if upper_cuts else 0))))
    mask(scope, kept.split([entry.base.numel() for entry in scope], dim=1))


def mask(scope: Sequence[Entry], masks: Sequence[Tensor]) -> None:
    """Trims away what a mask does not keep.  # one per tensor: bool [num_tasks, num_params], or [1, num_params]"""
    for entry, kept in zip(scope, masks, strict=True):
        entry.trimmed = torch.where(kept, entry.trimmed, 0.0)


def threshold_of(keys: Tensor, keep: int) -> Tensor:
    """The keep-th largest key, NaN counting as the largest; 0 where everything is kept, +inf where nothing is."""
    if keep >= keys.numel():
        return keys.new_tensor(0.0)
    if keep == 0:
        return keys.new_tensor(torch.inf)
    return keys.sort(descending=True).values[keep - 1]


def kept_entries(keys: Tensor, threshold: Tensor, keep: int | None) -> Tensor:
    """Keys above the threshold and those equal to it: all of them, or the first in index order that make up `keep`.

    NaN is never trimmed away: it has to reach the output.
    """
    above = (keys > threshold) | keys.isnan()
    equal = keys == threshold
    return above | (equal if keep is None else equal & (equal.cumsum(0) <= keep - above.sum()))


def ranked_entries(keys: Tensor, rank: int) -> Tensor:
    """The `rank` largest keys, or the `-rank` smallest; of equal ones the first in index order. NaN is the largest."""
    order = keys.sort(descending=rank > 0, stable=True).indices
    ranked = torch.zeros_like(keys, dtype=torch.bool)
    ranked[order[: abs(rank)]] = True
    return ranked
