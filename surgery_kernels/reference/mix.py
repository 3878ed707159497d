"""Linear combinations of a base and experts."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from .scope import Experts, load_scope, one_tensor_scope


def mix(
    base: Tensor | None,
    experts: Experts,
    coefficients: object,
    *,
    base_coefficients: object = None,
    divisor: float = 1.0,
    task_vectors: bool = True,
    fused: bool = False,
    axis: str = "tensor",
    nonfinite: str = "error",
    compute_dtype: torch.dtype | None = None,
) -> Tensor | list[Tensor]:
    """base_coefficients[j] * base + sum_t coefficients[j, t] * (expert_t - base) / divisor, rounded once: arguments and
    results as of `surgery_kernels.mix`."""
    loaded = nonfinite if nonfinite == "error" else "propagate"
    subtracted = base if task_vectors else None
    (entry,) = load_scope(*one_tensor_scope(subtracted, experts), loaded, compute_dtype)
    compute = entry.base.dtype
    if nonfinite == "error" and base is not None and (count := int((~base.isfinite()).sum())):
        raise RuntimeError(f"base must be finite, got {count} NaN or infinite values")
    terms = torch.stack([expert.reshape(-1) for expert in experts]).to(compute) - entry.base
    if nonfinite == "drop":
        terms = torch.where(terms.isfinite(), terms, 0.0)
    given = torch.as_tensor(coefficients, dtype=torch.float64)
    several = given.dim() == (2 if axis == "tensor" else 3)
    factors = _of_elements(given.to(compute), entry.shape, axis)  # [..., num_tasks, num_params]
    if base_coefficients is not None:
        base_factors = torch.as_tensor(base_coefficients, dtype=torch.float64).to(compute)
        base_factors = _of_elements(base_factors, entry.shape, axis)  # [..., num_params]
    results = []
    for j, row in enumerate(factors if several else factors[None]):
        merged = torch.zeros_like(entry.base)
        for x, factor in zip(terms, row, strict=True):
            merged = multiply_add(x, factor, merged) if fused else merged + x * factor
        if divisor != 1:
            merged = merged / entry.base.new_tensor(divisor)
        if base is not None:
            stored = base.reshape(-1).to(compute)
            if base_coefficients is None:
                merged = stored + merged
            else:
                factor = base_factors[j] if several else base_factors
                merged = multiply_add(stored, factor, merged) if fused else stored * factor + merged
        results.append(entry.store(merged))
    return results if several else results[0]


def _of_elements(coefficients: Tensor, shape: torch.Size, axis: str) -> Tensor:
    """Of a tensor [...] or of its rows or columns [..., num_blocks], for every element.  # [..., num_params]"""
    if axis == "tensor":
        coefficients = coefficients[..., None]
    if coefficients.shape[-1] == 1:
        return coefficients.expand(*coefficients.shape[:-1], math.prod(shape))
    if axis == "row":
        return coefficients.repeat_interleave(shape[-1], dim=-1)
    return coefficients.repeat(*[1] * (coefficients.dim() - 1), shape[0])


def multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x * y + z in the dtype of z, rounded once."""
    x, y, z = torch.broadcast_tensors(x, y, z)
    if z.dtype == torch.float64:
        numbers = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
        return z.new_tensor([_multiply_add(*three) for three in numbers]).reshape(z.shape)
    # A product of two float32 is exact in float64. The sum is not: where it is rounded and even, the neighbour towards
    # what was rounded away is odd, and no longer half-way between two float32.
    product, addend = x.double() * y.double(), z.double()
    rounded = product + addend
    part = rounded - product
    lost = (product - (rounded - part)) + (addend - part)
    towards = torch.nextafter(rounded, torch.where(lost > 0, math.inf, -math.inf).to(rounded))
    even = rounded.contiguous().view(torch.int64) % 2 == 0
    return torch.where((lost != 0) & even & rounded.isfinite(), towards, rounded).to(z.dtype)


def _multiply_add(x: float, y: float, z: float) -> float:
    plain = x * y + z
    if not all(map(math.isfinite, (x, y, z))):
        return plain
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    try:
        return float(exact) if exact else plain
    except OverflowError:
        return math.copysign(math.inf, exact)
