"""Short programs of element-wise steps, each rounded where a toolkit rounds, fused into one read."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from . import arguments
from .mix import AXES, num_blocks_of

_ops = torch.ops.surgery_kernels

Numbers = Tensor | Sequence[float]


class Code(IntEnum):
    """What an instruction does, as in csrc/step.h."""

    LOAD = 0
    NUMBER = 1
    ADD = 2
    SUB = 3
    MUL = 4
    DIV = 5
    FMA = 6
    MIN = 7
    MAX = 8
    ABS = 9
    NEG = 10
    SQRT = 11
    EXP = 12
    LOG = 13
    GT = 14
    GE = 15
    EQ = 16
    SELECT = 17
    WITHIN = 18
    SUM = 19
    DOT = 20
    STORE = 21
    BITS = 22


_EFFECTS = (Code.SUM, Code.DOT, Code.STORE, Code.BITS)
_COMPARISONS = (Code.GT, Code.GE, Code.EQ, Code.WITHIN)
_CHOICES = (
    Code.MIN,
    Code.MAX,
    Code.ABS,
    Code.NEG,
    Code.SELECT,
)  # what they give is one of their operands, or minus one
_IN_PLACE = (Code.FMA, Code.SELECT)  # the last operand lies where the result will


@dataclass(frozen=True)
class _Node:
    """One step: its operands are steps before it; `place` is the input, number, sum or output it names."""

    code: Code
    operands: tuple[int, ...]
    place: int | None
    rounds: bool


@dataclass(frozen=True, eq=False)
class Value:
    """A value of every element, within one program. Operators take another value or a number."""

    steps: Steps = field(repr=False)
    index: int

    def __add__(self, other: Operand) -> Value:
        return self.steps._step(Code.ADD, self, other)

    def __radd__(self, other: float) -> Value:
        return self.steps._step(Code.ADD, other, self)

    def __sub__(self, other: Operand) -> Value:
        return self.steps._step(Code.SUB, self, other)

    def __rsub__(self, other: float) -> Value:
        return self.steps._step(Code.SUB, other, self)

    def __mul__(self, other: Operand) -> Value:
        return self.steps._step(Code.MUL, self, other)

    def __rmul__(self, other: float) -> Value:
        return self.steps._step(Code.MUL, other, self)

    def __truediv__(self, other: Operand) -> Value:
        return self.steps._step(Code.DIV, self, other)

    def __rtruediv__(self, other: float) -> Value:
        """As torch divides a number by a tensor: the reciprocal, rounded, times the number."""
        reciprocal = self.steps._step(Code.DIV, 1.0, self)
        return reciprocal if other == 1 else reciprocal * other

    def __neg__(self) -> Value:
        return self.steps._step(Code.NEG, self)

    def __abs__(self) -> Value:
        return self.steps._step(Code.ABS, self)

    def __gt__(self, other: Operand) -> Value:
        return self.steps._step(Code.GT, self, other)

    def __ge__(self, other: Operand) -> Value:
        return self.steps._step(Code.GE, self, other)

    def __lt__(self, other: Operand) -> Value:
        return self.steps._step(Code.GT, other, self)

    def __le__(self, other: Operand) -> Value:
        return self.steps._step(Code.GE, other, self)

    def equals(self, other: Operand) -> Value:
        return self.steps._step(Code.EQ, self, other)

    def minimum(self, other: Operand) -> Value:
        """NaN where either is, as torch.minimum; of two zeros the other one."""
        return self.steps._step(Code.MIN, self, other)

    def maximum(self, other: Operand) -> Value:
        return self.steps._step(Code.MAX, self, other)

    def sqrt(self) -> Value:
        return self.steps._step(Code.SQRT, self)

    def exp(self) -> Value:
        return self.steps._step(Code.EXP, self)

    def log(self) -> Value:
        return self.steps._step(Code.LOG, self)

    def times_plus(self, factor: Operand, addend: Operand) -> Value:
        """``self * factor + addend``, rounded once before it is rounded to the stored dtype."""
        return self.steps._step(Code.FMA, self, factor, addend)

    def where(self, chosen: Operand, other: Operand) -> Value:
        """`chosen` where this is not 0, as of a comparison, else `other`."""
        return self.steps._step(Code.SELECT, chosen, other, self)

    def within(self, limit: int) -> Value:
        """1 where this is above number `limit`, or equals it and lies before number ``limit + 1`` in the flat order of
        its tensor, else 0: a threshold and a cut as `Steps.limits` gives them."""
        return self.steps._record(Code.WITHIN, (self,), place=limit, rounds=False)


Operand = Value | float


class Steps:
    """A program of element-wise steps over `num_inputs` tensors, built once and run many times.

    ::

        steps = Steps(2)
        a, b, t = steps.load(0), steps.load(1), steps.number(0)
        steps.store(a + t * (b - a))
        steps.run([first, second], [0.3], out=[merged])

    Arithmetic is that of float32 (float64 for float64 tensors, or for all where a run is `wide`), and every result is
    rounded to the dtype of the tensors, as that of a torch operation on them; under ``exact()`` it is not. Numbers and
    Python floats are not rounded to it either, as torch does not. Whatever the program, every input is read once and
    nothing but the outputs is written; results are the same bits on every instruction set and thread count.

    Args:
        num_inputs: How many tensors of one shape and dtype are read.
    """

    def __init__(self, num_inputs: int) -> None:
        if not isinstance(num_inputs, int) or num_inputs < 1:
            raise ValueError(f"num_inputs must be 1 or more, got {num_inputs!r}")
        self.num_inputs = num_inputs
        self.num_outputs = self.num_sums = self.num_numbers = 0
        self._nodes: list[_Node] = []
        self._index_of: dict[_Node, int] = {}
        self._constants: dict[str, Value] = {}
        self._stored: set[int] = set()  # values that the stored dtype holds
        self._packed: set[int] = set()  # outputs that are bits
        self._rounds = True
        self._program: list[int] | None = None

    def load(self, i: int) -> Value:
        """Input `i`."""
        if not 0 <= i < self.num_inputs:
            raise ValueError(f"i must be in [0, {self.num_inputs}), got {i}")
        return self._record(Code.LOAD, (), place=i, rounds=False)

    def number(self, k: int) -> Value:
        """Number `k` of a run, the same for all elements of a tensor, row or column."""
        if k < 0:
            raise ValueError(f"k must be 0 or greater, got {k}")
        return self._record(Code.NUMBER, (), place=k, rounds=False)

    def constant(self, number: float) -> Value:
        """A number of every run."""
        return self._value(number)

    def store(self, value: Value) -> int:
        """Makes `value` the next output, rounded to the stored dtype; returns which one it is."""
        self._record(Code.STORE, (value,), place=self.num_outputs, rounds=False)
        self.num_outputs += 1
        return self.num_outputs - 1

    def store_bits(self, value: Value) -> int:
        """Makes the next output packed bits (see `masks.unpack`), 1 where `value` is not 0; returns which one it is."""
        self._record(Code.BITS, (value,), place=self.num_outputs, rounds=False)
        self._packed.add(self.num_outputs)
        self.num_outputs += 1
        return self.num_outputs - 1

    def sum(self, value: Value) -> int:
        """Adds `value` up in float64; returns which sum it is."""
        return self._add_up(Code.SUM, value)

    def dot(self, a: Value, b: Value) -> int:
        """Adds ``a * b`` up in float64, where a product of two float32 values is exact; returns which sum it is."""
        return self._add_up(Code.DOT, a, b)

    @contextlib.contextmanager
    def exact(self, exact: bool = True) -> Iterator[None]:
        """Results within are not rounded to the stored dtype; where not `exact`, they are."""
        before, self._rounds = self._rounds, not exact
        try:
            yield
        finally:
            self._rounds = before

    def run(
        self,
        inputs: Sequence[Tensor],
        numbers: Numbers = (),
        *,
        axis: str = "tensor",
        wide: bool = False,
        out: Sequence[Tensor] = (),
    ) -> Tensor:
        """Fills the outputs and returns the sums.

        Args:
            inputs: num_inputs tensors of any shape, one dtype of float64, float32, float16 and bfloat16, and one
                device; several tensors at once: all inputs of the first, then of the second, ..., all float64 or none.
            numbers: [num_numbers], or [num_blocks, num_numbers] where every block has its own.
            axis: What a block is: a "tensor"; a "row" along its last dimension; or a "column" of the tensor seen as
                [shape[0], -1]. A tensor of one dimension or none is one block. Those of all tensors count in order.
            wide: Whether arithmetic is that of float64 whatever the dtype.
            out: As many tensors like the inputs as the program stores, of the first tensor, then of the second, ... One
                may be an input of the same tensor; no other overlap is allowed. Those of `store_bits` are contiguous
                uint8 [ceil(numel / 8)], for the axis "tensor" only.

        Returns:
            [num_blocks, num_sums] float64, added up in an order of its own: 0 for an empty block. Carries no gradient.

        Raises:
            ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
            RuntimeError: an `out` overlaps an input or another, or tensors are float64 and others at once.
        """
        inputs = self._check(inputs, axis)
        outputs = list(out)
        wanted = len(inputs) // self.num_inputs * self.num_outputs
        if len(outputs) != wanted:
            raise ValueError(f"out must be {wanted} tensors, {self.num_outputs} for each computed, got {len(outputs)}")
        for i, tensor in enumerate(outputs):
            first = inputs[i // self.num_outputs * self.num_inputs]
            if i % self.num_outputs in self._packed:
                _check_bits(f"out[{i}]", tensor, first)
            else:
                arguments.check_like(f"out[{i}]", tensor, first, "its inputs")
        if self._packed and axis != "tensor":
            raise ValueError(f"axis must be 'tensor' for a program with bits, got {axis!r}")
        sums = _ops.steps_out(
            inputs,
            self.num_inputs,
            self.program,
            self.table(numbers),
            axis=axis,
            wide=bool(wide),
            out=[tensor.detach() for tensor in outputs],
        )
        for tensor in outputs:
            torch.autograd.graph.increment_version(tensor)  # a graph that saved it must notice
        return sums

    def limits(
        self,
        inputs: Sequence[Tensor],
        ranks: Sequence[int],
        numbers: Numbers = (),
        *,
        axis: str = "tensor",
        wide: bool = False,
        whole: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Exact order statistics of the one value that the program stores: its keys, which lie in no tensor.

        Rank r > 0 keeps the r largest keys: those above its threshold, the r-th largest, and those that equal it before
        the cut in the flat order of their tensor, as `Value.within` decides. Rank 0 keeps none. Rank -s is about the s
        smallest: those below its threshold, the s-th smallest, and those that equal it before the cut.

        Args:
            inputs, numbers, axis, wide: As in `run`.
            ranks: From -n to n, for every block of n elements the same.
            whole: Whether they are of whole tensors, though `numbers` are of rows; not of columns.

        Returns:
            thresholds, float32 (float64 for float64 tensors, or where `wide`) and cuts, int64, both [num_blocks,
            num_ranks], or [num_tensors, num_ranks] of `whole` ones. Keys are not rounded to the stored dtype. Their
            sign is ignored; NaN is above all.

        Raises:
            ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
            RuntimeError: a rank is outside the number of elements, or tensors are float64 and others at once.
        """
        inputs = self._check(inputs, axis)
        if (self.num_outputs, self.num_sums) != (1, 0) or self._packed:
            raise ValueError(
                "the program must store its keys and nothing else, "
                f"got {self.num_outputs} outputs and {self.num_sums} sums"
            )
        options = {"axis": axis, "wide": bool(wide), "whole": bool(whole)}
        return _ops.steps_limits(inputs, self.num_inputs, self.program, self.table(numbers), list(ranks), **options)

    @property
    def program(self) -> list[int]:
        """Five integers for every instruction: code, destination, a, b, and whether the result is rounded."""
        if self._program is None:
            self._program = _compile(self._nodes, self.num_numbers)
        return self._program

    def _check(self, inputs: Sequence[Tensor], axis: str) -> list[Tensor]:
        arguments.check_one_of("axis", axis, AXES)
        inputs = list(inputs)
        if not inputs or len(inputs) % self.num_inputs:
            raise ValueError(f"inputs must be {self.num_inputs} tensors for each that is computed, got {len(inputs)}")
        for i, tensor in enumerate(inputs):
            first = inputs[i - i % self.num_inputs]
            if not isinstance(first, Tensor):
                raise TypeError(f"inputs[{i}] must be a tensor, got {type(first).__name__}")
            if first.dtype not in arguments.DTYPES:
                raise ValueError(f"inputs[{i}] must be float64, float32, float16 or bfloat16, got {first.dtype}")
            arguments.check_like(f"inputs[{i}]", tensor, first, f"inputs[{i - i % self.num_inputs}]")
        return [tensor.detach() for tensor in inputs]

    def table(self, numbers: Numbers) -> Tensor:
        """Those of a run, and behind them the constants of the program.  # float64 [num_blocks or 1, num_numbers]"""
        given = torch.as_tensor(numbers, dtype=torch.float64).detach()
        given = given if given.dim() > 1 else given[None]
        if given.dim() != 2 or given.shape[1] < self.num_numbers:
            raise ValueError(
                f"numbers must be [{self.num_numbers}] or [num_blocks, {self.num_numbers}], got {tuple(given.shape)}"
            )
        given = given[:, : self.num_numbers]
        constants = torch.tensor([float.fromhex(x) for x in self._constants], dtype=torch.float64, device=given.device)
        return torch.cat([given, constants.expand(len(given), -1)], dim=1)

    def _step(self, code: Code, *operands: Operand) -> Value:
        return self._record(code, tuple(self._value(operand) for operand in operands))

    def _value(self, operand: Operand) -> Value:
        if isinstance(operand, Value):
            return operand
        number = arguments.number("an operand", operand, "a value of this program or a number")
        constant = number.hex()  # tells -0 from 0
        if constant not in self._constants:
            place = -1 - len(self._constants)  # behind all numbers, whose count is not known yet
            self._constants[constant] = self._record(Code.NUMBER, (), place=place, rounds=False)
        return self._constants[constant]

    def _record(
        self, code: Code, operands: tuple[Value, ...], *, place: int | None = None, rounds: bool | None = None
    ) -> Value:
        for operand in operands:
            if operand.steps is not self:
                raise ValueError("an operand must be a value of this program or a number, got one of another program")
        indices = tuple(operand.index for operand in operands)
        held = code in (Code.LOAD, *_COMPARISONS) or (code in _CHOICES and self._stored.issuperset(indices[:2]))
        rounds = self._rounds and not held if rounds is None else rounds
        if code in (Code.NUMBER, Code.WITHIN) and place is not None and place >= 0:
            self.num_numbers = max(self.num_numbers, place + (1 if code == Code.NUMBER else 2))
        node = _Node(code, indices, place, rounds)
        index = self._index_of.get(node)
        if index is None:
            index = self._index_of[node] = len(self._nodes)
            self._nodes.append(node)
            self._program = None
        if held or rounds:
            self._stored.add(index)
        return Value(self, index)

    def _add_up(self, code: Code, *operands: Value) -> int:
        self._record(code, operands, place=self.num_sums, rounds=False)
        self.num_sums += 1
        return self.num_sums - 1


def _check_bits(argument: str, tensor: object, first: Tensor) -> None:
    size = -(-first.numel() // 8)
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.shape != (size,):
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{argument} must be uint8 of shape ({size},), got {got}")
    if tensor.device != first.device or not tensor.is_contiguous():
        raise ValueError(f"{argument} must be contiguous and on {first.device} like its inputs, got another tensor")


def _compile(nodes: Sequence[_Node], num_numbers: int) -> list[int]:
    """Instructions for what has an effect, in order; a register is free once its value was read for the last time."""
    last_use = _last_uses(nodes)
    register: dict[int, int] = {}  # of the values that are alive
    free: list[int] = []
    words: list[int] = []

    def allocate() -> int:
        return heapq.heappop(free) if free else len(register)

    for index in sorted(last_use):
        node = nodes[index]
        places = [register[operand] for operand in node.operands]
        dying = {operand for operand in node.operands if last_use[operand] == index}
        target = None
        if node.code in _IN_PLACE and node.operands[-1] not in dying:
            target = allocate()  # no operand's: it is filled before they are read
            words += [Code.MAX, target, places[-1], places[-1], 0]
        elif node.code in _IN_PLACE:
            target = places[-1]
            dying.remove(node.operands[-1])
            del register[node.operands[-1]]
        for operand in dying:
            heapq.heappush(free, register.pop(operand))
        if node.code in _EFFECTS:
            words += _instruction(node, node.place, places, num_numbers)
            continue
        register[index] = allocate() if target is None else target
        words += _instruction(node, register[index], places, num_numbers)
    return words


def _last_uses(nodes: Sequence[_Node]) -> dict[int, int]:
    """The steps that have an effect, or whose value one of them needs, and which step reads it last."""
    last_use: dict[int, int] = {}
    for index in reversed(range(len(nodes))):
        if index in last_use or nodes[index].code in _EFFECTS:
            last_use.setdefault(index, index)
            for operand in nodes[index].operands:
                last_use.setdefault(operand, index)
    return last_use


def _instruction(node: _Node, destination: int | None, places: Sequence[int], num_numbers: int) -> list[int]:
    assert destination is not None
    a, b = (*places, 0, 0)[:2]
    if node.place is not None and node.code not in _EFFECTS:
        place = node.place if node.place >= 0 else num_numbers - 1 - node.place  # constants lie behind the numbers
        a, b = (a, place) if node.code == Code.WITHIN else (place, 0)
    return [int(node.code), destination, a, b, int(node.rounds)]


@torch.library.register_fake("surgery_kernels::steps_out")
def _(
    inputs: Sequence[Tensor],
    num_inputs: int,
    program: Sequence[int],
    numbers: Tensor,
    axis: str = "tensor",
    wide: bool = False,
    *,
    out: Sequence[Tensor],
) -> Tensor:
    num_blocks = sum(num_blocks_of(tensor.shape, axis) for tensor in inputs[::num_inputs])
    slots = [d for code, d in zip(program[::5], program[1::5], strict=True) if code in (Code.SUM, Code.DOT)]
    return inputs[0].new_empty((num_blocks, max(slots, default=-1) + 1), dtype=torch.float64)


@torch.library.register_fake("surgery_kernels::steps_limits")
def _(
    inputs: Sequence[Tensor],
    num_inputs: int,
    program: Sequence[int],
    numbers: Tensor,
    ranks: Sequence[int],
    axis: str = "tensor",
    wide: bool = False,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    counts = [1 if whole else num_blocks_of(tensor.shape, axis) for tensor in inputs[::num_inputs]]
    shape = (sum(counts), len(ranks))
    compute = torch.float64 if wide else torch.promote_types(inputs[0].dtype, torch.float32)
    return inputs[0].new_empty(shape, dtype=compute), inputs[0].new_empty(shape, dtype=torch.int64)
