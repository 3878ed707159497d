"""TIES: trim, elect a sign per parameter, merge what agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...ops import arguments
from ...ops.arguments import ELECT, REDUCE, SEMANTICS, PerExpert
from ...ops.ties_merge import SCALED, check_options
from ...ops.trim import keep_count
from ..method import SHARE, Method, model_weights, nonfinite_policy, per_model, shared, task_vector_scale
from ..scope import Scope


@dataclass(frozen=True)
class Ties(Method):
    """Keeps the largest changes of every expert, elects a sign for each entry, and averages what agrees with it.

    Options as in `surgery_kernels.ties_merge`. An expert with density 0 ("mergekit", "exact") takes no part.
    """

    name = "ties"
    title = "TIES"
    formula = "base + lam * mean over agreeing t of weights[t] * trim(expert_t - base)"
    source = "TIES-Merging (arXiv 2306.01708)"
    decides = "scope"
    decides_by = ("density",)
    scope = "model"
    ignored = ("int8_mask",)

    density: PerExpert = per_model(0.2, meaning="share of its entries an expert keeps", range=SHARE, recipe_default=1.0)
    lam: float = task_vector_scale()
    weights: PerExpert | None = model_weights()
    semantics: str = shared(
        "paper",
        choices=SEMANTICS,
        key="arithmetic",
        recipe_default="mergekit",
        meaning="whose TIES, bit for bit; exact: mergekit's in float32 or wider, rounded once",
    )
    elect: str = shared("sum", choices=ELECT, key=None, meaning="what elects a sign: mass, number, or nothing")
    reduce: str = shared("mean", choices=REDUCE, key=None, meaning="what is done with the entries that agree")
    normalize: bool = shared(True, kind=bool, meaning="divide by the sum of the agreeing weights")
    rescale: bool = shared(False, kind=bool, meaning="scale what is kept to the L1 norm it had before the trim")
    nonfinite: str = nonfinite_policy()

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        present, options = self._present(num_tasks)
        if present:
            check_options(len(present), **options)

    @property
    def expects(self) -> bool:
        """Not where elections are drawn, or a second number is decided: those follow from all entries of a tensor."""
        return self.semantics != "paper" and not self.rescale and self.nonfinite == "error"

    def present(self, num_tasks: int) -> list[int]:
        """The experts that keep anything."""
        return self._present(num_tasks)[0]

    def ranks(self, numel: int, num_tasks: int) -> list[int | None]:
        """How many entries of a model each of the present experts keeps; None: all."""
        densities = arguments.per_expert("density", self.density, num_tasks)
        kept = [keep_count(numel, densities[t], self.semantics) for t in self.present(num_tasks)]
        return [count if count < numel else None for count in kept]

    def decide(self, scope: Scope) -> dict[str, Any]:
        """Thresholds over the scope, read once; under ``nonfinite="error"`` it is known to be finite afterwards."""
        present, options = self._present(scope.num_tasks)
        if not present:
            return {"thresholds": [], "cuts": []}
        thresholds, cuts = torch.ops.surgery_kernels.trim_limits(
            scope.base,
            scope.of_experts(present).flat_experts,
            check_options(len(present), **options)["density"],
            semantics=self.semantics,
            nonfinite=self.nonfinite,
            names=scope.names,
        )
        return {"thresholds": thresholds.tolist(), "cuts": cuts.tolist()}

    def merge(self, scope: Scope) -> None:
        present, options = self._present(scope.num_tasks)
        if not present:
            scope.copy(scope.base)
            return
        checked = check_options(len(present), **options)
        if scope.decided is not None:
            checked |= {
                "thresholds": torch.tensor(scope.decided["thresholds"], dtype=torch.float64),
                "cuts": [cut - scope.offset for cut in scope.decided["cuts"]],
                "nonfinite": scope.checked(self.nonfinite),
            }
        torch.ops.surgery_kernels.ties_merge_out(
            scope.base, scope.of_experts(present).flat_experts, **checked, names=scope.names, out=scope.out
        )

    def _present(self, num_tasks: int) -> tuple[list[int], dict[str, Any]]:
        """The experts that keep anything, and the options for them alone."""
        options = {parameter.name: getattr(self, parameter.name) for parameter in self.parameters()}
        if self.semantics not in SCALED:
            return list(range(num_tasks)), options
        of_all = {
            "density": arguments.per_expert("density", self.density, num_tasks),
            "weights": arguments.check_weights(self.weights, num_tasks),
        }
        present = [t for t, density in enumerate(of_all["density"]) if density > 0]
        return present, options | {name: [values[t] for t in present] for name, values in of_all.items()}
