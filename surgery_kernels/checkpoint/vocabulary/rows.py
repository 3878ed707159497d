"""What stands in the rows of a tensor that is indexed by tokens, when it comes into a merge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..reading.source import Source

ROWS_AT_ONCE = 4096  # copied by index, which takes memory


@dataclass(frozen=True)
class Part:
    """Row ``here[i]`` is row ``there[i]`` of a tensor of some checkpoint."""

    source: Source
    name: str
    here: Tensor  # int64 [n], ascending
    there: Tensor
    axis: int = 0  # the dimension of tokens

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A few rows at once: where they go, and what stands there."""
        rows = self.source.tensor(self.name)
        for here, there in zip(self.here.split(ROWS_AT_ONCE), self.there.split(ROWS_AT_ONCE), strict=True):
            yield here, rows.movedim(self.axis, 0)[_index(there)]


@dataclass(frozen=True)
class Rows:
    """How the tensor of one model is put together; a row that nothing else says is zero."""

    num_rows: int
    axis: int  # the dimension of tokens
    parts: tuple[Part, ...]  # each row in one of them
    means: tuple[Part, ...] = ()  # the mean over the models that have a row, summed in this order
    padding: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # rows: the mean of the others

    @property
    def identity(self) -> str:
        numbers = hashlib.sha256(repr((self.num_rows, self.axis)).encode())
        for part in (*self.parts, *self.means):
            numbers.update(repr((part.source.name, part.name)).encode())
            numbers.update(torch.stack([part.here, part.there]).numpy().tobytes())
        numbers.update(self.padding.numpy().tobytes())
        return numbers.hexdigest()

    @property
    def inputs(self) -> Iterator[tuple[Source, str]]:
        """The tensors that are read."""
        yield from dict.fromkeys((part.source, part.name) for part in (*self.parts, *self.means))

    def fill(self, out: Tensor) -> Tensor:
        """Writes all rows, in the dtype of `out`."""
        rows = out.movedim(self.axis, 0)
        covered = torch.zeros(self.num_rows, dtype=torch.bool)
        for part in self.parts:
            covered[part.here] = True
            for here, values in part.chunks():
                rows[_index(here)] = values.to(out.dtype)
        self._fill_means(rows, covered)
        covered[self.padding] = True
        for empty in (~covered).nonzero().flatten().split(ROWS_AT_ONCE):
            rows[empty] = 0
        if len(self.padding):
            rows[self.padding] = self._mean(rows)
        return out

    def _fill_means(self, rows: Tensor, covered: Tensor) -> None:
        """Sums in the dtype of the merge, as mergekit's, rounded at every step; then one division."""
        counts = torch.zeros(self.num_rows, dtype=torch.int64)
        for part in self.means:
            for here in part.here.split(ROWS_AT_ONCE):
                rows[here[~covered[here]]] = 0
                covered[here] = True
            counts[part.here] += 1
        for part in self.means:
            for here, values in part.chunks():
                rows[here] = rows[here] + values.to(rows.dtype)
        for count in counts.unique().tolist():
            if count > 1:
                for here in (counts == count).nonzero().flatten().split(ROWS_AT_ONCE):
                    rows[here] = rows[here] / count

    def _mean(self, rows: Tensor) -> Tensor:
        kept = torch.ones(self.num_rows, dtype=torch.bool)
        kept[self.padding] = False
        tokens = kept.nonzero().flatten()
        # padding mostly comes last: what is before it is there already
        if len(tokens) == 0 or bool(tokens[-1] + 1 == len(tokens)):
            return rows[: len(tokens)].mean(0)
        total = torch.zeros(rows.shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
        for some in tokens.split(ROWS_AT_ONCE):
            total += rows[some].sum(0, dtype=total.dtype)
        return total / len(tokens)


def common_rows(tensors: Sequence[tuple[Source, str]], axis: int, num_rows: int) -> list[Rows | None]:
    """Rows by their numbers, `num_rows` of them; the first tensor's stand in for those that another has not."""
    first, name = tensors[0]
    found: list[Rows | None] = []
    for source, own in tensors:
        number = source.tensors[own].shape[axis]
        if number == num_rows or (number > num_rows and axis == 0):
            found.append(None)  # as it is, or its first rows
            continue
        both = torch.arange(min(number, num_rows))
        rest = torch.arange(len(both), num_rows)
        parts = Part(source, own, both, both, axis), Part(first, name, rest, rest, axis)
        found.append(Rows(num_rows, axis, parts[: 1 + (len(rest) > 0)]))
    return found


def _index(rows: Tensor) -> slice | Tensor:
    """A slice where rows follow one another: no copy of them is made."""
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((rows.diff() == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
