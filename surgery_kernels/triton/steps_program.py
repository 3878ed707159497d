"""A program of steps as kernels take it: checked, its instructions by name."""

from __future__ import annotations

from collections.abc import Sequence

from ..ops.steps import Code

MOST = 1 << 10  # registers, outputs or sums
UNARY = (Code.ABS, Code.NEG, Code.SQRT, Code.EXP, Code.LOG, Code.SUM, Code.STORE, Code.BITS)


class Program:
    """Refuses what csrc/cpu/steps_program.cpp refuses: what would reach memory that is not the program's."""

    def __init__(self, words: Sequence[int], num_inputs: int, num_numbers: int) -> None:
        if not words or len(words) % 5:
            raise RuntimeError(f"program must be five integers for every step, got {len(words)}")
        self._limits = {"inputs": num_inputs, "numbers": num_numbers}
        self._used: dict[str, set[int]] = {"registers": set(), "outputs": set(), "sums": set()}
        self.packed: set[int] = set()  # outputs that are bits
        self.loads_after_stores = False
        self.words = list(words)
        self.named: tuple[str | int, ...] = ()  # the same with every code by its name
        for i in range(0, len(words), 5):
            self.named += self._instruction(i, *words[i : i + 5])
        self.has_exponentials = not {Code.EXP.name, Code.LOG.name}.isdisjoint(self.named)
        self.num_registers = 1 + max(self._used["registers"], default=-1)
        self.num_outputs, self.num_sums = self._count("outputs"), self._count("sums")

    def __len__(self) -> int:
        return len(self.words) // 5

    def _instruction(
        self, place: int, word: int, destination: int, a: int, b: int, rounds: int
    ) -> tuple[str | int, ...]:
        if not 0 <= word < len(Code):
            raise RuntimeError(f"program must have codes in [0, {len(Code)}), got {word}")
        code = Code(word)
        if code == Code.LOAD:
            self._check("inputs", a)
            self.loads_after_stores |= bool(self._used["outputs"])
        elif code == Code.NUMBER:
            self._check("numbers", a)
        else:
            read = [a] if code in UNARY or code == Code.WITHIN else [a, b]
            read += [destination] if code in (Code.FMA, Code.SELECT) else []
            for register in read:
                if register not in self._used["registers"]:
                    raise RuntimeError(
                        f"program must fill a register before it is read, got {register} in step {place // 5}"
                    )
            if code == Code.WITHIN:
                self._check("numbers", b)
                self._check("numbers", b + 1)
        filled = {
            Code.STORE: "outputs", Code.BITS: "outputs", Code.SUM: "sums", Code.DOT: "sums"
        }.get(code, "registers")  # fmt: skip
        if not 0 <= destination < MOST:
            raise RuntimeError(f"program must have {filled} in [0, {MOST}), got {destination}")
        self._used[filled].add(destination)
        if filled == "outputs":
            (self.packed.add if code == Code.BITS else self.packed.discard)(destination)
        if code in UNARY:
            b = a
        return code.name, destination, a, b, int(rounds != 0)

    def _check(self, what: str, i: int) -> None:
        if not 0 <= i < self._limits[what]:
            raise RuntimeError(f"program must have {what} in [0, {self._limits[what]}), got {i}")

    def _count(self, what: str) -> int:
        used = self._used[what]
        if gap := set(range(max(used, default=-1))) - used:
            raise RuntimeError(f"program must use every one of its {what}, got none for {min(gap)}")
        return len(used)
