"""Some elements of a program of steps, one instruction after the other.

A short program is a constant of its kernel, and its registers are those of the GPU. A long one would take minutes to
compile: one kernel runs them all, with registers in memory that the caches hold.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from ..ops.steps import Code
from .addresses import EXPERTS, load, pointer_to
from .steps_compute import compute, narrow, number, widen

LOAD, NUMBER, WITHIN = (tl.constexpr(int(code)) for code in (Code.LOAD, Code.NUMBER, Code.WITHIN))
SUM, DOT, STORE, BITS = (tl.constexpr(int(code)) for code in (Code.SUM, Code.DOT, Code.STORE, Code.BITS))
FMA, SELECT = tl.constexpr(int(Code.FMA)), tl.constexpr(int(Code.SELECT))
FIRST, LAST = tl.constexpr(int(Code.ADD)), tl.constexpr(int(Code.SELECT))  # of those that `compute` knows
NAMES = tl.constexpr(tuple(code.name for code in Code))


@triton.jit
def run_constant(
    row, at, lanes, left, numbers, num_inputs, sums,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr, PROGRAM: tl.constexpr,
    NUM_REGISTERS: tl.constexpr, IN_PLACE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Elements at + lanes of the tensor of `row`; returns `sums` with what they add.

    numbers: where the first one of all elements is, or of each. WIDE: float64 is computed in and not stored; OUT: the
    type of outputs.
    """
    registers = (tl.zeros(lanes.shape, COMPUTE),) * NUM_REGISTERS
    for i in tl.static_range(0, len(PROGRAM), 5):  # code, destination, a, b, rounds
        if PROGRAM[i] == "STORE":
            if IN_PLACE:
                tl.debug_barrier()  # several threads may have read what one of them writes
            x = narrow(registers[PROGRAM[i + 2]], OUT, WIDE)
            address = tl.load(row + EXPERTS + num_inputs + PROGRAM[i + 1])
            if WHOLE:
                tl.store(pointer_to(address, OUT, WHOLE) + at + lanes, x)
            else:
                tl.store(pointer_to(address, OUT, WHOLE) + at + lanes, x, mask=lanes < left)
        elif PROGRAM[i] == "BITS":
            address = tl.load(row + EXPERTS + num_inputs + PROGRAM[i + 1])
            _store_bits(registers[PROGRAM[i + 2]], address, at, lanes, left)
        elif PROGRAM[i] == "SUM":
            sums = _add(sums, registers[PROGRAM[i + 2]].to(tl.float64), lanes < left, PROGRAM[i + 1])
        elif PROGRAM[i] == "DOT":
            product = registers[PROGRAM[i + 2]].to(tl.float64) * registers[PROGRAM[i + 3]].to(tl.float64)
            sums = _add(sums, product, lanes < left, PROGRAM[i + 1])
        else:
            if PROGRAM[i] == "LOAD":
                address = tl.load(row + EXPERTS + PROGRAM[i + 2])
                x = widen(load(address, at, lanes, left, STORED, STORED, WHOLE), COMPUTE, WIDE)
            elif PROGRAM[i] == "NUMBER":
                x = number(numbers, PROGRAM[i + 2], lanes, COMPUTE)
            elif PROGRAM[i] == "WITHIN":
                limit = number(numbers, PROGRAM[i + 3], lanes, COMPUTE)
                cut = number(numbers, PROGRAM[i + 3] + 1, lanes, tl.float64)
                key = registers[PROGRAM[i + 2]]
                x = ((key > limit) | ((key == limit) & ((at + lanes).to(tl.float64) < cut))).to(COMPUTE)
            elif PROGRAM[i] == "FMA" or PROGRAM[i] == "SELECT":
                x = compute(
                    tl.constexpr(PROGRAM[i]),  # Triton 3.6 takes a name out of a tuple as it is
                    registers[PROGRAM[i + 2]],
                    registers[PROGRAM[i + 3]],
                    registers[PROGRAM[i + 1]],
                )
            else:
                x = compute(tl.constexpr(PROGRAM[i]), registers[PROGRAM[i + 2]], registers[PROGRAM[i + 3]], None)
            if PROGRAM[i + 4]:
                x = widen(narrow(x, STORED, WIDE), COMPUTE, WIDE)
            registers = registers[: PROGRAM[i + 1]] + (x,) + registers[PROGRAM[i + 1] + 1 :]
    return sums


@triton.jit
def _store_bits(x, address, at, lanes, left):
    """A byte for every eight elements, of which the first is a multiple of eight."""
    bits = ((x != 0) & (lanes < left)).to(tl.int32) << (lanes % 8)
    byte = tl.arange(0, lanes.shape[0] // 8)
    packed = tl.sum(tl.reshape(bits, [lanes.shape[0] // 8, 8]), axis=1)
    tl.store(address.to(tl.pointer_type(tl.uint8)) + at // 8 + byte, packed.to(tl.uint8), mask=byte * 8 < left)


@triton.jit
def _add(sums, terms, there, PLACE: tl.constexpr):
    """Elements that are not there add nothing: a sum from 0 on is never -0."""
    total = sums[PLACE] + tl.where(there, terms, 0.0)
    return sums[:PLACE] + (total,) + sums[PLACE + 1 :]


@triton.jit
def run_from_memory(
    row, at, lanes, left, numbers, num_inputs, words, length, registers, sums,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, WIDE: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """The same with `length` instructions at `words`, registers and sums in memory of this program of the GPU."""
    size: tl.constexpr = lanes.shape[0]
    for i in range(length):
        code, destination = tl.load(words + 5 * i), tl.load(words + 5 * i + 1)
        a, b = tl.load(words + 5 * i + 2), tl.load(words + 5 * i + 3)
        to = registers + destination * size + lanes
        x = tl.zeros([size], COMPUTE)
        if code == STORE:
            pointer = tl.load(row + EXPERTS + num_inputs + destination).to(tl.pointer_type(OUT)) + at + lanes
            tl.store(pointer, narrow(tl.load(registers + a * size + lanes), OUT, WIDE), mask=lanes < left)
        elif code == BITS:
            address = tl.load(row + EXPERTS + num_inputs + destination)
            _store_bits(tl.load(registers + a * size + lanes), address, at, lanes, left)
        elif (code == SUM) | (code == DOT):
            if sums is not None:
                terms = tl.load(registers + a * size + lanes).to(tl.float64)
                if code == DOT:
                    terms = terms * tl.load(registers + b * size + lanes).to(tl.float64)
                place = sums + destination * size + lanes
                tl.store(place, tl.load(place) + tl.where(lanes < left, terms, 0.0))
        else:
            if code == LOAD:
                address = tl.load(row + EXPERTS + a)
                x = widen(load(address, at, lanes, left, STORED, STORED, False), COMPUTE, WIDE)
            elif code == NUMBER:
                x = number(numbers, a, lanes, COMPUTE)
            elif code == WITHIN:
                key = tl.load(registers + a * size + lanes)
                limit, cut = number(numbers, b, lanes, COMPUTE), number(numbers, b + 1, lanes, tl.float64)
                x = ((key > limit) | ((key == limit) & ((at + lanes).to(tl.float64) < cut))).to(COMPUTE)
            else:
                p, q, d = tl.load(registers + a * size + lanes), tl.load(registers + b * size + lanes), x
                if (code == FMA) | (code == SELECT):
                    d = tl.load(to)
                for k in tl.static_range(FIRST, LAST + 1):
                    if code == k:
                        x = compute(tl.constexpr(NAMES[k]), p, q, d)
            if tl.load(words + 5 * i + 4) != 0:
                x = widen(narrow(x, STORED, WIDE), COMPUTE, WIDE)
            tl.store(to, x)
        tl.debug_barrier()  # another thread may read it
