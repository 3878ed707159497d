"""The words of csrc/philox.h inside kernels, and whose they are."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ..ops.masks import MOST_IDS


@triton.jit
def block_words(seed, tensor_id, task_id, block):
    """The four words, int64, that decide on elements 4 * block to 4 * block + 3 of a tensor; block: int64 [n]."""
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    tensor_id, task_id = (tensor_id + 0 * block).to(tl.uint32), (task_id + 0 * block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, tensor_id, task_id)
    return w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64)


def limit_of(density: float) -> int:
    """The word below which an entry is kept."""
    return 1 << 32 if density >= 1 else int(density * 2**32)


def ids(argument: str, given: Sequence[int] | None, count: int, of: str) -> Sequence[int]:
    """Of every tensor, or of every expert; 0, 1, ... where none are given."""
    if given is None:
        return range(count)
    if len(given) != count:
        raise RuntimeError(f"{argument} must be one number for every {of} ({count}), got {len(given)}")
    for i in given:
        if not 0 <= i < MOST_IDS:
            raise RuntimeError(f"{argument} must be in [0, 2**32), got {i}")
    return given
