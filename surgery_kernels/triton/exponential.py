"""exp and log by additions, multiplications and divisions alone: the bits of csrc/cpu/exponential.h, step by step."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

LN2_HIGH, LN2_LOW = tl.constexpr(6.93147180369123816490e-01), tl.constexpr(1.90821492927058770002e-10)
TO_INTEGER = tl.constexpr(1.5 * 2.0**52)  # added to a small number it leaves the nearest integer in the low bits
ONE_BITS, TO_INTEGER_BITS = tl.constexpr(0x3FF0000000000000), tl.constexpr(0x4338000000000000)
SQRT_HALF_BITS, FRACTION = tl.constexpr(0x3FE6A09E667F3BCD), tl.constexpr(0x000FFFFFFFFFFFFF)
TO_INTEGER_F32 = tl.constexpr(1.5 * 2.0**23)
ONE_BITS_F32, TO_INTEGER_BITS_F32 = tl.constexpr(0x3F800000), tl.constexpr(0x4B400000)
SMALLEST_NORMAL, RAISED = tl.constexpr(2.0**-1022), tl.constexpr(2.0**54)


@triton.jit
def exponential(x):
    """e^x of float64."""
    y = tl.where(x > 710.0, 710.0, x)
    y = tl.where(y < -746.0, -746.0, y)
    shifted = y * 1.44269504088896338700 + TO_INTEGER
    n = shifted - TO_INTEGER
    r = (y - n * LN2_HIGH) - n * LN2_LOW
    p = tl.full(x.shape, 1 / 6227020800, tl.float64)
    p = p * r + 1 / 479001600
    p = p * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    p = 1.0 + (r + r * r * p)
    half = (n * 0.5 + TO_INTEGER).to(tl.int64, bitcast=True) - TO_INTEGER_BITS
    other = shifted.to(tl.int64, bitcast=True) - TO_INTEGER_BITS - half
    scaled = p * _power_of_two(half) * _power_of_two(other)
    return tl.where(x == x, scaled, x)


@triton.jit
def _power_of_two(n):
    return ((n << 52) + ONE_BITS).to(tl.float64, bitcast=True)


@triton.jit
def exponential_f32(x):
    """The same of float32, to its precision."""
    y = tl.where(x > 89.0, 89.0, x)
    y = tl.where(y < -104.0, -104.0, y)
    shifted = y * 1.44269504 + TO_INTEGER_F32
    n = shifted - TO_INTEGER_F32
    r = (y - n * 0.693145752) - n * 1.42860677e-6
    p = tl.full(x.shape, 1 / 5040, tl.float32)
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    p = 1.0 + (r + r * r * p)
    half = (n * 0.5 + TO_INTEGER_F32).to(tl.int32, bitcast=True) - TO_INTEGER_BITS_F32
    other = shifted.to(tl.int32, bitcast=True) - TO_INTEGER_BITS_F32 - half
    scaled = p * _power_of_two_f32(half) * _power_of_two_f32(other)
    return tl.where(x == x, scaled, x)


@triton.jit
def _power_of_two_f32(n):
    return ((n << 23) + ONE_BITS_F32).to(tl.float32, bitcast=True)


@triton.jit
def logarithm(x):
    """The natural logarithm of float64."""
    small = x < SMALLEST_NORMAL
    u = tl.where(small, x * RAISED, x).to(tl.int64, bitcast=True) + (ONE_BITS - SQRT_HALF_BITS)
    k = ((u >> 52) & 0xFFF).to(tl.float64) - 1023.0 - tl.where(small, 54.0, 0.0)
    f = ((u & FRACTION) + SQRT_HALF_BITS).to(tl.float64, bitcast=True) - 1.0
    s = f / (2.0 + f)
    z = s * s
    p = tl.full(x.shape, 2 / 23, tl.float64)
    p = p * z + 2 / 21
    p = p * z + 2 / 19
    p = p * z + 2 / 17
    p = p * z + 2 / 15
    p = p * z + 2 / 13
    p = p * z + 2 / 11
    p = p * z + 2 / 9
    p = p * z + 2 / 7
    p = p * z + 2 / 5
    p = p * z + 2 / 3
    square = 0.5 * f * f
    y = k * LN2_HIGH - ((square - (s * (square + z * p) + k * LN2_LOW)) - f)
    special = tl.where(x == 0.0, float("-inf"), tl.where(x < 0.0, float("nan"), x))
    return tl.where((x > 0.0) & (x < float("inf")), y, special)
