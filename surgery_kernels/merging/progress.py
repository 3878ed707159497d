"""Bars: one that follows the native ops from outside, and one that counts steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .. import _C

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_BEFORE_SHOWN = 2.0


def counting_bar(total: int, what: str, unit: str, shown: bool | None) -> tqdm:
    """On stderr: always, never, or (None) once it has taken two seconds."""
    delay = SECONDS_BEFORE_SHOWN if shown is None else 0.0
    return tqdm(total=total, desc=what, unit=unit, delay=delay, disable=shown is False)


@contextmanager
def progress_bar(total_bytes: int, shown: bool | None) -> Iterator[None]:
    """Shows the bytes read by the ops of the body: always, never, or (None) once the body has taken two seconds."""
    if shown is False:
        yield
        return
    finished = threading.Event()
    before = _C.bytes_read()
    with tqdm(
        total=total_bytes,
        desc="merging",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        delay=SECONDS_BEFORE_SHOWN if shown is None else 0.0,
    ) as bar:

        def follow() -> None:
            while not finished.wait(SECONDS_BETWEEN_LOOKS):
                bar.update(min(_C.bytes_read() - before, total_bytes) - bar.n)

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()
        bar.update(total_bytes - bar.n)
