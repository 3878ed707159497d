"""XXH3 of every tensor that a merge takes and gives, from the reads and writes that it makes anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import xxhash
from torch import Tensor

from .steps import Input

WAITING_BYTES = 64 << 20  # handed over and not yet hashed: from here on the merge waits


class Hashes:
    """One thread that hashes inputs beside the kernels; outputs are told by the writer.

    By model and name, as `Source.tensor` gives it, and by the name in the result.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hashes")
        self._inputs: dict[tuple[str, str], Future[str]] = {}
        self._waiting: deque[tuple[Future[str], int]] = deque()
        self.outputs: dict[str, str] = {}

    def see(self, wanted: Input, tensor: Tensor) -> None:
        """Takes an input, once; it must not change."""
        key = wanted.source.name, wanted.name
        if key not in self._inputs:
            self._inputs[key] = self._pool.submit(hash_of, tensor)
            self._waiting.append((self._inputs[key], tensor.nbytes))
            while len(self._waiting) > 1 and sum(nbytes for _, nbytes in self._waiting) > WAITING_BYTES:
                self._waiting.popleft()[0].result()

    @property
    def inputs(self) -> Mapping[tuple[str, str], str]:
        """What was seen; waits for it."""
        return {key: future.result() for key, future in self._inputs.items()}

    def close(self, *, complete: bool) -> None:
        """Ends the thread: after all that was seen is hashed, or (not complete) as soon as may be."""
        self._pool.shutdown(wait=True, cancel_futures=not complete)


def hash_of(tensor: Tensor) -> str:
    """Of the bytes of a contiguous tensor on the CPU, as they lie in a file: 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
