"""PCB-Merging: every change weighs as much as its expert holds on to it and the other experts agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.weighted_merge import INTER, Scored
from ..method import (
    SHARE_ABOVE_0,
    Method,
    Range,
    nonfinite_policy,
    per_model,
    shared,
    task_vector_scale,
)
from ..scope import Scope


@dataclass(frozen=True)
class Pcb(Method):
    """Averages the changes that matter most to their expert and agree with the others': parameter competition balanced.

    The rule of the authors' `pcb_ES.py`, which is closest to the paper and the only one of theirs that does not depend
    on the scale of the task vectors. An expert that changed nothing, or everything by the same amount, has no weight.
    """

    name = "pcb"
    title = "PCB-Merging"
    formula = "base + lam * sum of w_t weights_t tau_t / sum of w_t, w_t: how far its score is above a limit"
    source = "PCB-Merging (arXiv 2410.02396)"
    decides = "scope"
    decides_by = ("density",)
    scope = "model"
    recipe_scope = "model"

    density: PerExpert = per_model(0.05, range=SHARE_ABOVE_0, meaning="share of its entries that have a weight")
    lam: float = task_vector_scale()
    weights: PerExpert | None = per_model(None, key="weight", meaning="factor of each task vector")
    clip: float = shared(0.01, range=Range(0, 0.5, open_high=True), meaning="share of entries clipped at either end")
    inter: str = shared(
        "paper",
        choices=INTER,
        meaning="agreement is tanh of products of normed changes; or as the authors' `pcb.py`, or `pcb-merging.py`",
    )
    nonfinite: str = nonfinite_policy()

    @property
    def reads(self) -> int:
        return 3

    def decide(self, scope: Scope) -> dict[str, Any]:
        """The limits of every expert's changes, and those of its scores, over the scope."""
        scored = self._scored(scope)
        clipping = scored.clipping(self.clip)
        densities = arguments.per_expert("density", self.density, scope.num_tasks)
        factors = [self.lam * weight for weight in arguments.check_weights(self.weights, scope.num_tasks)]
        return {"clipping": clipping.tolist(), "limits": scored.limits(clipping, densities, factors).tolist()}

    def merge(self, scope: Scope) -> None:
        facts = self.decide(scope) if scope.decided is None else scope.decided
        clipping, limits = (
            torch.tensor(facts[name], dtype=torch.float64, device="cpu") for name in ("clipping", "limits")
        )
        self._scored(scope).merge(clipping, limits, scope.out)

    def _scored(self, scope: Scope) -> Scored:
        return Scored(scope.base, scope.flat_experts, scope.num_tasks, self.inter, self.nonfinite, scope.names)
