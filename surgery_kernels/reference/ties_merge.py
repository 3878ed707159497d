"""TIES: trim, elect, disjoint merge, as the paper, mergekit and PEFT round it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .scope import Entry, Experts, load_scope, one_tensor_scope, per_expert, sign_of, sum_experts
from .trim import trim


@dataclass
class Ballot:
    """What one tensor brings to the election and the sum."""

    weights: Tensor  # [num_tasks, 1]
    votes: Tensor  # [num_tasks, num_params]
    terms: Tensor  # [num_tasks, num_params]


def ties_merge(base: Tensor | None, experts: Experts, **options: Any) -> Tensor:
    """base + lam * the disjoint merge of the trimmed task vectors; without a base, lam * the merge itself."""
    return scope_merge(*one_tensor_scope(base, experts), **options)[0]


def ties_split(base: Tensor | None, experts: Experts, **options: Any) -> Tensor:
    """Each expert's trimmed entries that agree with the elected sign, as they enter the sum.  # [num_tasks, *shape]"""
    return scope_split(*one_tensor_scope(base, experts), **options)[0]


def scope_merge(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float | Sequence[float] = 0.2,
    lam: float = 1.0,
    weights: float | Sequence[float] | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    reduce: str = "mean",
    normalize: bool = True,
    rescale: bool = False,
    nonfinite: str = "error",
    thresholds: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    scope = load_scope(bases, experts, nonfinite, compute_dtype)
    trim(scope, per_expert(density, len(experts)), semantics, thresholds)
    ballots = [vote(entry, weights, semantics, rescale) for entry in scope]
    elections = elect_signs([ballot.votes for ballot in ballots], elect, semantics)
    merged = []
    for entry, ballot, (mass, sign) in zip(scope, ballots, elections, strict=True):
        selected = agrees(ballot.votes, sign) | (elect == "none")
        if semantics == "paper":
            change = reduce_paper(entry, ballot.terms, selected, sign, reduce, lam)
        elif semantics == "mergekit":
            change = reduce_mergekit(entry, ballot, selected, elect, normalize and reduce == "mean", lam)
        else:
            change = reduce_peft(ballot.terms, selected, reduce, lam)
        merged.append(entry.store(torch.where(mass.isnan(), torch.nan, entry.base + change)))
    return merged


def scope_split(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    *,
    density: float | Sequence[float] = 0.2,
    weights: float | Sequence[float] | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    rescale: bool = False,
    nonfinite: str = "error",
    thresholds: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    scope = load_scope(bases, experts, nonfinite, compute_dtype)
    trim(scope, per_expert(density, len(experts)), semantics, thresholds)
    ballots = [vote(entry, weights, semantics, rescale) for entry in scope]
    elections = elect_signs([ballot.votes for ballot in ballots], elect, semantics)
    split = []
    for entry, ballot, (mass, sign) in zip(scope, ballots, elections, strict=True):
        visible = agrees(ballot.votes, sign) | (elect == "none") | mass.isnan()
        split.append(entry.store(torch.where(visible, ballot.terms, 0.0)))
    return split


def vote(entry: Entry, weights: float | Sequence[float] | None, semantics: str, rescale: bool) -> Ballot:
    trimmed = entry.trimmed
    listed = per_expert(1.0 if weights is None else weights, len(trimmed))
    column = torch.tensor(listed, dtype=torch.float64)[:, None]
    if semantics == "paper":
        return Ballot(column, trimmed, trimmed)
    if semantics == "mergekit":
        column = entry.round(column.to(trimmed.dtype))
        if rescale:
            trimmed = torch.stack([rescaled(entry, t) for t in range(len(trimmed))])
        weighted = entry.round(trimmed * column)
        return Ballot(column, weighted, weighted)
    column = column.to(torch.float32).to(trimmed.dtype)
    return Ballot(column, trimmed, trimmed * column)


def rescaled(entry: Entry, t: int) -> Tensor:
    """The trimmed task vector scaled back to its L1 norm before the trim."""
    sums = [math.fsum(x[t].abs().tolist()) for x in (entry.task_vectors, entry.trimmed)]
    before, after = entry.round(entry.base.new_tensor(sums))
    if before < 1e-7 or after < 1e-7:
        return entry.trimmed[t]
    ratio = entry.base.new_tensor(sums[0] / sums[1]) if before.isinf() else before / after
    scaled = entry.round(entry.trimmed[t] * entry.round(ratio))
    return torch.where(entry.trimmed[t] == 0, 0.0, scaled)


def elect_signs(votes: Sequence[Tensor], elect: str, semantics: str) -> list[tuple[Tensor, Tensor]]:
    """Per tensor: the mass (NaN makes the output NaN) and the elected sign, +1, -1 or 0 (both [num_params])."""
    masses = [sum_experts(x) for x in votes]
    polls = masses if elect == "sum" else [sum_experts(sign_of(x)) for x in votes]
    if semantics != "paper":
        return [(mass, torch.where(poll >= 0, 1.0, -1.0)) for mass, poll in zip(masses, polls, strict=True)]
    signs = [sign_of(poll) for poll in polls]
    zero_sign = sign_of(torch.stack([sign.sum(dtype=torch.float64) for sign in signs]).sum())
    return [
        (mass, torch.where(sign == 0, zero_sign.to(sign.dtype), sign)) for mass, sign in zip(masses, signs, strict=True)
    ]


def reduce_paper(entry: Entry, terms: Tensor, selected: Tensor, sign: Tensor, reduce: str, lam: float) -> Tensor:
    scale = entry.base.new_tensor(lam)
    if reduce == "max":
        largest = torch.where(selected, terms.abs(), 0.0).amax(dim=0)
        return entry.round(scale * (sign.to(scale.dtype) * largest))
    mass = entry.round(sum_experts(torch.where(selected, terms, 0.0)))
    if reduce == "sum":
        return entry.round(scale * mass)
    return scale * (mass / selected.sum(dim=0).clamp(min=1).to(scale.dtype))


def reduce_mergekit(entry: Entry, ballot: Ballot, selected: Tensor, elect: str, normalize: bool, lam: float) -> Tensor:
    merged = entry.round(sum_experts(torch.where(selected, ballot.terms, 0.0)))
    if normalize:
        divisor = entry.round(sum_experts(torch.where(selected, ballot.weights, 0.0)))
        vanishes = divisor.abs() < 1e-8 if elect == "none" else divisor == 0
        merged = entry.round(merged / torch.where(vanishes, 1.0, divisor))
    return entry.round(merged * entry.base.new_tensor(lam))


def reduce_peft(terms: Tensor, selected: Tensor, reduce: str, lam: float) -> Tensor:
    merged = sum_experts(torch.where(selected, terms, 0.0))
    if reduce == "mean":
        merged = merged / selected.sum(dim=0).clamp(min=1).to(merged.dtype)
    return merged.new_tensor(lam) * merged


def agrees(votes: Tensor, sign: Tensor) -> Tensor:
    """Where not even the whole scope has a sign, the negative entries count, as in the paper's code."""
    return torch.where(sign > 0, votes > 0, votes < 0)
