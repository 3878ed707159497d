"""PCB's scores inside kernels, with the bits of csrc/cpu/weighted_merge_kernel.cpp.

All experts are read twice: for the sums that agreement is with, and, from the caches, for the score of each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .addresses import EXPERTS, Scope, divide, load, upload
from .finite import is_finite

# 2^x for |x| <= 1/2, and tanh(x) / x in powers of x^2 for |x| <= 1.
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
TWICE_LOG2_E = tl.constexpr(2 * LOG2_E)
TO_INTEGER, TO_INTEGER_WIDE = tl.constexpr(1.5 * 2.0**23), tl.constexpr(1.5 * 2.0**52)

LOW, HIGH, RANGE, OF_USE, NUMBERS = (tl.constexpr(column) for column in (0, 1, 2, 3, 6))  # of every expert


@triton.jit
def _polynomial(x, COEFFICIENTS: tl.constexpr):
    total = tl.full(x.shape, COEFFICIENTS[len(COEFFICIENTS) - 1], x.dtype)
    for k in tl.static_range(1, len(COEFFICIENTS)):
        total = total * x + COEFFICIENTS[len(COEFFICIENTS) - 1 - k]
    return total


@triton.jit
def _power_of_two(y, POWER: tl.constexpr):
    """2^y; for small ones and NaN that of the smallest power."""
    if y.dtype == tl.float64:
        y = tl.where(y > -900.0, y, -900.0)
        shifted = y + TO_INTEGER_WIDE
        p = _polynomial(y - (shifted - TO_INTEGER_WIDE), POWER)
        power = (p.to(tl.int64, bitcast=True) + (shifted.to(tl.int64, bitcast=True) << 52)).to(tl.float64, bitcast=True)
    else:
        y = tl.where(y > -100.0, y, -100.0)
        shifted = y + TO_INTEGER
        p = _polynomial(y - (shifted - TO_INTEGER), POWER)
        power = (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return power


@triton.jit
def _tanh(x, POWER: tl.constexpr, TANH: tl.constexpr):
    magnitude = tl.abs(x)
    bounded = tl.where(magnitude > 60.0, 60.0, magnitude)
    denominator = _power_of_two(bounded * TWICE_LOG2_E, POWER) + 1.0
    far = 1.0 - divide(tl.full(x.shape, 2.0, x.dtype), denominator)
    return tl.where(magnitude > 1.0, tl.where(x < 0.0, 0.0 - far, far), x * _polynomial(x * x, TANH))


@triton.jit
def with_sign_of(sign, magnitude):
    if sign.dtype == tl.float64:
        bits = magnitude.to(tl.int64, bitcast=True) | ((sign.to(tl.int64, bitcast=True) >> 63) << 63)
    else:
        bits = magnitude.to(tl.int32, bitcast=True) | ((sign.to(tl.int32, bitcast=True) >> 31) << 31)
    return bits.to(sign.dtype, bitcast=True)


@triton.jit
def change(
    row, t, base, at, lanes, left, numbers,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, DROP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Of expert t the task vector, its clipped magnitude, and that brought to [-1, 1]."""
    x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, COMPUTE, WHOLE) - base
    if DROP:
        x = tl.where(is_finite(x), x, 0.0)
    low, high = tl.load(numbers + t * NUMBERS + LOW).to(COMPUTE), tl.load(numbers + t * NUMBERS + HIGH).to(COMPUTE)
    a = tl.abs(x)
    a = tl.where(low > a, low, a)
    a = tl.where(a > high, high, a)
    scale = tl.load(numbers + t * NUMBERS + RANGE).to(COMPUTE) + tl.zeros(x.shape, COMPUTE)
    return x, a, with_sign_of(x, divide(a - low, scale))


@triton.jit
def sums_over_experts(
    row, num_tasks, base, at, lanes, left, numbers,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, TANH: tl.constexpr, INTER: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """What the agreement of every expert is with: coefficients of a polynomial, or a sum."""
    sums = (tl.zeros(lanes.shape, COMPUTE),) * (len(TANH) if INTER == "paper" else 1)
    for t in tl.range(num_tasks):
        x, _, s = change(row, t, base, at, lanes, left, numbers, STORED, COMPUTE, DROP, WHOLE)
        if INTER == "paper":
            sums = _add_powers(sums, s)
        elif INTER == "half":
            sums = (sums[0] + s,)
        else:
            sums = (sums[0] + x,)
    if INTER == "paper":
        sums = _times(sums, TANH)
    return sums


@triton.jit
def _add_powers(sums, s):
    """s, s^3, s^5, ..."""
    square = s * s
    power = s
    for k in tl.static_range(len(sums)):
        if k > 0:
            power = power * square
        sums = sums[:k] + (sums[k] + power,) + sums[k + 1 :]
    return sums


@triton.jit
def _times(sums, COEFFICIENTS: tl.constexpr):
    for k in tl.static_range(len(COEFFICIENTS)):
        sums = sums[:k] + (sums[k] * COEFFICIENTS[k],) + sums[k + 1 :]
    return sums


@triton.jit
def score(x, s, sums, rate, POWER: tl.constexpr, TANH: tl.constexpr, INTER: tl.constexpr):
    """rate: num_tasks * log2(e)."""
    square = s * s
    if INTER == "paper":
        agreement = sums[len(sums) - 1]
        for k in tl.static_range(1, len(sums)):
            agreement = agreement * square + sums[len(sums) - 1 - k]
        agreement = s * agreement
    else:
        agreement = _tanh(x * sums[0], POWER, TANH)
    return _power_of_two((square - 1.0) * rate, POWER) * agreement


def rate_of(scope: Scope) -> Tensor:
    return upload(torch.tensor([scope.num_tasks * LOG2_E], dtype=torch.float64), scope.device)


def constants_of(scope: Scope, inter: str, drop: bool) -> dict[str, Any]:
    return {
        "POWER": POWER[scope.compute],
        "TANH": TANH[scope.compute],
        "HAS_BASE": scope.has_base,
        "INTER": inter,
        "DROP": drop,
    }
