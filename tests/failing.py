"""System calls that fail after a while."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from typing import Any


def no_room(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(calls: int, first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """`first` for so many calls, `then` for all others."""
    number = itertools.count()
    return lambda *arguments: (first if next(number) < calls else then)(*arguments)
