"""How a program of steps is launched: one read of all inputs, with the bits of the CPU.

Without sums a launch goes through all tensors of a dtype, as everywhere. With sums a warp adds up one block of a
vector, or one run of 32 columns, in the order of the CPU, and torch folds the blocks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments
from ..ops.mix import AXES, num_blocks_of
from .addresses import CHUNK, EXPERTS, TYPES, Scope, locate, upload, whole_blocks
from .mix import places_of
from .steps_program import Program
from .steps_run import run_constant, run_from_memory
from .sums import LANES, SUM_BLOCK, fold_halves, fold_lanes

RUN = 4_096  # elements of a column that are added one after the other: csrc/cpu/steps.cpp
LONGEST = 128  # instructions of a program that is a constant of its kernel
HELD = 1 << 16  # bytes of all registers of a program of the GPU
MEMORY = 32 << 20  # bytes of registers in memory
LOADS = 16  # of inputs that are under way together


@triton.jit(do_not_specialize=["before"])
def _steps(
    table, num_parts, columns, before, num_inputs, num_outputs, numbers, num_numbers, words, length, registers,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr, PROGRAM: tl.constexpr,
    NUM_REGISTERS: tl.constexpr, PLACED: tl.constexpr, IN_PLACE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PLACED: a tensor may have several blocks of numbers.

    Bound: reads each input once and writes each output once.
    """
    _, row, begin, count = locate(table, num_parts, columns, CHUNK, before)
    place = row + EXPERTS + num_inputs + num_outputs
    first, step, blocks = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    lanes = tl.arange(0, BLOCK)
    whole = 0
    if PROGRAM is not None:
        whole = whole_blocks(row, count, BLOCK)
        for at in range(0, whole, BLOCK):
            block = first
            if PLACED:
                block += (begin + at + lanes) // step % blocks
            run_constant(
                row, begin + at, lanes, BLOCK, numbers + block * num_numbers, num_inputs, (),
                STORED, COMPUTE, WIDE, OUT, PROGRAM, NUM_REGISTERS, IN_PLACE, True,
            )  # fmt: skip
    for at in range(whole, count, BLOCK):
        block = first
        if PLACED:
            block += (begin + at + lanes) // step % blocks
        if PROGRAM is None:
            run_from_memory(
                row, begin + at, lanes, count - at, numbers + block * num_numbers, num_inputs, words, length,
                registers + tl.program_id(0) * NUM_REGISTERS * BLOCK, None, STORED, COMPUTE, WIDE, OUT,
            )  # fmt: skip
        else:
            run_constant(
                row, begin + at, lanes, count - at, numbers + block * num_numbers, num_inputs, (),
                STORED, COMPUTE, WIDE, OUT, PROGRAM, NUM_REGISTERS, IN_PLACE, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["before", "count", "size", "units"])
def _steps_and_sums(
    row, before, num_inputs, count, size, units, numbers, block_stride, partial, words, length, registers, totals,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr, PROGRAM: tl.constexpr,
    NUM_REGISTERS: tl.constexpr, NUM_SUMS: tl.constexpr, BY_COLUMN: tl.constexpr, IN_PLACE: tl.constexpr,
    PIECE: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A piece of one vector of `size`, or of LANES columns out of `count`.  # partial: [pieces, count, NUM_SUMS]

    block_stride: from the numbers of one vector to those of the next. totals: the sums of a program in memory.
    """
    program = before + tl.program_id(0)
    piece, unit = (program // units).to(tl.int64), (program % units).to(tl.int64)
    length_of_piece = tl.minimum(size - piece * PIECE, PIECE).to(tl.int32)
    lanes = tl.arange(0, LANES)
    column = unit * LANES + lanes
    if BY_COLUMN:
        at, stride, steps = piece * PIECE * count + unit * LANES, count, length_of_piece
        numbers += tl.minimum(column, count - 1) * block_stride
    else:
        at, stride, steps = unit * size + piece * PIECE, LANES, tl.cdiv(length_of_piece, LANES)
        numbers += unit * block_stride
    sums = (tl.zeros([LANES], tl.float64),) * NUM_SUMS
    if PROGRAM is None:
        registers += tl.program_id(0) * NUM_REGISTERS * LANES
        totals += tl.program_id(0) * NUM_SUMS * LANES
        for s in range(NUM_SUMS):
            tl.store(totals + s * LANES + lanes, tl.zeros([LANES], tl.float64))
        tl.debug_barrier()
    for step in tl.range(steps, loop_unroll_factor=UNROLL):
        if BY_COLUMN:
            left = count - unit * LANES
        else:
            left = length_of_piece - step * LANES
        if PROGRAM is None:
            run_from_memory(
                row, at, lanes, left, numbers, num_inputs, words, length, registers, totals, STORED, COMPUTE, WIDE, OUT
            )  # fmt: skip
        else:
            sums = run_constant(
                row, at, lanes, left, numbers, num_inputs, sums,
                STORED, COMPUTE, WIDE, OUT, PROGRAM, NUM_REGISTERS, IN_PLACE, False,
            )  # fmt: skip
        at += stride
    to = partial + (piece * count + (column if BY_COLUMN else unit)) * NUM_SUMS
    if PROGRAM is None:
        for s in range(NUM_SUMS):
            _store(tl.load(totals + s * LANES + lanes), to + s, column < count, BY_COLUMN, LANES)
    else:
        for s in tl.static_range(NUM_SUMS):
            _store(sums[s], to + s, column < count, BY_COLUMN, LANES)


@triton.jit
def _store(total, to, there, BY_COLUMN: tl.constexpr, LANES: tl.constexpr):
    """One sum of every column, or that of all lanes."""
    if BY_COLUMN:
        tl.store(to, total, mask=there)
    else:
        tl.store(to, tl.sum(fold_lanes(total[None, :], LANES), axis=0))


class Call:
    """What steps_out and steps_limits are given, checked and on the device.

    out: None where they are not known yet. keys: in their place, of the only tensor and in the compute type.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        num_inputs: int,
        program: Sequence[int],
        numbers: Tensor,
        axis: str,
        wide: bool,
        out: Sequence[Tensor] | None = None,
        keys: Tensor | None = None,
    ) -> None:
        arguments.check_one_of("axis", axis, AXES)
        if num_inputs < 1 or not inputs or len(inputs) % num_inputs:
            raise RuntimeError(
                "inputs must be num_inputs tensors for every tensor that is computed, "
                f"got {len(inputs)} for {num_inputs}"
            )
        if numbers.dim() != 2 or numbers.dtype != torch.float64:
            raise RuntimeError("numbers must be float64 [num_blocks, num_numbers], got another dtype or shape")
        self.program = Program(program, num_inputs, numbers.shape[1])
        self.firsts, self.num_inputs, self.axis = inputs[::num_inputs], num_inputs, axis
        self.counts = [num_blocks_of(first.shape, axis) for first in self.firsts]
        self.shared = len(numbers) == 1
        if not self.shared and len(numbers) != sum(self.counts):
            raise RuntimeError(f"numbers must be of 1 block or of {sum(self.counts)}, got {len(numbers)}")
        if out is not None and len(out) != len(self.firsts) * self.program.num_outputs:
            raise RuntimeError(
                f"out must be {self.program.num_outputs} for every tensor that is computed, "
                f"got {len(out)} for {len(self.firsts)}"
            )
        if self.program.packed and axis != "tensor":
            raise RuntimeError(f"axis must be 'tensor' for a program with bits, got {axis!r}")
        self.has_keys = keys is not None
        self.placed = axis != "tensor" and not self.shared  # numbers of an element
        places = [(0, 1, 1)] * len(self.firsts) if self.shared else places_of(self.firsts, axis)
        self.scope = Scope(
            [], inputs, num_inputs, out, keys, places=places, num_outputs=self.program.num_outputs,
            packed=self.program.packed,
        )  # fmt: skip
        if self.scope.in_place and self.program.loads_after_stores:
            raise RuntimeError("program must load before it stores where out is an input, got a load after a store")
        device = self.scope.device
        if numbers.device not in (torch.device("cpu"), device):
            raise RuntimeError(f"numbers must be on the CPU or on {device}, got {numbers.device}")
        numbers = numbers.contiguous()
        self.numbers = upload(numbers, device) if numbers.device.type == "cpu" else numbers
        self.compute = torch.float64 if wide else self.scope.compute

    @property
    def is_constant(self) -> bool:
        return len(self.program) <= LONGEST

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """Of kernels that run the program on tensors of `dtype`."""
        return {
            "STORED": TYPES[dtype],
            "COMPUTE": TYPES[self.compute],
            "WIDE": self.compute != self.scope.compute,
            "OUT": TYPES[self.compute if self.has_keys else dtype],
            "PROGRAM": self.program.named if self.is_constant else None,
            "NUM_REGISTERS": self.program.num_registers,
        }

    def words(self) -> Tensor | None:
        """int32 [length, 5], of a program that is no constant."""
        if self.is_constant:
            return None
        return upload(torch.tensor(self.program.words, dtype=torch.int32).view(-1, 5), self.scope.device)

    def memory(self, num_programs: int, elements: int) -> tuple[int, Tensor | None]:
        """How many programs of the GPU run at once, and the registers of those, if in memory."""
        if self.is_constant:
            return num_programs, None
        together = min(num_programs, max(1, MEMORY // (self.program.num_registers * elements * self.compute.itemsize)))
        shape = (together, self.program.num_registers, elements)
        return together, torch.empty(shape, dtype=self.compute, device=self.scope.device)

    @property
    def block(self) -> int:
        """Elements at a time, so that the registers of all threads of the GPU's program suffice."""
        if not self.is_constant:
            return 512
        doubles = self.compute == torch.float64 or self.program.has_exponentials or self.placed
        elements = HELD // (max(1, self.program.num_registers) * (8 if doubles else 4))
        return max(128, min(1024, 1 << max(0, elements.bit_length() - 1)))

    def run(self) -> None:
        """Fills the outputs, all tensors of a dtype at once."""
        words = self.words()
        for group in self.scope.groups:
            together, registers = self.memory(group.num_chunks, self.block)
            for before in range(0, group.num_chunks, together or 1):
                _steps[(min(together, group.num_chunks - before),)](
                    *group.place, before, self.num_inputs, self.program.num_outputs, self.numbers,
                    self.numbers.shape[1], words, len(self.program), registers, **self.constants(group.dtype),
                    PLACED=self.placed, IN_PLACE=self.scope.in_place,
                    CHUNK=CHUNK, BLOCK=self.block, num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip

    def run_and_add(self) -> Tensor:
        """Fills the outputs and returns the sums, [num_blocks, num_sums]."""
        rows = {group.dtype: iter(group.table) for group in self.scope.groups}
        words = self.words()
        sums = []
        before = 0
        for first, count in zip(self.firsts, self.counts, strict=True):
            row, numbers = next(rows[first.dtype]), self.numbers if self.shared else self.numbers[before:]
            if first.numel():
                sums.append(self._add(row, first, count, numbers, words))
            else:
                sums.append(self.numbers.new_zeros((count, self.program.num_sums)))
            before += count
        return torch.cat(sums)

    def _add(self, row: Tensor, first: Tensor, count: int, numbers: Tensor, words: Tensor | None) -> Tensor:
        by_column = self.axis == "column" and first.dim() > 1
        size, piece = first.numel() // count, RUN if by_column else SUM_BLOCK
        units, pieces = triton.cdiv(count, LANES) if by_column else count, triton.cdiv(size, piece)
        num_sums = self.program.num_sums
        partial = numbers.new_empty((pieces, count, num_sums))
        together, registers = self.memory(pieces * units, LANES)
        totals = None if self.is_constant else numbers.new_empty((together, num_sums, LANES))
        for before in range(0, pieces * units, together):
            _steps_and_sums[(min(together, pieces * units - before),)](
                row, before, self.num_inputs, count, size, units, numbers, 0 if self.shared else numbers.shape[1],
                partial, words, len(self.program), registers, totals, **self.constants(first.dtype), NUM_SUMS=num_sums,
                BY_COLUMN=by_column, IN_PLACE=self.scope.in_place, PIECE=piece,
                UNROLL=max(1, min(8, LOADS // self.num_inputs)) if self.is_constant else 1, LANES=LANES,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        return fold_halves(partial.movedim(0, -1))
