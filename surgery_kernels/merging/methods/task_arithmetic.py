"""Task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ops import arguments
from ...ops.arguments import PerExpert
from ..scope import Scope


@dataclass(frozen=True)
class TaskArithmetic:
    """``base + lam * sum_t weights[t] * (expert_t - base)``. Source: Editing Models (arXiv 2212.04089), section 2.

    Under ``nonfinite="error"`` a difference that overflows the dtype is refused too.
    """

    lam: float = 1.0
    weights: PerExpert | None = None
    nonfinite: str = "error"

    reads: ClassVar[int] = 2
    shares: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def check(self, num_tasks: int) -> None:
        arguments.check_one_of("nonfinite", self.nonfinite, arguments.NONFINITE)
        arguments.check_lam(self.lam)
        arguments.check_weights(self.weights, num_tasks)

    def merge(self, scope: Scope) -> None:
        weights = arguments.check_weights(self.weights, len(scope.experts[0]))
        lam = arguments.check_lam(self.lam)
        torch.ops.surgery_kernels.mix_out(
            scope.base,
            scope.flat_experts,
            torch.tensor([lam * weight for weight in weights], dtype=torch.float64, device="cpu").reshape(1, -1, 1),
            nonfinite=self.nonfinite,
            names=scope.names,
            out=scope.out,
        )
