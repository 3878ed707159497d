"""Prints the bytes by which reading a checkpoint raises the peak of resident memory.

python -m tests.read_memory HOW CHECKPOINT [ADAPTER]: a process of its own, for the peak never falls again.
"""

from __future__ import annotations

import sys
import threading

import torch

from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.checkpoint.reading.source import Source
from tests.peak_memory import resident


def all_kept(source: Source) -> None:
    for name in source.tensors:
        source.tensor(name).view(torch.int16).max()


def released(source: Source) -> None:
    for name in source.tensors:
        source.tensor(name).view(torch.int16).max()
        source.release()


def watched(source: Source) -> None:
    """One long read, released while it goes on."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            source.release()

    watcher = threading.Thread(target=watch)
    watcher.start()
    for name in source.tensors:
        for part in source.tensor(name).view(torch.int16).view(-1).split(1 << 18):
            part.max()
    done.set()
    watcher.join()


def main(how: str, checkpoint: str, adapter: str | None = None) -> None:
    torch.set_num_threads(2)
    torch.zeros(1 << 20, dtype=torch.int16).max()
    torch.addmm(*(torch.zeros(64, 64) for _ in range(3)))
    source = open_checkpoint(checkpoint)
    if adapter is not None:
        source = open_checkpoint(adapter, base=source)
    before = resident("VmRSS")
    {"all_kept": all_kept, "released": released, "watched": watched}[how](source)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
