"""The words of csrc/philox.h inside kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_words(seed, tensor_id, task_id, block):
    """The four words, int64, that decide on elements 4 * block to 4 * block + 3 of a tensor; block: int64 [n]."""
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    tensor_id, task_id = (tensor_id + 0 * block).to(tl.uint32), (task_id + 0 * block).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, tensor_id, task_id)
    return w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64)
