"""What a merging method works on: the tensors that share one decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    owner: Mapping[str, str]  # every name of a merged tensor to its first: tied tensors have several

    @property
    def flat_experts(self) -> list[Tensor]:
        """All experts of the first tensor, then of the second, ...: the order of the ops."""
        return [expert for experts in self.experts for expert in experts]

    def check_finite(self) -> None:
        """Raises RuntimeError for the first NaN or infinity, in the words of the ops."""
        for name, experts in zip(self.names, self.experts, strict=True):
            for t, expert in enumerate(experts):
                if count := int((~expert.isfinite()).sum()):
                    raise RuntimeError(
                        f"experts[{t}] must be finite, got {count} NaN or infinite values in tensor {name!r}"
                    )

    def check_by_name(
        self,
        argument: str,
        mappings: Sequence[Mapping[str, Tensor]],
        shape_of: Callable[[Tensor], tuple[int, ...]] = lambda tensor: tuple(tensor.shape),
    ) -> dict[str, str]:
        """The tensors that all mappings know something about, each with the name they know it by."""
        keys = list(mappings[0])
        for t, mapping in enumerate(mappings):
            if set(mapping) != set(keys):
                raise ValueError(f"{argument}[{t}] must have the names of {argument}[0], got others")
        if unknown := [key for key in keys if key not in self.owner]:
            raise ValueError(f"{argument} must have names of floating-point tensors of base, got {unknown[0]!r}")
        known = {self.owner[key]: key for key in keys}
        for name, tensor in zip(self.names, self.base, strict=True):
            for t, mapping in enumerate(mappings if name in known else ()):
                entry = mapping[known[name]]
                if not isinstance(entry, Tensor) or entry.shape != shape_of(tensor):
                    got = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
                    raise ValueError(
                        f"{argument}[{t}][{known[name]!r}] must be a tensor of shape {shape_of(tensor)}, got {got}"
                    )
        return known


class Method(Protocol):
    """A merging method with its options."""

    shares: ClassVar[bool]  # whether the tensors of a scope decide anything together
    whole: ClassVar[bool]  # whether a scope is the model, whatever the user says

    @property
    def reads(self) -> int:
        """How often `merge` reads the tensors, about, for the progress bar."""

    def check(self, num_tasks: int) -> None:
        """Raises ValueError for an option out of range."""

    def merge(self, scope: Scope) -> None:
        """Fills `scope.out`."""
