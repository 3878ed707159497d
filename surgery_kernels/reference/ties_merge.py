"""TIES: trim, elect, disjoint merge, as the paper, mergekit and PEFT round it, or rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .masks import philox
from .scope import Entry, Experts, load_scope, one_tensor_scope, per_expert, sign_of, sum_experts
from .trim import mask, trim


@dataclass
class Ballot:
    """What one tensor brings to the election and the sum."""

    weights: Tensor  # [num_tasks, 1], or [num_tasks, num_params]: 0 where nothing is kept
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
    cuts: Sequence[int] | None = None,
    keep: Sequence[Tensor] | None = None,
    upper: Tensor | None = None,
    upper_cuts: Sequence[int] | None = None,
    scales: Tensor | None = None,
    keep_density: float | Sequence[float] | None = None,
    seed: int = 0,
    tensor_ids: Sequence[int] | None = None,
    task_ids: Sequence[int] | None = None,
    min_count: int = 0,
    unique_scales: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """keep: bool [num_tasks, *shape], or [1, *shape] for all experts, one per tensor; scales and unique_scales:
    [num_tensors, num_tasks]."""
    num_tasks = len(experts)
    scope = load_scope(bases, experts, nonfinite, compute_dtype)
    trim(scope, per_expert(density, num_tasks), semantics, thresholds, cuts, upper, upper_cuts)
    if keep is not None:
        mask(scope, [bits.reshape(len(bits), -1) for bits in keep])
    if keep_density is not None:
        mask(scope, draw(scope, per_expert(keep_density, num_tasks), seed, tensor_ids, task_ids))
    masked = keep is not None or keep_density is not None
    ballots = [
        vote(entry, weights, semantics, rescale, masked, None if scales is None else scales[i])
        for i, entry in enumerate(scope)
    ]
    elections = elect_signs([ballot.votes for ballot in ballots], elect, semantics)
    merged = []
    for i, (entry, ballot, (mass, sign)) in enumerate(zip(scope, ballots, elections, strict=True)):
        selected = agrees(ballot.votes, sign) | (elect == "none")
        if semantics == "paper":
            change = reduce_paper(entry, ballot.terms, selected, sign, reduce, lam)
        elif semantics == "mergekit":
            change = reduce_mergekit(entry, ballot, selected, elect, normalize and reduce == "mean", lam)
        elif semantics == "exact":
            unique = None if unique_scales is None else unique_scales[i]
            how = "sum" if reduce == "mean" and not normalize else reduce
            change = reduce_exact(entry, ballot, selected, how, lam, unique)
        else:
            change = reduce_peft(ballot.terms, selected, reduce, lam)
        if reduce != "magmax":  # which sums nothing: NaN comes from entries, not from infinities
            change = torch.where(mass.isnan(), torch.nan, change)
        enough = (entry.trimmed != 0).sum(dim=0) >= min_count
        merged.append(entry.store(torch.where(enough, entry.base + change, entry.base)))
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


def draw(
    scope: Sequence[Entry],
    densities: Sequence[float],
    seed: int,
    tensor_ids: Sequence[int] | None,
    task_ids: Sequence[int] | None,
) -> list[Tensor]:
    """Of every tensor: the entries whose random word is below density * 2**32.  # bool [num_tasks, num_params]"""
    drawn = []
    for i, entry in enumerate(scope):
        words = [
            philox(seed, tensor_ids[i] if tensor_ids else i, task_ids[t] if task_ids else t, entry.base.numel())
            for t in range(len(densities))
        ]
        drawn.append(torch.stack([word < int(min(d, 1.0) * 2**32) for word, d in zip(words, densities, strict=True)]))
    return drawn


def vote(
    entry: Entry,
    weights: float | Sequence[float] | None,
    semantics: str,
    rescale: bool,
    masked: bool = False,
    scales: Tensor | None = None,
) -> Ballot:
    trimmed = entry.trimmed
    listed = per_expert(1.0 if weights is None else weights, len(trimmed))
    column = torch.tensor(listed, dtype=torch.float64)[:, None]
    if semantics == "paper":
        return Ballot(column, trimmed, trimmed)
    if semantics == "mergekit":
        column = entry.round(column.to(trimmed.dtype))
        if rescale:
            # mergekit's random methods leave float16 for float32 while they rescale
            work = torch.float32 if masked and entry.dtype == torch.float16 else entry.dtype
            scales = torch.stack([scale_of(entry, t, work) for t in range(len(trimmed))])
        if scales is not None:
            trimmed = scaled(entry.round(trimmed * scales.to(trimmed.dtype)[:, None]), trimmed)
        weighted = entry.round(trimmed * column)
        return Ballot(column, weighted, weighted)
    if semantics == "exact":
        column = column.to(trimmed.dtype)
        if rescale:
            scales = torch.stack([scale_of(entry, t, trimmed.dtype) for t in range(len(trimmed))])
        terms = torch.where(trimmed == 0, 0.0, entry.differences)
        if scales is not None:
            terms = scaled(terms * scales.to(trimmed.dtype)[:, None], trimmed)
        weighted = scaled(terms * column, trimmed)
        return Ballot(torch.where(trimmed == 0, 0.0, column), weighted, weighted)
    column = column.to(torch.float32).to(trimmed.dtype)
    return Ballot(column, trimmed, trimmed * column)


def scale_of(entry: Entry, t: int, work: torch.dtype) -> Tensor:
    """What scales the trimmed task vector back to its L1 norm before the trim; norms and ratio rounded to `work`."""
    sums = [math.fsum(x[t].abs().tolist()) for x in (entry.task_vectors, entry.trimmed)]
    before, after = entry.base.new_tensor(sums).to(work).to(entry.base.dtype)
    if before < 1e-7 or after < 1e-7:
        return entry.base.new_tensor(1.0)
    ratio = entry.base.new_tensor(sums[0] / sums[1]) if before.isinf() else before / after
    return ratio.to(work).to(entry.base.dtype)


def scaled(products: Tensor, trimmed: Tensor) -> Tensor:
    """What is not kept stays 0 times an infinite factor."""
    return torch.where(trimmed == 0, 0.0, products)


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


def reduce_exact(
    entry: Entry, ballot: Ballot, selected: Tensor, reduce: str, lam: float, unique_scales: Tensor | None
) -> Tensor:
    """Nothing is rounded here; a mean divides by the sum of the weights of what is kept and agrees."""
    terms = torch.where(selected, ballot.terms, 0.0)
    merged = sum_experts(terms)
    if reduce == "magmax":
        merged = torch.zeros_like(terms[0])
        for term in terms:  # the last of equal ones; NaN is the largest
            merged = torch.where(merged.isnan() | (merged.abs() > term.abs()), merged, term)
    elif reduce == "unique":
        count = (entry.trimmed != 0).sum(dim=0)
        factors = 1.0 if unique_scales is None else unique_scales.to(terms.dtype)[:, None]
        alone = sum_experts(scaled(terms * factors, entry.trimmed))
        merged = torch.where(count == 1, alone, merged / count.clamp(min=1).to(terms.dtype))
    elif reduce == "mean":
        divisor = sum_experts(torch.where(selected, ballot.weights, 0.0))
        merged = merged / torch.where(divisor == 0, 1.0, divisor)
    return merged * merged.new_tensor(lam)


def reduce_peft(terms: Tensor, selected: Tensor, reduce: str, lam: float) -> Tensor:
    merged = sum_experts(torch.where(selected, terms, 0.0))
    if reduce == "mean":
        merged = merged / selected.sum(dim=0).clamp(min=1).to(merged.dtype)
    return merged.new_tensor(lam) * merged


def agrees(votes: Tensor, sign: Tensor) -> Tensor:
    """Where not even the whole scope has a sign, the negative entries count, as in the paper's code."""
    return torch.where(sign > 0, votes > 0, votes < 0)
