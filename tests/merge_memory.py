"""Prints the peak of the resident memory of a process that merges checkpoints, in bytes.

python -m tests.merge_memory RECIPE OUT: a process of its own, for the peak never falls again.
"""

from __future__ import annotations

import os
import sys

import torch

from surgery_kernels.checkpoint import merge
from tests.peak_memory import resident

if __name__ == "__main__":
    torch.set_num_threads(2)
    os.fsync = lambda _: None  # waiting for the disk takes no memory
    merge(sys.argv[1], sys.argv[2], progress=False)
    print(resident("VmHWM"))
