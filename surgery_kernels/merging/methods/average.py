"""Weight averaging."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ops import arguments
from ...ops.arguments import PerExpert
from ..scope import Scope


@dataclass(frozen=True)
class Average:
    """``sum_t weights[t] * expert_t / sum_t weights[t]``, undivided unless `normalize`; the base is not read.

    Source: Model Soups (arXiv 2203.05482).
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
        if self.normalize and math.fsum(weights) == 0:
            raise ValueError(f"weights must have a sum other than 0, got {self.weights}")

    def merge(self, scope: Scope) -> None:
        weights = arguments.check_weights(self.weights, len(scope.experts[0]))
        torch.ops.surgery_kernels.linear_merge_out(
            [],
            scope.flat_experts,
            weights,
            divisor=math.fsum(weights) if self.normalize else 1.0,
            nonfinite=self.nonfinite,
            names=scope.names,
            out=scope.out,
        )
