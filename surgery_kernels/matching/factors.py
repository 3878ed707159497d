"""Axes of tensors as products of factors, and which factors of which axes are one and the same.

Where two axes meet (a weight's and its input's, those of two addends) they have the same factors. Where an axis is cut
(into queries, keys and values; into heads), what was one factor is a product from then on, wherever it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Axis = tuple[int, ...]  # factors, the outermost first; none for an axis of one entry


class Factors:
    """Which of them are the same, what each is a product of, and what may not be done with its entries."""

    def __init__(self) -> None:
        self._same: list[int] = []  # another factor that this one is, or itself
        self._size: list[int] = []
        self._parts: dict[int, Axis] = {}
        self._pinned: dict[int, str] = {}  # and what by
        self._fixed: set[int] = set()  # the number of their entries may not change

    def new(self, size: int, pinned: str = "") -> Axis:
        """An axis of one factor; `pinned`: what knows its entries by their places, if anything."""
        if size == 1:
            return ()
        factor = len(self._same)
        self._same.append(factor)
        self._size.append(size)
        if pinned:
            self._pinned[factor] = pinned
        return (factor,)

    def atoms(self, axis: Iterable[int]) -> Axis:
        """The same axis in factors that are no products."""
        found: list[int] = []
        for factor in axis:
            factor = self._first(factor)
            found += self.atoms(self._parts[factor]) if factor in self._parts else [factor]
        return tuple(found)

    def size(self, axis: Iterable[int]) -> int:
        return math.prod(self._size[factor] for factor in axis)

    def pin(self, axis: Iterable[int], by: str) -> None:
        """The entries have an order: nothing may change it."""
        for factor in self.atoms(axis):
            self._pinned.setdefault(factor, by)

    def fix(self, axis: Iterable[int]) -> None:
        """The entries may be put in another order, but none may be added."""
        self._fixed.update(self.atoms(axis))

    def pinned_by(self, atom: int) -> str:
        return self._pinned.get(atom, "")

    def is_fixed(self, atom: int) -> bool:
        return atom in self._fixed

    def unify(self, a: Axis, b: Axis, by: str) -> None:
        """Two axes of one size have the same entries in the same order."""
        left, right = list(reversed(a)), list(reversed(b))
        while left and right:
            x, y = self._next(left), self._next(right)
            if x == y:
                continue
            if self._size[x] == self._size[y]:
                self._join(x, y)
            elif self._size[x] % self._size[y] == 0:
                left += reversed(self._split(x, self._size[y]))
                right.append(y)
            elif self._size[y] % self._size[x] == 0:
                left.append(x)
                right += reversed(self._split(y, self._size[x]))
            else:  # cut in two ways that have nothing in common
                self.pin((x, y, *left, *right), by)
                return
        self.pin((*left, *right), by)

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int], by: str) -> list[Axis]:
        """The axes of a tensor behind a change of shape. What such a change cuts cannot grow."""
        stack = [factor for axis in reversed(axes) for factor in reversed(axis)]
        regrouped: list[Axis] = []
        for size in sizes:
            axis: list[int] = []
            while size > 1 and stack:
                factor = self._next(stack)
                if size % self._size[factor] == 0:
                    axis.append(factor)
                    size //= self._size[factor]
                elif self._size[factor] % size == 0:
                    parts = self._split(factor, size)
                    self.fix(parts)
                    stack += reversed(parts)
                else:
                    stack.append(factor)
                    break
            if size != 1:
                break
            regrouped.append(tuple(axis))
        if stack or len(regrouped) < len(sizes):
            for axis_before in axes:
                self.pin(axis_before, by)
            return [self.new(size, by) for size in sizes]
        return regrouped

    def _first(self, factor: int) -> int:
        while self._same[factor] != factor:
            factor = self._same[factor]
        return factor

    def _next(self, stack: list[int]) -> int:
        """Takes the outermost factor off, as far as it has been cut by now."""
        first, *rest = self.atoms((stack.pop(),))
        stack += reversed(rest)
        return first

    def _join(self, x: int, y: int) -> None:
        self._same[y] = x
        if y in self._pinned:
            self._pinned.setdefault(x, self._pinned[y])
        if y in self._fixed:
            self._fixed.add(x)

    def _split(self, factor: int, outer: int) -> Axis:
        pinned = self._pinned.get(factor, "")
        parts = (*self.new(outer, pinned), *self.new(self._size[factor] // outer, pinned))
        self._parts[factor] = parts
        if factor in self._fixed:
            self._fixed.update(parts)
        return parts
