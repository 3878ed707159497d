"""Methods that turn task vectors into a space that they share before another method merges them: KnOTS, core space."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...low_rank import LowRank
from ...method import AT_LEAST_0, shared
from ...scope import Scope
from .family import Leading
from .spaces import Space, core_of_factors, knots_of_factors, knots_of_matrices
from .within import Within


@dataclass(frozen=True)
class Aligned(Within):
    """What the family shares: task vectors into the space, merged there, and back; from factors where there are."""

    takes_factors = True

    @abstractmethod
    def space_of(self, experts: Sequence[LowRank]) -> Space:
        """Of the task vectors of one weight."""

    @abstractmethod
    def _space_of_matrices(self, vectors: Sequence[Tensor]) -> Space:
        """The same where they are no products."""

    def merged_in(self, spaces: Mapping[str, Space], decided: Any = None, offset: int = 0) -> list[Tensor]:
        """What becomes of the blocks of all spaces together. `decided`, `offset`: as in a `Scope`, of the blocks."""
        bases = [torch.zeros_like(space.blocks[0]) for space in spaces.values()]
        merged = [torch.empty_like(base) for base in bases]
        scope = Scope(
            list(spaces),
            bases,
            [space.blocks for space in spaces.values()],
            merged,
            {name: name for name in spaces},
            decided=decided,
            offset=offset,
        )
        self._merged_by(self._inner(), scope)
        return merged

    def decide(self, scope: Scope) -> dict[str, Any]:
        """What the inner method decides over all blocks, and how many elements of them are before each tensor's."""
        spaces = {part.names[0]: self._space(part) for part in scope.parts()}
        model = Scope(
            list(spaces),
            [torch.zeros_like(space.blocks[0]) for space in spaces.values()],
            [space.blocks for space in spaces.values()],
            [],
            {name: name for name in spaces},
        )
        sizes = [space.blocks[0].numel() for space in spaces.values()]
        return {
            "inner": self._inner().decide(model),
            "offsets": dict(zip(spaces, accumulate(sizes, initial=0), strict=False)),
        }

    def merge(self, scope: Scope) -> None:
        decided = scope.decided or {}
        parts = [part for part in scope.parts() if not self._is_spoiled(part)]
        spaces = {part.names[0]: self._space(part) for part in parts}
        if not spaces:
            return
        offset = decided.get("offsets", {}).get(parts[0].names[0], 0)
        merged = self.merged_in(spaces, decided.get("inner"), offset)
        for part, space, change in zip(parts, spaces.values(), merged, strict=True):
            out, base = part.out[0], part.base[0]
            if not change.numel():
                out.copy_(base)
                continue
            product = change if space.left is None else space.back(change).product
            out.copy_(base.to(part.compute).reshape(product.shape).add(product).view(out.shape))

    def _is_spoiled(self, part: Scope) -> bool:
        """Fills what is not finite with NaN, where that is let through: all of a matrix depends on every entry."""
        if self.nonfinite != "propagate" or part.out[0].dim() < 2:
            return False
        factors = part.factors[0] if part.factors else None
        found = all(x.is_finite for x in factors) if factors else all(bool(x.isfinite().all()) for x in part.inputs)
        if not found:
            part.out[0].fill_(torch.nan)
        return not found

    def _space(self, part: Scope) -> Space:
        """Of one tensor; one that is no matrix is merged as it is."""
        factors = part.factors[0] if part.factors else None
        if factors is not None:
            return self._space_of_factors(part, factors)
        if self.nonfinite == "error":
            part.check_finite()
        base = part.base[0].to(part.compute)
        vectors = [expert.to(part.compute) - base for expert in part.experts[0]]
        if not any(bool(vector.any()) for vector in vectors):  # a model's share of entries is one of those that changed
            return Space([vector.flatten()[:0] for vector in vectors])
        if base.dim() < 2:
            return Space(vectors)
        if self.nonfinite == "drop":
            vectors = [torch.where(vector.isfinite(), vector, 0.0) for vector in vectors]
        return self._space_of_matrices([vector.flatten(1) for vector in vectors])

    def _space_of_factors(self, part: Scope, factors: Sequence[LowRank]) -> Space:
        base = part.base[0]
        factors = [expert.to(base.device, part.compute) for expert in factors]
        if self.nonfinite == "error":
            _check_finite(part.names[0], base, factors)
        elif self.nonfinite == "drop":
            factors = [expert.finite_only() for expert in factors]
        return self.space_of(factors)


def _check_finite(name: str, base: Tensor, factors: Sequence[LowRank]) -> None:
    if count := int((~base.isfinite()).sum()):
        raise RuntimeError(f"base must be finite, got {count} NaN or infinite values in tensor {name!r}")
    for t, expert in enumerate(factors):
        count = sum(int((~factor.isfinite()).sum()) for factor in (expert.up, expert.down))
        if count:
            raise RuntimeError(
                f"experts[{t}] must be finite, got {count} NaN or infinite values in the factors of tensor {name!r}"
            )


@dataclass(frozen=True)
class Knots(Aligned):
    """Merges task vectors by another method after turning each matrix's into the singular directions of all experts'.

    A merge entry by entry counts what experts do in the same directions, which LoRAs rarely show in their weights.
    Linear methods are the same with and without it. LoRAs are merged from their factors, in recipes too. What is no
    matrix is merged by the other method as it is; of a kernel the first dimension are the rows.
    """

    name = "knots"
    title = "KnOTS"
    formula = "base + U merge(S V_1, .., S V_n), U S [V_1 .. V_n] = [tau_1 .. tau_n]"
    source = "Model merging with SVD to tie the Knots (arXiv 2410.19735)"

    tol: float = shared(1e-5, range=AT_LEAST_0, meaning="singular values up to it are left out")

    def space_of(self, experts: Sequence[LowRank]) -> Space:
        return knots_of_factors(experts, self.tol)

    def _space_of_matrices(self, vectors: Sequence[Tensor]) -> Space:
        return knots_of_matrices(vectors, self.tol)


@dataclass(frozen=True)
class CoreSpace(Aligned):
    """Merges LoRAs by another method as matrices no larger than all their ranks together, which lose nothing.

    From factors in recipes and by `merge_loras`. Other experts count as what their singular vectors multiply to, both
    sides with the roots of the singular values.
    """

    name = "core_space"
    title = "core space"
    formula = "base + U merge(U^T up_t down_t V) V^T, U, V: singular vectors of all up_t, and of all down_t"
    source = "Accurate and Efficient Low-Rank Model Merging in Core Space (arXiv 2509.17786)"

    def space_of(self, experts: Sequence[LowRank]) -> Space:
        return core_of_factors(experts)

    def _space_of_matrices(self, vectors: Sequence[Tensor]) -> Space:
        parts = [Leading.of(vector, min(vector.shape)) for vector in vectors]
        roots = [part.values.sqrt() for part in parts]
        return core_of_factors(
            [LowRank(part.left * s, s[:, None] * part.right) for part, s in zip(parts, roots, strict=True)]
        )
