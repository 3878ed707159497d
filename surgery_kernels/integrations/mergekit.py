"""mergekit's generalized task arithmetic (TIES, DARE, DELLA, breadcrumbs) with our ops. Needs the extra `mergekit`.

    surgery-kernels-mergekit merge.yaml merged_model       # mergekit-yaml, with its arguments

is `install()` followed by mergekit's own command; in Python, `install()` before mergekit runs is all it takes.

    method                         sparsification    merge
    ties                           ours, fused with the merge
    task_arithmetic                -                 ours
    breadcrumbs, breadcrumbs_ties  ours              ours
    dare_linear, dare_ties         mergekit's        ours
    della_linear, della            mergekit's        ours

Random masks stay mergekit's, number for number. Results are mergekit's to the last bit in every dtype, with these
differences: of entries tied at the threshold the first in flat order are kept, where mergekit's choice is unspecified;
from five models on sums may differ in the last bit, since torch adds them in another order; `rescale` of "ties" divides
exact L1 norms; in float16 weights that cancel divide nothing, where mergekit divides by 0. What the ops do not take,
CUDA tensors for one, goes to mergekit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..ops import ties_merge
from .extras import missing
from .tensors import NONFINITE, mergeable

try:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorEntry, TensorGroup
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
    from mergekit.scripts import run_yaml
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, rescaled_masked_tensor, sparsify
except ImportError as error:
    raise missing("mergekit", "mergekit", error) from error


def install() -> None:
    """From here on mergekit's eight methods of this family run on our ops, in this process; twice is as once."""
    methods = registry._METHODS  # mergekit's own register() refuses a name that is taken
    for name, method in methods.items():
        if type(method) is GeneralizedTaskArithmeticMerge:
            methods[name] = FusedTaskArithmetic(**{field.name: getattr(method, field.name) for field in fields(method)})


def main() -> None:
    """The console script: mergekit-yaml with our ops."""
    install()
    run_yaml.main()


@dataclass(frozen=True)
class FusedTaskArithmetic(GeneralizedTaskArithmeticMerge):
    """A method of the family, under the name and with the parameters that mergekit gives it."""

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """One tensor of the merged model."""
        if not _takes(group, parameters):
            return super().merge_group(group, **parameters)
        base, entries = group.base.tensor, group.non_base
        weights = [parameters["weight"][entry.id] for entry in entries]
        if self.sparsification_method not in (None, SparsificationMethod.magnitude):
            task_vectors = [self._sparsified(base, entry, parameters) for entry in entries]
            return self._merged(None, task_vectors, weights, parameters).add_(base)
        trim: dict[str, Any] = {}
        if self.sparsification_method:
            trim["density"] = [min(parameters["density"][entry.id], 1.0) for entry in entries]
            trim["rescale"] = parameters["rescale"]
        return self._merged(base, [entry.tensor for entry in entries], weights, parameters, **trim)

    def _sparsified(self, base: Tensor, entry: TensorEntry, parameters: dict[str, Any]) -> Tensor:
        """The task vector with mergekit's mask on it; breadcrumbs need no sort for theirs."""
        task_vector, density = entry.tensor - base, parameters["density"][entry.id]
        norm = RescaleNorm.l1 if parameters["rescale"] else None
        if self.sparsification_method == SparsificationMethod.magnitude_outliers:
            if density >= 1:
                return task_vector
            crumbs = _without_outliers(task_vector, density, parameters["gamma"][entry.id])
            return rescaled_masked_tensor(task_vector, (crumbs != 0).to(crumbs.dtype), norm) if norm else crumbs
        own = {name: parameters[name][entry.id] for name in ("gamma", "epsilon") if name in parameters}
        return sparsify(task_vector, density, self.sparsification_method, rescale_norm=norm, **own)

    def _merged(
        self,
        base: Tensor | None,
        experts: Sequence[Tensor],
        weights: list[float],
        parameters: dict[str, Any],
        density: list[float] | float = 1.0,
        rescale: bool = False,
    ) -> Tensor:
        return ties_merge(
            base,
            experts,
            density=density,
            lam=parameters["lambda"],
            weights=weights,
            semantics="mergekit",
            elect=self.consensus_method.value if self.consensus_method else "none",
            normalize=parameters["normalize"],
            rescale=rescale,
            nonfinite=NONFINITE,
        )


def _takes(group: TensorGroup, parameters: dict[str, Any]) -> bool:
    """Plain tensors on the CPU and numbers in their ranges; for the rest mergekit has rules of its own."""
    entries = group.non_base
    return (
        bool(entries)
        and mergeable([group.base.tensor, *(entry.tensor for entry in entries)])
        and math.isfinite(parameters["lambda"])
        and all(math.isfinite(weight) for weight in parameters["weight"].values())
        and all(density > 0 for density in parameters["density"].values())
        and all(gamma >= 0 for gamma in parameters.get("gamma", {}).values())
    )


def _without_outliers(task_vector: Tensor, density: float, gamma: float) -> Tensor:
    """What is left without the largest `gamma` of the entries and without the smallest, down to `density` of all."""
    num_params = task_vector.numel()
    kept, largest = int(density * num_params), int(gamma * num_params)
    smallest = max(0, num_params - kept - largest)  # where nothing small is left to drop, more of the largest go
    return _largest(task_vector, num_params - smallest) - _largest(task_vector, num_params - smallest - kept)


def _largest(task_vector: Tensor, count: int) -> Tensor:
    """The `count` entries of the largest magnitude, 0 elsewhere: the trim of TIES, whose election one expert wins."""
    density = min((count + 0.5) / task_vector.numel(), 1.0)  # the op floors their product to `count`
    return ties_merge(None, [task_vector], density=density, semantics="peft", nonfinite=NONFINITE)


if __name__ == "__main__":
    main()
