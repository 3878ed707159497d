"""Unlabeled samples, in whatever form they are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..ops import arguments
from .inputs import Inputs, batch_size, concatenate, padded, sample_shape, select, without_labels

Batches = Any  # a tensor, a mapping of tensors, a map-style dataset or an iterable of batches


class Pool(Protocol):
    """The samples of one task, by number."""

    def __len__(self) -> int: ...

    def stream(self, order: Sequence[Tensor]) -> Iterator[Inputs]:
        """The samples of each batch of numbers in `order`, one batch after the other."""


@dataclass(frozen=True)
class Memory:
    """Samples that lie in memory."""

    inputs: Inputs

    def __len__(self) -> int:
        return batch_size(self.inputs)

    def stream(self, order: Sequence[Tensor]) -> Iterator[Inputs]:
        return (select(self.inputs, numbers) for numbers in order)


@dataclass(frozen=True)
class Lazy:
    """Samples of a map-style dataset, read when they are needed."""

    dataset: Any
    num_workers: int
    argument: str

    def __len__(self) -> int:
        return len(self.dataset)

    def stream(self, order: Sequence[Tensor]) -> Iterator[Inputs]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=[numbers.tolist() for numbers in order],
            num_workers=self.num_workers,
            generator=torch.Generator(),  # so that torch's own stays as it is
        )
        return (without_labels(batch, self.argument) for batch in loader)


def pool_of(argument: str, batches: Batches, num_workers: int = 0) -> Pool:
    """Samples by number, from everything that `fit` takes; an iterable is read to its end and kept in memory."""
    arguments.check_count("num_workers", num_workers, least=0)
    pool: Pool
    if isinstance(batches, (Memory, Lazy)):
        pool = batches
    elif isinstance(batches, (Tensor, Mapping)):
        pool = Memory(without_labels(batches, argument))
    elif _is_map_style(batches):
        pool = Lazy(batches, num_workers, argument)
    elif isinstance(batches, Iterable):
        read = [without_labels(batch, argument) for batch in batches]
        read = _of_one_shape(argument, read)
        pool = Memory(concatenate(read) if read else torch.empty(0))
    else:
        raise _of_no_form(argument, batches)
    if not len(pool):
        raise ValueError(f"{argument} must hold at least one sample, got none")
    return pool


def batches_of(argument: str, batches: Batches, batch_size: int = 64) -> Iterator[Inputs]:
    """The same samples batch after batch, for whoever needs each once: an iterable is read as far as it is asked."""
    if isinstance(batches, (Tensor, Mapping)) or _is_map_style(batches):
        pool = pool_of(argument, batches)
        yield from pool.stream(torch.arange(len(pool)).split(batch_size))
    elif isinstance(batches, Iterable):
        yield from (without_labels(batch, argument) for batch in batches)
    else:
        raise _of_no_form(argument, batches)


def _of_no_form(argument: str, batches: object) -> TypeError:
    return TypeError(
        f"{argument} must be a tensor, a mapping of tensors, a dataset or an iterable of batches, "
        f"got {type(batches).__name__}"
    )


def _is_map_style(batches: object) -> bool:
    if isinstance(batches, (list, tuple, IterableDataset)):  # the last inherits a __getitem__ that raises
        return False
    return hasattr(batches, "__getitem__") and hasattr(batches, "__len__")


def _of_one_shape(argument: str, batches: list[Inputs]) -> list[Inputs]:
    batches = padded(batches)
    shapes = [sample_shape(batch) for batch in batches]
    for shape in shapes:
        if shape != shapes[0]:
            raise ValueError(f"{argument} must hold samples of one shape, got {shapes[0]} and {shape}")
    return batches
