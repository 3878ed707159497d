"""What a merging method works on: tensors, named, and the ops over them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .low_rank import LowRank


@dataclass(frozen=True)
class Scope:
    """One tensor or several, up to a whole model; contiguous or not."""

    names: list[str]
    base: list[Tensor]  # one per name, or empty: the experts are task vectors, or the method has no base
    experts: list[list[Tensor]]  # [num_tensors][num_tasks]
    out: list[Tensor]  # one per name, nothing to keep where a merge raises; or empty: nothing is merged yet
    owner: Mapping[str, str]  # every name of a merged tensor to its first: tied tensors have several
    decided: Any = None  # what `Method.decide` found for the whole model, of which this is a part
    offset: int = 0  # elements of the model before this part
    generator: torch.Generator | None = None  # what masks are drawn from, tensor after tensor; None: from a counter
    # of each tensor None, or every expert's task vector as a product; its `experts` then only have its shape
    factors: Sequence[Sequence[LowRank] | None] = ()

    @property
    def num_tasks(self) -> int:
        return len(self.experts[0])

    @property
    def compute(self) -> torch.dtype:
        """What is computed in: float32, or float64 for float64."""
        return torch.promote_types(self.experts[0][0].dtype, torch.float32)

    @property
    def flat_experts(self) -> list[Tensor]:
        """All experts of the first tensor, then of the second, ...: the order of the ops."""
        return [expert for experts in self.experts for expert in experts]

    @property
    def inputs(self) -> list[Tensor]:
        """The base, if there is one, and the experts of the first tensor, then of the second, ..."""
        return self.with_base_first().flat_experts if self.base else self.flat_experts

    @property
    def tensor_ids(self) -> list[int]:
        """What random numbers are keyed by: the same wherever a tensor lies in a model and whoever merges it."""
        return [zlib.crc32(name.encode()) for name in self.names]

    def parts(self) -> Iterator[Scope]:
        """Every tensor alone."""
        for part in range(len(self.names)):
            yield self.of_tensors([part])

    def of_tensors(self, chosen: Sequence[int]) -> Scope:
        """The scope of some of the tensors."""
        return replace(
            self,
            names=[self.names[i] for i in chosen],
            base=[self.base[i] for i in chosen] if self.base else [],
            experts=[self.experts[i] for i in chosen],
            out=[self.out[i] for i in chosen] if self.out else [],
            factors=[self.factors[i] for i in chosen] if self.factors else (),
        )

    def of_experts(self, chosen: Sequence[int]) -> Scope:
        """The scope of some of the experts."""
        if len(chosen) == self.num_tasks and list(chosen) == list(range(self.num_tasks)):
            return self
        return replace(self, experts=[[experts[t] for t in chosen] for experts in self.experts])

    def with_base_first(self) -> Scope:
        """The base as the first of the experts."""
        pairs = zip(self.base, self.experts, strict=True)
        return replace(self, base=[], experts=[[base, *experts] for base, experts in pairs])

    @staticmethod
    def checked(nonfinite: str) -> str:
        """The policy for a second read, when the first has found every entry finite."""
        return "propagate" if nonfinite == "error" else nonfinite

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Fills `out` with these, where there is nothing to merge."""
        for out, tensor in zip(self.out, tensors, strict=True):
            out.copy_(tensor)

    def mix(
        self,
        coefficients: Sequence[float] | Tensor,
        *,
        of_base: float | Tensor | None = None,
        divisor: float = 1.0,
        task_vectors: bool = True,
        fused: bool = False,
        axis: str = "tensor",
        nonfinite: str = "error",
    ) -> None:
        """Fills `out` with ``of_base * base + sum_t coefficients[t] * v_t / divisor``, v_t the experts or task vectors.

        Args:
            coefficients: [num_tasks], or [num_tasks, num_blocks]: one for every tensor, row or column (`axis`).
            of_base: The same for the base, a number or [num_blocks]; None: the base as it is where v_t are task
                vectors, and no base otherwise.
        """
        columns = torch.as_tensor(coefficients, dtype=torch.float64, device="cpu")
        factors = None
        if of_base is not None:
            factors = torch.as_tensor(of_base, dtype=torch.float64, device="cpu").reshape(1, -1)
        torch.ops.surgery_kernels.mix_out(
            self.base if task_vectors or factors is not None else [],
            self.flat_experts,
            columns.reshape(1, self.num_tasks, -1),
            factors,
            divisor=divisor,
            task_vectors=task_vectors,
            fused=fused,
            axis=axis,
            nonfinite=nonfinite,
            names=self.names,
            fresh=True,
            out=self.out,
        )

    def gram(
        self, *, task_vectors: bool = True, axis: str = "tensor", rounded: bool = False, nonfinite: str = "error"
    ) -> Tensor:
        """Dot products of the task vectors, or of the experts.  # float64 [num_blocks, num_tasks, num_tasks]"""
        return torch.ops.surgery_kernels.gram(
            self.base if task_vectors else [],
            self.flat_experts,
            self.num_tasks,
            axis=axis,
            rounded=rounded,
            nonfinite=nonfinite,
            names=self.names,
        )

    def check_finite(self, *, task_vectors: bool = True, dtype: torch.dtype | None = None) -> None:
        """Raises RuntimeError for the first NaN or infinity, in the words of the ops.

        Args:
            task_vectors: Whether the base and the differences to it count too.
            dtype: What differences are computed in; None: `compute`.
        """
        # squares of float32 have room in float64: one read tells that there is nothing to look for
        alike = dtype is None and len({tensor.dtype for tensor in self.inputs}) == 1
        if alike and bool(self.gram(task_vectors=task_vectors, nonfinite="propagate").isfinite().all()):
            return
        for index, (name, experts) in enumerate(zip(self.names, self.experts, strict=True)):
            base = self.base[index : index + 1] if task_vectors else []
            labels = ["base"] * len(base) + [f"experts[{t}]" for t in range(len(experts))]
            for model, tensor in zip(labels, [*base, *experts], strict=True):
                if count := int((~tensor.isfinite()).sum()):
                    raise RuntimeError(f"{model} must be finite, got {count} NaN or infinite values in tensor {name!r}")
            for t, expert in enumerate(experts if base else []):
                task_vector = expert.to(dtype or self.compute) - base[0].to(dtype or self.compute)
                if count := int((~task_vector.isfinite()).sum()):
                    raise RuntimeError(f"experts[{t}] - base must be finite, got {count} overflows in tensor {name!r}")

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
        for name, experts in zip(self.names, self.experts, strict=True):
            for t, mapping in enumerate(mappings if name in known else ()):
                entry = mapping[known[name]]
                if not isinstance(entry, Tensor) or entry.shape != shape_of(experts[0]):
                    got = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
                    raise ValueError(
                        f"{argument}[{t}][{known[name]!r}] must be a tensor of shape {shape_of(experts[0])}, got {got}"
                    )
        return known
