"""TIES over a scope."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...ops.arguments import PerExpert
from ...ops.ties_merge import check_options
from ..scope import Scope


@dataclass(frozen=True)
class Limits:
    """What a scope keeps of every expert, for merging it part by part."""

    thresholds: Tensor  # [num_tasks]
    cuts: tuple[int, ...]  # [num_tasks]; entries equal to the threshold are kept before this flat index

    def after(self, numel: int) -> Limits:
        """The same, seen from the part that begins `numel` elements on."""
        return Limits(self.thresholds, tuple(cut - numel for cut in self.cuts))


@dataclass(frozen=True)
class Ties:
    """Options as in `surgery_kernels.ties_merge`. Source: TIES-Merging (arXiv 2306.01708)."""

    density: PerExpert = 0.2
    lam: float = 1.0
    weights: PerExpert | None = None
    semantics: str = "paper"
    elect: str = "sum"
    reduce: str = "mean"
    normalize: bool = True
    rescale: bool = False
    nonfinite: str = "error"

    reads: ClassVar[int] = 2
    shares: ClassVar[bool] = True
    whole: ClassVar[bool] = False

    def check(self, num_tasks: int) -> None:
        self._options(num_tasks)

    def limits(self, scope: Scope) -> Limits:
        """Reads the scope once; under ``nonfinite="error"`` it is known to be finite afterwards."""
        options = self._options(len(scope.experts[0]))
        thresholds, cuts = torch.ops.surgery_kernels.trim_limits(
            scope.base,
            scope.flat_experts,
            options["density"],
            semantics=self.semantics,
            nonfinite=self.nonfinite,
            names=scope.names,
        )
        return Limits(thresholds, tuple(cuts.tolist()))

    def merge(self, scope: Scope, limits: Limits | None = None) -> None:
        """`limits`: of a larger scope that this one begins, where they are known; "mergekit" and "peft" only."""
        options = self._options(len(scope.experts[0]))
        if limits is not None:
            checked = "propagate" if self.nonfinite == "error" else self.nonfinite
            options |= {"thresholds": limits.thresholds, "cuts": limits.cuts, "nonfinite": checked}
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base, scope.flat_experts, **options, names=scope.names, out=scope.out
        )

    def _options(self, num_tasks: int) -> dict[str, Any]:
        return check_options(num_tasks, **asdict(self))
