"""The oracle: what every backend must compute, in plain PyTorch, expert after expert.

A scope is a list of tensors that share one threshold per expert and, under "paper", one sign for exact zeros: an
expert is then a list of tensors too. Steps run in the compute type (float32, or float64 for float64 tensors) and are
rounded to the stored dtype exactly where the toolkit behind `semantics` rounds. `compute_dtype=torch.float64` runs
everything in float64, rounds nothing and returns float64: what a backend's error is measured against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Experts = Sequence[Tensor] | Tensor


@dataclass
class Entry:
    """One tensor of the scope, flat, in the compute type."""

    shape: torch.Size
    dtype: torch.dtype  # of the result
    base: Tensor  # [num_params]
    task_vectors: Tensor  # [num_tasks, num_params]
    trimmed: Tensor  # [num_tasks, num_params], zero where not kept; `trim` sets it

    def round(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(x.dtype)

    def store(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).reshape(x.shape[:-1] + self.shape)


@dataclass
class Ballot:
    """What one tensor brings to the election and the sum."""

    weights: Tensor  # [num_tasks, 1]
    votes: Tensor  # [num_tasks, num_params]
    terms: Tensor  # [num_tasks, num_params]


def keep_count(num_params: int, density: float, semantics: str) -> int:
    """How many of `num_params` entries `density` keeps; the product is a float64 floor in every toolkit."""
    if density >= 1:
        return num_params
    floor = int(density * num_params)
    return min({"paper": floor + 1, "mergekit": max(1, floor), "peft": floor}[semantics], num_params)


def trim_thresholds(base: Tensor | None, experts: Experts, **options: Any) -> Tensor:
    """The keep-th largest abs(expert - base) of each expert.  # [num_tasks]"""
    return scope_thresholds(*one_tensor_scope(base, experts), **options)


def ties_merge(base: Tensor | None, experts: Experts, **options: Any) -> Tensor:
    """base + lam * the disjoint merge of the trimmed task vectors; without a base, lam * the merge itself."""
    return scope_merge(*one_tensor_scope(base, experts), **options)[0]


def ties_split(base: Tensor | None, experts: Experts, **options: Any) -> Tensor:
    """Each expert's trimmed entries that agree with the elected sign, as they enter the sum.  # [num_tasks, *shape]"""
    return scope_split(*one_tensor_scope(base, experts), **options)[0]


def linear_merge(
    base: Tensor | None,
    experts: Experts,
    *,
    weights: float | Sequence[float] = 1.0,
    lam: float = 1.0,
    divisor: float = 1.0,
    nonfinite: str = "error",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """base + lam * sum_t weights[t] * (expert_t - base) / divisor, rounded once; without a base, of the experts."""
    loaded = nonfinite if nonfinite == "error" else "propagate"
    (entry,) = load_scope(*one_tensor_scope(base, experts), loaded, compute_dtype)
    task_vectors = torch.stack([expert.reshape(-1) for expert in experts]).to(entry.base.dtype) - entry.base
    if nonfinite == "drop":
        task_vectors = torch.where(task_vectors.isfinite(), task_vectors, 0.0)
    column = entry.base.new_tensor(per_expert(weights, len(experts)))[:, None]
    scale, count = entry.base.new_tensor(lam), entry.base.new_tensor(divisor)
    return entry.store(entry.base + sum_experts(task_vectors * column) / count * scale)


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


def one_tensor_scope(base: Tensor | None, experts: Experts) -> tuple[list[Tensor] | None, list[list[Tensor]]]:
    return None if base is None else [base], [[expert] for expert in experts]


def load_scope(
    bases: Sequence[Tensor] | None,
    experts: Sequence[Sequence[Tensor]],
    nonfinite: str,
    compute_dtype: torch.dtype | None,
) -> list[Entry]:
    scope = []
    for i, first in enumerate(experts[0]):
        stored = first.dtype
        compute = compute_dtype or (torch.float64 if stored == torch.float64 else torch.float32)
        flat = torch.stack([expert[i].reshape(-1) for expert in experts]).to(compute)
        base = torch.zeros_like(flat[0]) if bases is None else bases[i].reshape(-1).to(compute)
        dtype = compute_dtype or stored
        task_vectors = (flat - base).to(dtype).to(compute)
        if nonfinite == "drop":
            task_vectors = torch.where(task_vectors.isfinite(), task_vectors, 0.0)
        scope.append(Entry(first.shape, dtype, base, task_vectors, trimmed=task_vectors))
    if nonfinite == "error":
        for t in range(len(experts)):
            count = sum(int((~entry.task_vectors[t].isfinite()).sum()) for entry in scope)
            if count:
                raise RuntimeError(f"experts[{t}] must be finite, got {count} NaN or infinite values")
    return scope


def trim(
    scope: Sequence[Entry], densities: Sequence[float], semantics: str, thresholds: Tensor | Sequence[float] | None
) -> None:
    keys = scope_keys(scope)
    kept = torch.zeros_like(keys, dtype=torch.bool)
    for t, keys_t in enumerate(keys):
        if thresholds is not None:
            kept[t] = kept_entries(keys_t, torch.as_tensor(thresholds[t], dtype=keys.dtype), None)
        else:
            keep = keep_count(keys_t.numel(), densities[t], semantics)
            kept[t] = kept_entries(keys_t, threshold_of(keys_t, keep), None if semantics == "paper" else keep)
    offset = 0
    for entry in scope:
        size = entry.base.numel()
        entry.trimmed = torch.where(kept[:, offset : offset + size], entry.task_vectors, 0.0)
        offset += size


def scope_keys(scope: Sequence[Entry]) -> Tensor:
    """Magnitudes of the whole scope in the widest compute type present.  # [num_tasks, num_params]"""
    widest = torch.float64 if any(entry.base.dtype == torch.float64 for entry in scope) else torch.float32
    return torch.cat([entry.task_vectors.abs().to(widest) for entry in scope], dim=1)


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


def sign_of(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


def sum_experts(x: Tensor) -> Tensor:
    """The sum over experts in their order: torch.sum(dim=0) takes another order from five experts on."""
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return total


def per_expert(value: float | Sequence[float], num_tasks: int) -> list[float]:
    return [float(value)] * num_tasks if isinstance(value, (int, float)) else [float(v) for v in value]


def surgery_adapter(
    features: Tensor, down: Tensor, up: Tensor, *, task_index: Tensor | None = None, token_mean: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """features - relu(features down^T) up^T with each task's own adapter; differentiable by autograd."""
    compute = torch.promote_types(features.dtype, torch.float32)
    down, up = down.to(compute), up.to(compute)
    if task_index is not None:
        down, up = down[task_index], up[task_index]
    corrected = correct(features.to(compute), down, up)
    if token_mean:
        return corrected.to(features.dtype), corrected.mean(dim=-2).to(features.dtype)
    return corrected.to(features.dtype)


def correct(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """features [n, ..., dim], each of the first dimension with its own down [n, rank, dim] and up [n, dim, rank]."""
    hidden = torch.einsum("n...d,nrd->n...r", features, down).relu()
    return features - torch.einsum("n...r,ndr->n...d", hidden, up)


def representation_loss(features: Tensor, targets: Tensor) -> Tensor:
    """mean |features - targets| over rows and dim.  # [...]"""
    compute = torch.promote_types(features.dtype, torch.float32)
    return (features.to(compute) - targets.detach().to(compute)).abs().mean(dim=(-2, -1))


def surgery_train(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    down: Tensor,
    up: Tensor,
    down_moments: Tensor,
    up_moments: Tensor,
    indices: Tensor,
    *,
    step: int = 0,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    zero_grad_steps: int = 0,
) -> Tensor:
    """The loop that the fused training replaces: autograd and Adam, one task after another.  # [steps, num_tasks]"""
    losses = torch.zeros(indices.shape[:2], dtype=torch.promote_types(down.dtype, torch.float32))
    for s, batches in enumerate(indices):
        for t, batch in enumerate(batches):
            parameters = [down[t : t + 1].clone().requires_grad_(), up[t : t + 1].clone().requires_grad_()]
            corrected = correct(features[t][batch].to(down.dtype)[None], *parameters)
            loss = representation_loss(corrected, targets[t][batch].to(down.dtype)[None])
            gradients = torch.autograd.grad(loss.sum(), parameters)
            losses[s, t] = loss[0].detach()
            for value, moments, gradient in zip((down[t], up[t]), (down_moments, up_moments), gradients, strict=True):
                for i in range(1 + zero_grad_steps):
                    adam(value, moments[:, t], gradient[0] * (i == 0), step + i + 1, lr, betas, eps)
        step += 1 + zero_grad_steps
    return losses


def adam(
    value: Tensor,
    moments: Tensor,
    gradient: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Algorithm 1 of arXiv 1412.6980, in place; moments [2, ...]; `step` counts from 1."""
    first, second = moments.unbind()
    first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    corrected = first / (1 - betas[0] ** step), second / (1 - betas[1] ** step)
    value.sub_(lr * corrected[0] / (corrected[1].sqrt() + eps))


def combine(base: Tensor, task_vectors: Tensor, coefficients: Tensor, block_offsets: Tensor) -> Tensor:
    """base + sum_t coefficients[t, block] * task_vectors[t], rounded once; differentiable in the coefficients."""
    compute = torch.promote_types(base.dtype, torch.float32)
    of_param = coefficients.to(compute).repeat_interleave(block_offsets.diff(), dim=1)
    return (base.to(compute) + sum_experts(task_vectors.to(compute) * of_param)).to(base.dtype)
