"""Weighted means: by importance that is given, and by the scores of PCB-Merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scope import Experts, load_scope, one_tensor_scope, per_expert, sum_experts

# Polynomials of the least relative error, whose bits every backend has: 2^x for |x| <= 1/2, and tanh(x) / x in powers
# of x^2 for |x| <= 1. Of float32 and of float64.
POWER = {
    torch.float32: (1.0, 0.69314714, 0.24022652, 0.0555031051, 0.0096176929, 0.0013406643, 0.000155946),
    torch.float64: (
        1.0, 0.6931471805599457, 0.24022650695910097, 0.05550410866479039, 0.009618129107607003, 0.0013333558153439677,
        0.00015403530441571379, 1.5252727385427634e-05, 1.3215442675797239e-06, 1.0180647576596453e-07,
        7.072570320758415e-09, 4.078082536086186e-10,
    ),
}  # fmt: skip
TANH = {
    torch.float32: (
        0.9999999502408815, -0.3333283915359491, 0.13325204077205186, -0.05345702954900354, 0.020289980320438973,
        -0.006203378982082121, 0.0010410225856812554,
    ),
    torch.float64: (
        1.0, -0.3333333333333275, 0.1333333333328331, -0.05396825395126731, 0.021869488232283487, -0.0088632322305167,
        0.003592104412747129, -0.0014557168199575857, 0.000589606483114914, -0.00023801988111959738,
        9.473391033344001e-05, -3.605142310911897e-05, 1.2315996648045483e-05, -3.4075610303484106e-06,
        6.510350938367012e-07, -6.224696089668405e-08,
    ),
}  # fmt: skip
LOG2_E = 1.44269504088896338700
LEAST_POWER = {torch.float32: -100.0, torch.float64: -900.0}  # smaller ones are no smaller


def weighted_merge(
    base: Tensor | None,
    experts: Experts,
    importance: Experts,
    *,
    weights: float | Sequence[float] = 1.0,
    floor: float = 1e-6,
    nonfinite: str = "error",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """base + sum_t w_t (expert_t - base) / sum_t w_t with w_t = max(importance_t, floor) * weights[t]."""
    loaded = nonfinite if nonfinite == "error" else "propagate"
    (entry,) = load_scope(*one_tensor_scope(base, experts), loaded, compute_dtype)
    x, compute = entry.differences, entry.base.dtype
    if nonfinite == "drop":
        x = torch.where(x.isfinite(), x, 0.0)
    given = torch.stack([f.reshape(-1) for f in importance]).to(compute)
    floor_, factors = entry.base.new_tensor(floor), entry.base.new_tensor(per_expert(weights, len(x)))
    mass = torch.where(floor_ > given, floor_, given) * factors[:, None]
    merged = sum_experts(x * mass) / sum_experts(mass)
    return entry.store(merged if base is None else entry.base + merged)


def scores(x: Tensor, clipping: Tensor, inter: str = "paper") -> tuple[Tensor, Tensor]:
    """PCB's score of every entry, and its change.  # both [num_tasks, num_params]

    With a the magnitude of a change x within its limits, s = sign(x) (a - low) / range and n = num_tasks the score is
    exp(n (s_i^2 - 1)) sum_j tanh(s_i s_j): the authors' but for a factor that no weight depends on. inter "half":
    tanh(x_i sum_j s_j) in place of the sum; "raw": tanh(x_i sum_j x_j).

    Args:
        x: Task vectors [num_tasks, num_params], float32 or float64.
        clipping: [num_tasks, 3]: low, high, range.
    """
    low, high, range_ = clipping.to(x.dtype)[..., None].unbind(1)
    a = x.abs()
    a = torch.where(low > a, low, a)
    a = torch.where(a > high, high, a)
    s = torch.copysign((a - low) / range_, x)
    squares = s * s
    if inter == "paper":
        powers, sums = s, []
        for k, coefficient in enumerate(TANH[x.dtype]):
            powers = powers * squares if k else powers
            sums.append(sum_experts(powers) * s.new_tensor(coefficient))
        agreement = s * polynomial(sums, squares)
    else:
        agreement = tanh(x * sum_experts(s if inter == "half" else x))
    rate = x.new_tensor(len(x) * LOG2_E)
    found = power_of_two((squares - 1.0) * rate) * agreement
    return found, torch.where(x == 0, 0.0, torch.copysign(a, x))


def merge_by_scores(
    base: Tensor | None,
    experts: Experts,
    clipping: Tensor,
    limits: Tensor,
    inter: str = "paper",
    drop: bool = False,
) -> Tensor:
    """base + sum_t w_t factor_t c_t / max(sum_t w_t, 1e-12), w_t = max(score_t - threshold_t, 0) / height_t."""
    (entry,) = load_scope(*one_tensor_scope(base, experts), "propagate", None)
    x = entry.differences
    found, changes = scores(torch.where(x.isfinite(), x, 0.0) if drop else x, clipping, inter)
    threshold, height, factor = limits.to(x.dtype)[..., None].unbind(1)
    mass = torch.where(found > threshold, found - threshold, 0.0) / height
    total, least = sum_experts(mass), x.new_tensor(1e-12)
    merged = sum_experts(mass * factor * changes) / torch.where(total > least, total, least)
    return entry.store(entry.base + merged)


def score_limits(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """Of every expert the score of its rank from the highest on, and the highest.  # [num_tasks, 2]"""
    least = 2.0 ** LEAST_POWER[scores.dtype]
    ordered = torch.where(scores.abs() > least, scores, 0.0).sort(dim=1, descending=True).values
    return torch.stack([torch.stack((row[rank - 1], row[0])) for row, rank in zip(ordered, ranks, strict=True)])


def polynomial(coefficients: Sequence[Tensor | float], x: Tensor) -> Tensor:
    total = x.new_tensor(coefficients[-1]) if isinstance(coefficients[-1], float) else coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + (x.new_tensor(coefficient) if isinstance(coefficient, float) else coefficient)
    return total


def power_of_two(y: Tensor) -> Tensor:
    """2^y, not below 2^LEAST_POWER."""
    integers, fraction = (torch.int32, 23) if y.dtype == torch.float32 else (torch.int64, 52)
    least, to_integer = y.new_tensor(LEAST_POWER[y.dtype]), y.new_tensor(1.5 * 2.0**fraction)
    y = torch.where(y > least, y, least)
    shifted = y + to_integer
    p = polynomial(POWER[y.dtype], y - (shifted - to_integer))
    return (p.view(integers) + (shifted.view(integers) << fraction)).view(y.dtype)


def tanh(x: Tensor) -> Tensor:
    magnitude, most = x.abs(), x.new_tensor(60.0)
    bounded = torch.where(magnitude > most, most, magnitude)
    two = x.new_tensor(2.0)
    far = 1.0 - two / (power_of_two(bounded * x.new_tensor(2 * LOG2_E)) + 1.0)
    return torch.where(magnitude > 1, torch.where(x < 0, 0.0 - far, far), x * polynomial(TANH[x.dtype], x * x))
