"""The pieces of blocks of parameters, one for every program, whose words and sums do not depend on where a block lies.

A block is cut every `PIECE` elements from its own beginning on, as in csrc/cpu/combine_blocks.h. Offsets stay on the
device: block b has its pieces from place ``block_offsets[b] // PIECE + b`` on, and some places have none.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .addresses import is_aligned
from .random_bits import block_words
from .sums import LANES


def num_places(num_params: int, num_blocks: int, piece: int) -> int:
    return num_params // piece + num_blocks


@triton.jit
def locate_piece(block_offsets, num_blocks, PIECE: tl.constexpr):
    """Of this program: the block, the elements of it before the piece, where the piece begins, and how many it has."""
    place = tl.program_id(0)
    low = tl.zeros([], tl.int32)
    high = low + num_blocks - 1
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.load(block_offsets + middle) // PIECE + middle <= place
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    start, stop = tl.load(block_offsets + low), tl.load(block_offsets + low + 1)
    of_block = (place - (start // PIECE + low)) * PIECE
    count = tl.maximum(tl.minimum(stop - start - of_block, PIECE), 0).to(tl.int32)
    return low, of_block, start + of_block, count


@triton.jit
def wide_from(row, begin):
    """Whether elements from there on may be read 16 bytes at a time."""
    return is_aligned(row) & (begin % 16 == 0)


@triton.jit
def words_from(seed, block, STREAM: tl.constexpr, first, COUNT: tl.constexpr):
    """The words of COUNT elements of a block from `first` on, a multiple of 4.  # int64 [COUNT]"""
    fours = first // 4 + tl.arange(0, COUNT // 4).to(tl.int64)
    w0, w1, w2, w3 = block_words(seed, block, tl.zeros([], tl.int64) + STREAM, fours)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _fold(
    sums, folded, block_offsets, num_blocks, places,
    PIECE: tl.constexpr, MEAN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sums of a block's pieces, in halves and in place; MEAN: over its elements.  # sums: [width, places]"""
    block, j = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(block_offsets + block), tl.load(block_offsets + block + 1)
    x = sums + j.to(tl.int64) * places + start // PIECE + block
    count = tl.cdiv(stop - start, PIECE)
    total = tl.zeros([], tl.float64)
    if count > 0:
        while count > 1:
            half = (count + 1) // 2
            for at in range(0, count - half, LANES):
                lanes = at + tl.arange(0, LANES)
                there = lanes < count - half
                pair = tl.load(x + lanes, mask=there, other=0.0) + tl.load(x + half + lanes, mask=there, other=0.0)
                tl.store(x + lanes, pair, mask=there)
            count = half
            tl.debug_barrier()  # what one thread stored another adds
        total = tl.load(x)
        if MEAN:
            total = total / (stop - start).to(tl.float64)
    tl.store(folded + j * num_blocks + block, total)


def fold(sums: Tensor, block_offsets: Tensor, piece: int, *, mean: bool = False) -> Tensor:
    """[width, places] float64, which change -> [width, num_blocks]; 0 for an empty block."""
    width, places = sums.shape
    num_blocks = len(block_offsets) - 1
    folded = sums.new_empty(width, num_blocks)
    if num_blocks:
        _fold[(num_blocks, width)](
            sums, folded, block_offsets, num_blocks, places, PIECE=piece, MEAN=mean, LANES=LANES, num_warps=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return folded
