"""What one step of a program computes, with the bits of the CPU."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .addresses import divide
from .exponential import exponential, logarithm


@triton.jit
def compute(CODE: tl.constexpr, a, b, d):
    if CODE == "ADD":
        x = a + b
    elif CODE == "SUB":
        x = a - b
    elif CODE == "MUL":
        x = a * b
    elif CODE == "DIV":
        x = divide(a, b)
    elif CODE == "FMA":
        x = tl.fma(a, b, d)
    elif CODE == "MIN":
        x = tl.where((a != a) | (a < b), a, b)
    elif CODE == "MAX":
        x = tl.where((a != a) | (a > b), a, b)
    elif CODE == "ABS":
        x = tl.abs(a)
    elif CODE == "NEG":
        x = a * -1.0
    elif CODE == "SQRT":
        x = _square_root(a)
    elif CODE == "EXP":
        x = exponential(a.to(tl.float64)).to(a.dtype)
    elif CODE == "LOG":
        x = logarithm(a.to(tl.float64)).to(a.dtype)
    elif CODE == "GT":
        x = (a > b).to(a.dtype)
    elif CODE == "GE":
        x = (a >= b).to(a.dtype)
    elif CODE == "EQ":
        x = (a == b).to(a.dtype)
    else:
        tl.static_assert(CODE == "SELECT")
        x = tl.where(d != 0, a, b)
    return x


@triton.jit
def number(numbers, k, lanes, TYPE: tl.constexpr):
    return tl.broadcast_to(tl.load(numbers + k).to(TYPE), lanes.shape)


@triton.jit
def narrow(x, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """From the compute type; from float64 to fewer than 32 bits through float32, as torch converts."""
    if WIDE and TYPE.primitive_bitwidth < 64:
        x = x.to(tl.float32)
    return x.to(TYPE)


@triton.jit
def widen(x, COMPUTE: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        x = x.to(tl.float32)
    return x.to(COMPUTE)


@triton.jit
def _square_root(x):
    """Rounded correctly: `tl.sqrt` of float32 is not."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.math.sqrt_rn(x)
    return root
