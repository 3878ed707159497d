"""What ops on a GPU have found out and tell once their work is in the queue: at once, or at the end of a merge, so that
the GPU does not wait for the host from tensor to tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

TOGETHER = 64  # looks that wait at most: each keeps the tensors alive that its op read


@dataclass(frozen=True)
class Look:
    found: Tensor  # int64 [1] on the device; 0: there is nothing to tell
    tell: Callable[[], None]  # raises


_waiting: ContextVar[list[Look] | None] = ContextVar("_waiting", default=None)


def look(found: Tensor, tell: Callable[[], None], at_once: bool = False) -> None:
    """Tells what an op has found; waits for the device, unless this is put off."""
    waiting = None if at_once else _waiting.get()
    if waiting is None:
        settle([Look(found, tell)])
        return
    waiting.append(Look(found, tell))
    if len(waiting) == TOGETHER:
        settle(waiting)


@contextmanager
def put_off() -> Iterator[None]:
    """The ops of the body tell at its end, or when some dozens wait: the first of them that found something raises.

    Until then nothing is known of what they return or fill. An error of the body itself yields to theirs, which came
    first.
    """
    if _waiting.get() is not None:
        yield
        return
    waiting: list[Look] = []
    token = _waiting.set(waiting)
    try:
        yield
    except Exception:
        settle(waiting)
        raise
    finally:
        _waiting.reset(token)
    settle(waiting)


def settle(looks: list[Look]) -> None:
    """Waits once per device."""
    told, looks[:] = [*looks], []
    numbers = _fetch([look.found for look in told])
    for found, one in zip(numbers, told, strict=True):
        if found:
            one.tell()


def _fetch(found: Sequence[Tensor]) -> list[int]:
    numbers = [0] * len(found)
    for device in {tensor.device for tensor in found}:
        here = [i for i, tensor in enumerate(found) if tensor.device == device]
        for i, number in zip(here, torch.cat([found[i] for i in here]).tolist(), strict=True):
            numbers[i] = number
    return numbers


@dataclass(frozen=True)
class Inputs:
    """What is known to hold NaN or infinity; unless `certain` it may."""

    base: Sequence[Tensor]
    experts: Sequence[Tensor]
    num_tasks: int
    compute: torch.dtype
    names: Sequence[str]
    task_vectors: bool
    certain: bool

    def tell(self) -> None:
        """Raises for the first tensor that does."""
        for part, first in enumerate(self.experts[:: self.num_tasks]):
            where = f" in tensor {self.names[part]!r}" if part < len(self.names) else ""
            base = self.base[part] if self.base else None
            if base is not None and (count := _nonfinite_in(base)):
                raise RuntimeError(f"base must be finite, got {count} NaN or infinite values{where}")
            for t in range(self.num_tasks):
                expert = self.experts[part * self.num_tasks + t]
                if count := _nonfinite_in(expert):
                    raise RuntimeError(f"experts[{t}] must be finite, got {count} NaN or infinite values{where}")
                if base is None or not self.task_vectors:
                    continue
                task_vector = expert.to(self.compute) - base.to(self.compute)
                if count := _nonfinite_in(task_vector.to(first.dtype)):
                    raise RuntimeError(f"experts[{t}] - base must be finite, got {count} overflows{where}")
        if self.certain:
            raise RuntimeError("experts must stay as they are until they are merged, got some that became finite")


def _nonfinite_in(tensor: Tensor) -> int:
    return int((~tensor.isfinite()).sum())
