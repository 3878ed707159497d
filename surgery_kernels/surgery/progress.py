"""Bars over samples and steps."""

from __future__ import annotations

from tqdm import tqdm

from ..merging.progress import SECONDS_BEFORE_SHOWN


def progress_bar(total: int, what: str, unit: str, shown: bool | None) -> tqdm:
    """On stderr: always, never, or (None) once it has taken two seconds."""
    delay = SECONDS_BEFORE_SHOWN if shown is None else 0.0
    return tqdm(total=total, desc=what, unit=unit, delay=delay, disable=shown is False)
