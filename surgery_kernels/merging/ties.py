"""TIES over a scope."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from ..ops.arguments import PerExpert
from ..ops.ties_merge import check_options
from .scope import Scope


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

    def merge(self, scope: Scope) -> None:
        options = self._options(len(scope.experts[0]))
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base, scope.flat_experts, **options, names=scope.names, out=scope.out
        )

    def _options(self, num_tasks: int) -> dict[str, Any]:
        return check_options(num_tasks, **asdict(self))
