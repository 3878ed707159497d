"""Merges and their repairs side by side, in processes of one thread each."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from .repair import Setting

StateDict = dict[str, Tensor]
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Job:
    merge: str
    setting: Setting | None = None  # None leaves the merge as it is


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain little from a second thread, and lose much wherever other programs keep it busy."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def progress_bar(name: str, total: int, unit: str = "step") -> tqdm:
    return tqdm(
        total=total,
        desc=name,
        unit=unit,
        bar_format="{desc:20} {percentage:3.0f} % |{bar:40}| {unit} {n_fmt}/{total_fmt}, {elapsed}, {remaining} left",
        mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file keeps every state of the bar
    )


def processes() -> ProcessPoolExecutor:
    """As many as torch has threads, each with one."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler, by which memory is measured, writes between lines
    # spawned: a fork of a process whose thread pools run may hang
    return ProcessPoolExecutor(
        torch.get_num_threads(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )


def run_jobs(
    pool: Executor,
    jobs: Sequence[Job],
    merge: Callable[[str], StateDict],
    work: Callable[[Job, StateDict], Outcome],
) -> dict[Job, Outcome]:
    """What `work` makes of every job and its merge, side by side in `pool`.

    Both functions run in other processes and are functions of their arguments alone.
    """
    names = list(dict.fromkeys(job.merge for job in jobs))
    with progress_bar("surgery", len(names) + len(jobs), "job") as progress:

        def submit(*arguments: Any) -> Future[Any]:
            future = pool.submit(*arguments)
            future.add_done_callback(lambda _: progress.update())
            return future

        try:
            # AdaMerging takes long: it starts first, and its repairs come last
            merges = {name: submit(merge, name) for name in reversed(names)}
            futures = {
                job: submit(work, job, merges[name].result()) for name in names for job in jobs if job.merge == name
            }
            return {job: futures[job].result() for job in jobs}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
