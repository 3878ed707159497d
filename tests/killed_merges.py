"""Kills merges and resumes them. Prints, as JSON, how often one was killed, how often the next went on from there, and
whether the files came out the same.

python -m tests.killed_merges everywhere|thirds|anytime RECIPE OUT [once]: before every single call that changes the
disk, before every third, or 20 times at random moments; `once`: as if no memory held what was read. A process of its
own that never merges itself: its children are forks, which start at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from surgery_kernels.checkpoint import memory, merge, plan
from surgery_kernels.checkpoint.writing import writer

CHANGING = ("open", "posix_fallocate", "write", "pwrite", "fsync", "rename", "rmdir", "unlink", "mkdir")
KILLS = 20
STRIDES = {"everywhere": 1, "thirds": 3}


def main(how: str, recipe: str, out: Path, once: bool) -> None:
    writer.SYNC_BYTES = 1  # every tensor is a point to go on from
    memory.IN_MEMORY_BYTES = 0
    if once:
        plan.memory_bytes = lambda: 0
    started = time.monotonic()
    assert in_child(lambda: merge(recipe, out, progress=False)) == 0
    seconds = time.monotonic() - started
    expected = digest(out)
    killed = resumed = different = 0

    def finish() -> None:
        nonlocal resumed, different
        resumed += went_on(out)
        unfinished = out.with_name(f"{out.name}.partial")
        if unfinished.exists() or not out.exists():
            assert in_child(lambda: merge(recipe, out, resume=True, progress=False)) == 0
        different += digest(out) != expected or unfinished.exists()

    shutil.rmtree(out)
    if how in STRIDES:
        while in_child(partial(dies_before, killed * STRIDES[how], recipe, out)) == -signal.SIGKILL:
            killed += 1
            finish()
            shutil.rmtree(out)
        shutil.rmtree(out)
    else:
        moments = random.Random(0)
        while killed < KILLS:
            killed += (
                in_child(lambda: merge(recipe, out, resume=True, progress=False), moments.uniform(0, seconds)) != 0
            )
            if out.exists() or killed % 4 == 0:
                finish()
                shutil.rmtree(out)
            else:
                resumed += went_on(out)
        finish()
    print(json.dumps({"killed": killed, "resumed": resumed, "different": different}))


def in_child(work: Callable[[], None], seconds: float | None = None) -> int:
    """The exit status of `work` in a fork, negative for a signal; killed after `seconds`."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_before(call: int, recipe: str, out: Path) -> None:
    """A merge that dies before the given one of its calls that change the disk."""
    left = call

    def deadly(function: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)

        return counted

    for name in CHANGING:
        setattr(os, name, deadly(getattr(os, name)))
    merge(recipe, out, progress=False)


def went_on(out: Path) -> bool:
    """Whether something is there to go on from."""
    path = out.with_name(f"{out.name}.partial") / "journal.jsonl"
    return path.exists() and b'"done"' in path.read_bytes()


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), once="once" in sys.argv[4:])
