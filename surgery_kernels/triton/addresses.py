"""Lists of tensors as kernels see them: a table of addresses on the device, and the tensors cut into chunks.

One launch goes through all tensors of a dtype, program i through chunk i, so that a model of many small tensors takes
as few launches as one large tensor. Row of a tensor in the table, int64: NUMEL, elements of the scope before it, chunks
of the launch before it, chunks of the scope before it, whether all its addresses are multiples of 16, those addresses
of out, base and every expert; for kernels of several outputs also the address of each of them, and the words of
`places`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_lists = torch.ops.surgery_kernels_lists

CHUNK = 4096  # elements a program goes through

NUMEL, OFFSET, FIRST_CHUNK, SCOPE_CHUNK, ALIGNED = (tl.constexpr(column) for column in range(5))
OUT, BASE, EXPERTS = (tl.constexpr(column) for column in range(5, 8))

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@dataclass(frozen=True)
class Group:
    """The tensors of a scope that have one dtype."""

    dtype: torch.dtype
    table: Tensor  # int64 [num_parts, columns]
    numbers: Tensor  # float64
    num_chunks: int

    @property
    def place(self) -> tuple[Tensor, int, int]:
        """What `locate` and `part_of` take first."""
        return self.table, self.table.shape[0], self.table.shape[1]

    @property
    def dtypes(self) -> dict[str, tl.dtype]:
        return {"STORED": TYPES[self.dtype], "COMPUTE": tl.float64 if self.dtype == torch.float64 else tl.float32}


class Scope:
    """Tensors that share one decision, checked, contiguous and alive: csrc/lists.cpp makes their table.

    base: one tensor for every merged one, or none; experts: all experts of the first, then of the second, ...; out: one
    for every merged one, filled through a copy where not contiguous; stacked: in its place, [num_tasks, *shape] of the
    only tensor; numbers: what kernels of a dtype read from `Group.numbers`; places: for several out tensors for every
    merged one, any of which may be one of its inputs, what kernels read of each merged tensor; packed: which of the out
    tensors of a merged one are bits.
    """

    def __init__(
        self,
        base: Sequence[Tensor],
        experts: Sequence[Tensor],
        num_tasks: int,
        out: Sequence[Tensor] | None = None,
        stacked: Tensor | None = None,
        numbers: Callable[[torch.dtype], list[float]] = lambda dtype: [],
        places: Sequence[Sequence[int]] | None = None,
        num_outputs: int = 1,
        packed: Collection[int] = (),
    ) -> None:
        dtypes = list(dict.fromkeys(first.dtype for first in experts[:: max(1, num_tasks)]))
        of_dtypes = [numbers(dtype) for dtype in dtypes if num_tasks]
        filled = out if stacked is None else [stacked]
        words, copies, filled_instead, (self.numel, self.num_chunks, in_place, *layout) = _lists.addresses(
            base, experts, num_tasks, filled, num_outputs if stacked is None else 1, stacked is not None,
            [] if places is None else [word for place in places for word in place],
            sorted(packed), [number for of_dtype in of_dtypes for number in _even(of_dtype)], CHUNK,
        )  # fmt: skip
        self._copies = [(to, x) for to, x in zip(filled or (), filled_instead, strict=False) if not to.is_contiguous()]
        self._alive: list[Tensor] = [*copies, *filled_instead]
        self.base, self.experts, self.num_tasks = base, experts, num_tasks
        self.has_base = bool(base)
        self.in_place = bool(in_place)
        self.device = experts[0].device
        self.wide = experts[0].dtype == torch.float64
        self.groups = self._groups(upload(words, self.device), dtypes, of_dtypes, layout)

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.wide else torch.float32

    def parts_of(self, group: Group) -> list[int]:
        """The tensors of a group, in the order of its table."""
        return [part for part, first in enumerate(self.experts[:: self.num_tasks]) if first.dtype == group.dtype]

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Keeps alive what kernels find by address."""
        self._alive += tensors

    @property
    def delivers(self) -> bool:
        """Whether there are outputs that are not contiguous."""
        return bool(self._copies)

    def deliver(self) -> None:
        """Once everything is known to be finite: the outputs that are not contiguous."""
        for to, filled in self._copies:
            to.copy_(filled)

    @staticmethod
    def _groups(
        words: Tensor, dtypes: Sequence[torch.dtype], of_dtypes: Sequence[list[float]], layout: Sequence[int]
    ) -> list[Group]:
        """layout: of every dtype its tensors, the words of their rows, and their chunks."""
        groups = []
        at, at_numbers = 0, sum(layout[1::3])
        for i, (dtype, of_dtype) in enumerate(zip(dtypes, of_dtypes, strict=True)):
            rows, size, num_chunks = layout[3 * i : 3 * i + 3]
            of_group = words[at_numbers : at_numbers + len(of_dtype)].view(torch.float64)
            groups.append(Group(dtype, words[at : at + size].view(rows, size // rows), of_group, num_chunks))
            at += size
            at_numbers += len(_even(of_dtype))
        return groups


def _even(numbers: list[float]) -> list[float]:
    """So that what follows lies at a multiple of 16 bytes."""
    return [*numbers, 0.0] if len(numbers) % 2 else numbers


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(words: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device, in the order of the stream and without waiting for it."""
    if is_capturing(device):
        return _as_arguments(words, device)
    if device.type == "cpu":
        return words
    return words.pin_memory().to(device, non_blocking=True)


def _as_arguments(words: Tensor, device: torch.device) -> Tensor:
    """A graph that copies reads the memory of the host again at every replay: kernels take the words as arguments."""
    words = words.contiguous()
    padded = torch.zeros(words.nbytes // 8 + 1, dtype=torch.int64)
    padded.view(torch.uint8)[: words.nbytes] = words.view(-1).view(torch.uint8)
    sent = torch.zeros_like(padded, device=device)
    torch._foreach_add_(list(sent.unbind()), padded.tolist())
    return sent.view(torch.uint8)[: words.nbytes].view(words.dtype).view(words.shape)


@triton.jit
def part_of(table, num_parts, columns, value, COLUMN: tl.constexpr):
    """The last tensor whose entry of the column is not above `value`."""
    low = tl.zeros([], tl.int32)
    high = low + num_parts - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(table + middle.to(tl.int64) * columns + COLUMN) <= value
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    return low


@triton.jit
def locate(table, num_parts, columns, CHUNK: tl.constexpr, before=0):
    """Of this program, `before` behind the launch's: its tensor, that one's row, its first element, and how many."""
    return locate_chunk(table, num_parts, columns, before + tl.program_id(0), CHUNK)


@triton.jit
def locate_chunk(table, num_parts, columns, chunk, CHUNK: tl.constexpr):
    part = part_of(table, num_parts, columns, chunk, FIRST_CHUNK).to(tl.int64)
    row = table + part * columns
    begin = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    return part, row, begin, tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)


@triton.jit
def is_aligned(row):
    """Whether a tensor may be read 16 bytes at a time."""
    return tl.load(row + ALIGNED) != 0


@triton.jit
def is_whole(row, count, CHUNK: tl.constexpr):
    """Whether a chunk is read so: it has all its elements, at addresses that allow it."""
    return (count == CHUNK) & is_aligned(row)


@triton.jit
def whole_blocks(row, count, BLOCK: tl.constexpr):
    """How many elements of a chunk, of which there are `count`, are read so, a block at a time."""
    return tl.where(tl.load(row + ALIGNED) != 0, count // BLOCK * BLOCK, 0)


@triton.jit
def pointer_to(address, STORED: tl.constexpr, ALIGNED: tl.constexpr):
    """Of one address, or of a column of them.  # [n, 1]"""
    pointer = address.to(tl.pointer_type(STORED))
    if ALIGNED:
        if address.type.is_block():
            pointer = tl.multiple_of(pointer, [16, 16])
        else:
            pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(
    address, at, lanes, left,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Elements at + lanes in the compute type; unless WHOLE only `left` of them, and 0 beyond.

    WHOLE: from an address that is a multiple of 16.
    """
    pointer = pointer_to(address, STORED, WHOLE) + at + lanes
    if WHOLE:
        values = tl.load(pointer)
    else:
        values = tl.load(pointer, mask=lanes < left, other=0)
    return values.to(COMPUTE)


@triton.jit
def store(
    values, address, at, lanes, left,
    STORED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Rounds to the stored dtype; WHOLE as in `load`."""
    pointer = pointer_to(address, STORED, WHOLE) + at + lanes
    if WHOLE:
        tl.store(pointer, values.to(STORED))
    else:
        tl.store(pointer, values.to(STORED), mask=lanes < left)


@triton.jit
def divide(x, y):
    """Rounded correctly: `/` of float32 is not."""
    if x.dtype == tl.float64:
        ratio = x / y
    else:
        ratio = tl.math.div_rn(x, y)
    return ratio
