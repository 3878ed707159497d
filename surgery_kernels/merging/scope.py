"""What a merging method works on: the tensors that share one decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Scope:
    """One tensor or a whole model, named, contiguous or not."""

    names: list[str]
    base: list[Tensor]  # one per name, or empty: the experts are task vectors
    experts: list[list[Tensor]]  # [num_tensors][num_tasks]
    out: list[Tensor]  # one per name

    @property
    def flat_experts(self) -> list[Tensor]:
        """All experts of the first tensor, then of the second, ...: the order of the ops."""
        return [expert for experts in self.experts for expert in experts]


class Method(Protocol):
    """A merging method with its options."""

    reads: ClassVar[int]  # how often `merge` reads the tensors, about, for the progress bar
    shares: ClassVar[bool]  # whether the tensors of a scope decide anything together

    def check(self, num_tasks: int) -> None:
        """Raises ValueError for an option out of range."""

    def merge(self, scope: Scope) -> None:
        """Fills `scope.out`."""
