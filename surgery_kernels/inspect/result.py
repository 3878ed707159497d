"""What a merge made of its models: how far the result is from each, and what was trimmed, rounded and clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..ops.census import Census, census
from ..ops.gram import gram
from .numbers import share


@dataclass(frozen=True)
class ResultNumbers:
    """Of one tensor, or the sum over several."""

    numel: int
    products: Tensor  # float64 [num_tasks + 1, num_tasks + 1], of task vectors; the result's comes last
    census: Census  # of the result as the only expert
    rounding: float  # square of the length of what the cast to the written dtype changed

    def __add__(self, other: ResultNumbers) -> ResultNumbers:
        products, rounding = self.products + other.products, self.rounding + other.rounding
        return ResultNumbers(self.numel + other.numel, products, self.census + other.census, rounding)

    @property
    def length(self) -> float:
        """Of the result's task vector."""
        return math.sqrt(max(0.0, self.products[-1, -1].item()))

    @property
    def distances(self) -> list[float]:
        """From the result to every expert."""
        squares = self.products.diagonal()[:-1] + self.products[-1, -1] - 2 * self.products[-1, :-1]
        return squares.clamp_min(0).sqrt().tolist()

    @property
    def cosines(self) -> list[float]:
        """Of the result's task vector and every expert's; NaN where one is 0."""
        lengths = self.products.diagonal().clamp_min(0).sqrt()
        return (self.products[-1, :-1] / (lengths[:-1] * lengths[-1])).clamp(-1, 1).tolist()

    @property
    def rounded(self) -> float:
        """What the cast changed, over the length of the result's task vector."""
        return share(math.sqrt(self.rounding), self.length)

    def as_json(self) -> dict[str, Any]:
        return {
            "parameters": self.numel,
            "length": self.length,
            "distances": self.distances,
            "cosines": self.cosines,
            "changed": share(self.census.changed.item(), self.numel),
            "rounded": self.rounded,
            "nonfinite": self.census.nonfinite[1].item(),
            "saturated": self.census.saturated[1].item(),
        }


def measure_result(base: Tensor, merged: Tensor, stored: Tensor, products: Tensor) -> ResultNumbers:
    """`merged` is what the method gave, `stored` what the file holds of it, both like the base."""
    rounding = 0.0 if stored is merged else gram(merged, [stored], nonfinite="drop").item()
    return ResultNumbers(base.numel(), products, census(base, [stored]), rounding)
