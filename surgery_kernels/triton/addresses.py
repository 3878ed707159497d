"""Lists of tensors as kernels see them: a table of addresses on the device, and the tensors cut into chunks.

One launch goes through all tensors of a dtype, program i through chunk i, so that a model of many small tensors takes
as few launches as one large tensor. Row of a tensor in the table, int64: NUMEL, elements of the scope before it, chunks
of the launch before it, chunks of the scope before it, whether all its addresses are multiples of 16, those addresses
of out, base and every expert; for kernels of several outputs also the address of each of them, and the words of
`places`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments

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
    """Tensors that share one decision, checked, contiguous and alive.

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
        self._check(base, experts, num_tasks)
        filled = [] if stacked is None else [stacked]
        if out is not None:
            _check_out(out, base, experts, num_tasks, num_outputs, packed, in_place=places is not None)
            filled = [
                x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format) for x in out
            ]
        self._copies = [(to, x) for to, x in zip(out or (), filled, strict=False) if to is not x]
        self.base, self.experts, self.num_tasks = base, experts, num_tasks
        self.has_base = bool(base)
        written = {x.data_ptr() for x in filled if x.numel()}
        self.in_place = any(x.data_ptr() in written for x in (*base, *experts))
        self.device = experts[0].device
        self.wide = experts[0].dtype == torch.float64
        self.numel = self.num_chunks = 0
        self._alive: list[Tensor] = []
        rows: dict[torch.dtype, list[list[int]]] = {}
        chunks: dict[torch.dtype, int] = {}
        for part, first in enumerate(experts[::num_tasks]):
            of_part = experts[part * num_tasks : (part + 1) * num_tasks]
            outputs = [x.data_ptr() for x in filled[part * num_outputs : (part + 1) * num_outputs]]
            addresses = [outputs[0] if outputs else 0, self._address(base[part]) if base else 0]
            addresses += [self._address(expert) for expert in of_part]
            if places is not None:
                addresses += outputs
            whole = [x for i, x in enumerate(outputs) if i not in packed] + addresses[1 : 2 + num_tasks]
            before, count = chunks.get(first.dtype, 0), -(-first.numel() // CHUNK)
            aligned = all(x % 16 == 0 for x in whole)
            row = [first.numel(), self.numel, before, self.num_chunks, int(aligned), *addresses]
            row += places[part] if places is not None else ()
            rows.setdefault(first.dtype, []).append(row + [0] * (len(row) % 2))
            chunks[first.dtype] = before + count
            self.numel += first.numel()
            self.num_chunks += count
        self.groups = [self._group(dtype, rows[dtype], chunks[dtype], numbers(dtype)) for dtype in rows]

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

    def _check(self, base: Sequence[Tensor], experts: Sequence[Tensor], num_tasks: int) -> None:
        if num_tasks == 0 or len(experts) % num_tasks:
            raise RuntimeError(
                "experts must be one tensor for every expert and merged tensor, "
                f"got {len(experts)} for {num_tasks} experts"
            )
        if not experts:
            raise RuntimeError("experts must be at least one tensor, got none")
        parts = len(experts) // num_tasks
        if base and len(base) != parts:
            raise RuntimeError(f"base must be one tensor for every merged tensor, got {len(base)} for {parts}")
        wide = {expert.dtype == torch.float64 for expert in experts}
        if len(wide) > 1:
            raise RuntimeError("experts must be all float64 or none within one scope, got both")
        for i, expert in enumerate(experts):
            check_same(f"experts[{i % num_tasks}]", expert, experts[i - i % num_tasks])
        if other := [expert.device for expert in experts[::num_tasks] if expert.device != experts[0].device]:
            raise RuntimeError(f"experts must be on one device within one scope, {experts[0].device}, got {other[0]}")
        for part, tensor in enumerate(base):
            check_same("base", tensor, experts[part * num_tasks])

    def _address(self, tensor: Tensor) -> int:
        self._alive.append(tensor.contiguous())
        return self._alive[-1].data_ptr()

    def _group(self, dtype: torch.dtype, rows: list[list[int]], num_chunks: int, numbers: list[float]) -> Group:
        size = len(rows) * len(rows[0])
        words = torch.empty(size + len(numbers), dtype=torch.int64)
        words[:size] = torch.tensor(rows, dtype=torch.int64).view(-1)
        words[size:] = torch.tensor(numbers, dtype=torch.float64).view(torch.int64)
        words = upload(words, self.device)
        table = words[:size].view(len(rows), len(rows[0]))
        return Group(dtype, table, words[size:].view(torch.float64), num_chunks)


def _check_out(
    out: Sequence[Tensor],
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    num_tasks: int,
    num_outputs: int,
    packed: Collection[int],
    in_place: bool,
) -> None:
    parts = len(experts) // num_tasks
    if len(out) != parts * num_outputs:
        if num_outputs == 1:
            raise RuntimeError(f"out must be one tensor for every merged tensor, got {len(out)}")
        raise RuntimeError(f"out must be {num_outputs} tensors for every merged tensor, got {len(out)} for {parts}")
    for i, tensor in enumerate(out):
        first = experts[i // num_outputs * num_tasks]
        if i % num_outputs in packed:
            _check_bits(tensor, first)
        else:
            check_same("out", tensor, first)
    check_apart(out, [base, experts], in_place, parts)


def _check_bits(tensor: Tensor, first: Tensor) -> None:
    size = -(-first.numel() // 8)
    right = tensor.dtype == torch.uint8 and tensor.shape == (size,) and tensor.is_contiguous()
    if not right or tensor.device != first.device:
        raise RuntimeError(f"out must be contiguous uint8 [{size}] on {first.device} for bits, got another tensor")


def check_same(argument: str, tensor: Tensor, first: Tensor) -> None:
    """What would corrupt memory; users meet the checks of the public ops first."""
    if tensor.dtype not in arguments.DTYPES:
        raise RuntimeError(f"{argument} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.device != first.device:
        raise RuntimeError(f"{argument} must be on the device of experts[0], {first.device}, got {tensor.device}")
    if tensor.dtype != first.dtype:
        raise RuntimeError(f"{argument} must have the dtype of experts[0], got another")
    if tensor.shape != first.shape:
        raise RuntimeError(f"{argument} must have the shape of experts[0], got another")


def check_apart(
    out: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], in_place: bool = False, parts: int = 1
) -> None:
    """Every out tensor is apart from the inputs and from the other out tensors; in place it may also be an input of its
    own merged tensor. Of each merged tensor there are equally many in every list, those of the first before the
    second's."""
    for tensor in out:
        if any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise RuntimeError("out must have memory for every element, got an expanded tensor")
    taken = sorted((*_extent(tensor), i) for i, tensor in enumerate(out) if tensor.numel())
    for (_, end, _), (begin, _, _) in zip(taken, taken[1:], strict=False):
        if end > begin:
            raise RuntimeError("out must be apart from every other out, got memory that overlaps one")
    ends = [end for _, end, _ in taken]
    for tensors in inputs:
        for i, tensor in enumerate(tensors):
            begin, end = _extent(tensor)
            after = bisect.bisect_right(ends, begin)
            if begin == end or after == len(taken) or taken[after][0] >= end:
                continue
            index = taken[after][2]
            own_part = i * parts // len(tensors) == index * parts // len(out)
            if not (in_place and own_part and _same_memory(out[index], tensor)):
                raise RuntimeError("out must be apart from every input, got memory that overlaps one")


def _same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of two tensors of one shape and dtype lie in the same places."""
    steps = zip(a.shape, a.stride(), b.stride(), strict=True)
    return a.data_ptr() == b.data_ptr() and all(size < 2 or of_a == of_b for size, of_a, of_b in steps)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes from the first to the last element, holes included."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous() or tensor.numel() == 0:
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


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
