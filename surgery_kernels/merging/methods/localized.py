"""Methods that keep, where experts changed one entry, the changes that matter most: Localize-and-Stitch, MagMax.

Both are merges of TIES' op, without an election.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.ties_merge import check_options
from ..method import SHARE_ABOVE_0, Method, nonfinite_policy, per_model, shared
from ..scope import Scope


@dataclass(frozen=True)
class LocalizeAndStitch(Method):
    """Keeps few of every expert's changes, the largest of the whole model, and averages them where several kept one.

    Without data, as the paper's variant by magnitude. The smallest change that would be kept is not, nor what ties
    with it.
    """

    name = "localize_and_stitch"
    title = "Localize-and-Stitch"
    formula = "base + mean over t that keep it of tau_t, kept: |tau_t| > the int(density_t * d)-th largest of d"
    source = "Localize-and-Stitch (arXiv 2408.13656), section 4, dataless"
    decides = "scope"
    decides_by = ("density",)
    scope = "model"
    recipe_scope = "model"

    density: PerExpert = per_model(0.1, range=SHARE_ABOVE_0, meaning="share of its entries that an expert keeps")
    nonfinite: str = nonfinite_policy()

    def decide(self, scope: Scope) -> dict[str, Any]:
        """Thresholds over the scope, read once; under ``nonfinite="error"`` it is known to be finite afterwards."""
        numel = sum(experts[0].numel() for experts in scope.experts)
        densities = arguments.per_expert("density", self.density, scope.num_tasks)
        thresholds, _ = torch.ops.surgery_kernels.trim_limits(
            scope.base,
            scope.flat_experts,
            densities,
            semantics="mergekit",
            nonfinite=self.nonfinite,
            names=scope.names,
            ranks=[int(density * numel) for density in densities],
        )
        return {"thresholds": thresholds.tolist()}

    def merge(self, scope: Scope) -> None:
        facts = self.decide(scope) if scope.decided is None else scope.decided
        options = check_options(scope.num_tasks, density=1.0, semantics="exact", elect="none")
        options["nonfinite"] = scope.checked(self.nonfinite)
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base,
            scope.flat_experts,
            **options,
            thresholds=torch.tensor(facts["thresholds"], dtype=torch.float64),
            cuts=[0] * scope.num_tasks,  # of the ties none is kept
            names=scope.names,
            out=scope.out,
        )


@dataclass(frozen=True)
class MagMax(Method):
    """Adds the change of the expert that changed an entry most; of equal ones the last expert's."""

    name = "magmax"
    title = "MagMax"
    formula = "base + lam * (the tau_t of the largest magnitude)"
    source = "MagMax (arXiv 2407.06322), equation 3"

    lam: float = shared(0.5, key="lambda", meaning="scale of the merged task vector")
    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 1

    def merge(self, scope: Scope) -> None:
        options = check_options(
            scope.num_tasks,
            density=1.0,
            lam=self.lam,
            semantics="exact",
            elect="none",
            reduce="magmax",
            nonfinite=self.nonfinite,
        )
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base, scope.flat_experts, **options, names=scope.names, out=scope.out
        )
