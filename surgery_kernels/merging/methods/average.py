"""Weight averaging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ops import arguments
from ...ops.arguments import PerExpert
from ..scope import Scope


@dataclass(frozen=True)
class Average:
    """``sum_t weights[t] * expert_t / sum_t weights[t]``, undivided unless `normalize`; the base is not read.

    To the bit what mergekit's `linear` computes. Source: Model Soups (arXiv 2203.05482); mergekit 0.1.5 `linear`.
    """

    weights: PerExpert | None = None
    normalize: bool = True
    nonfinite: str = "error"

    reads: ClassVar[int] = 2
    shares: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def check(self, num_tasks: int) -> None:
        arguments.check_one_of("nonfinite", self.nonfinite, arguments.NONFINITE)
        weights = arguments.check_weights(self.weights, num_tasks)
        if self.normalize and 0 in (_sum(weights, torch.float32), _sum(weights, torch.float64)):
            raise ValueError(f"weights must have a sum other than 0, got {self.weights}")

    def merge(self, scope: Scope) -> None:
        weights = arguments.check_weights(self.weights, len(scope.experts[0]))
        compute = torch.promote_types(scope.experts[0][0].dtype, torch.float32)
        torch.ops.surgery_kernels.mix_out(
            [],
            scope.flat_experts,
            torch.tensor(weights, dtype=torch.float64, device="cpu").reshape(1, -1, 1),
            divisor=_sum(weights, compute) if self.normalize else 1.0,
            fused=True,
            nonfinite=self.nonfinite,
            names=scope.names,
            out=scope.out,
        )


def _sum(weights: list[float], dtype: torch.dtype) -> float:
    """As mergekit adds them up: of eight float32 or more in torch's order, which is not theirs."""
    return torch.tensor(weights, dtype=dtype, device="cpu").sum().item()
