"""Prints the peak of the resident memory of a process that merges checkpoints, in bytes.

python -m tests.merge_memory RECIPE OUT [MEMORY]: a process of its own, for the peak never falls again. MEMORY: bytes
that the machine passes for; the merge then must be one that reads all models once.
"""

from __future__ import annotations

import os
import sys

import torch

from surgery_kernels.checkpoint import merge, plan
from surgery_kernels.checkpoint.one_read import OneRead
from tests.peak_memory import resident


def read_once(memory: int) -> None:
    run = OneRead.run

    def succeeding(self: OneRead) -> bool:
        assert run(self), "the models were read twice"
        return True

    plan.memory_bytes = lambda: memory
    OneRead.run = succeeding  # type: ignore[method-assign]


def main(recipe: str, out: str, memory: str | None = None) -> None:
    torch.set_num_threads(2)
    os.fsync = lambda _: None  # waiting for the disk takes no memory
    if memory is not None:
        read_once(int(memory))
    merge(recipe, out, progress=False)
    print(resident("VmHWM"))


if __name__ == "__main__":
    main(*sys.argv[1:])
