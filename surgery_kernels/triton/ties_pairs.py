"""bfloat16 two at a time, as they lie in a register of 32 bits: task vectors subtracted, compared and counted in pairs.

PAIRS says how: by the instructions of "sm_80" or "sm_90", or by integers alone, "integers", which is what Triton's
interpreter runs; "" where there are no such instructions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .addresses import pointer_to

MOST_COUNTED = 255  # experts, in a byte


def pairs_on(target: Any) -> str:
    """What a GPU has; later ones have it too."""
    if target.backend != "cuda":
        return ""
    return "sm_90" if target.arch >= 90 else "sm_80" if target.arch >= 80 else ""


def pairs_for(num_tasks: int) -> str:
    if num_tasks > MOST_COUNTED:
        return ""
    if not isinstance(load_pairs, JITFunction):
        return "integers"
    return pairs_on(driver.active.get_current_target())


@triton.jit
def load_pairs(address, at, BLOCK: tl.constexpr):
    """A block from an address that is a multiple of 16.  # int32 [BLOCK // 2]"""
    return tl.load(pointer_to(address + at * 2, tl.int32, True) + tl.arange(0, BLOCK // 2))


@triton.jit
def widened(pairs):
    """float32 [2 n]"""
    low, high = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -0x10000).to(tl.float32, bitcast=True)
    return tl.interleave(low, high)


@triton.jit
def _halves(pairs):
    low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    return low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)


@triton.jit
def _paired(low, high):
    low, high = low.to(tl.int16, bitcast=True).to(tl.int32), high.to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def subtracted(x, y, PAIRS: tl.constexpr):
    """x - y, rounded once."""
    if PAIRS == "integers":
        x_low, x_high = _halves(x)
        y_low, y_high = _halves(y)
        return _paired(x_low - y_low, x_high - y_high)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 minus; mov.b32 minus, 0xBF80BF80; fma.rn.bf16x2 $0, $2, minus, $1; }",
            "=r,r,r", [x, y], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def above_limit(x, limit, PAIRS: tl.constexpr):
    """0xFFFF where the magnitude is, NaN above all; limits have no sign and are not NaN."""
    if PAIRS == "sm_90":
        return tl.inline_asm_elementwise(
            "{ .reg .b32 magnitude; abs.bf16x2 magnitude, $1; set.gtu.u32.bf16x2 $0, magnitude, $2; }",
            "=r,r,r", [x, limit], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # no half borrows from the other
        is_not = (((limit | -0x7FFF8000) - (x & 0x7FFF7FFF)) >> 15) & 0x00010001
        return ~(is_not * 0xFFFF)


@triton.jit
def votes_of(x, kept, PAIRS: tl.constexpr):
    """-1 in two bytes of every half: whether it is kept, and whether it is negative."""
    if PAIRS == "integers":
        return (kept & 0x00FF00FF) | (((x >> 15) & 0x00010001) * 0xFF00)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0xB694;", "=r,r,r", [x, kept], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def counted(votes):
    """How many are kept and how many of them are negative, of sums of votes.  # int32 [2 n] twice"""
    counts = votes * -0x01010101  # that is 1 / 0xFF
    kept = tl.interleave(counts & 0xFF, (counts >> 16) & 0xFF)
    return kept, tl.interleave((counts >> 8) & 0xFF, (counts >> 24) & 0xFF)
