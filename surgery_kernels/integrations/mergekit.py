"""mergekit's merge methods with our ops. Needs the extra `mergekit`.

    surgery-kernels-mergekit merge.yaml merged_model       # mergekit-yaml, with its arguments

is `install()` followed by mergekit's own command; in Python, `install()` before mergekit runs is all it takes, for
`merge_state_dicts` and `merge_tensors` of `mergekit.merge_methods.api` too. Every method that both know runs on our
ops, on CPU and CUDA tensors, as its declaration in `surgery_kernels.merging.METHODS` says: with mergekit's rounding and
mergekit's random masks, drawn from torch's own generator in mergekit's order.

Results are mergekit's to the last bit but for these: of entries tied at a threshold the first in flat order are kept,
where mergekit's choice is unspecified; sums over many elements or over five models and more are added in another order
than torch's; "karcher" and "arcee_fusion" are exact where mergekit's low precision leaves noise; in float16 weights
that cancel divide nothing, where mergekit divides by 0. What the ops do not take (gradients, tensors on other devices,
numbers out of range) goes to mergekit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..merging import METHODS, Method, Scope
from .extras import missing
from .tensors import NONFINITE, mergeable

try:
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import (
        BatchOptions,
        GroupMergeMethod,
        MergeMethod,
        MergeMethodSpec,
        TensorEntry,
        TensorGroup,
    )
    from mergekit.scripts import run_yaml
except ImportError as error:
    raise missing("mergekit", "mergekit", error) from error


def install() -> None:
    """From here on mergekit's methods run on our ops, in this process; twice is as once."""
    methods = registry._METHODS  # mergekit's own register() refuses a name that is taken
    for name, method in methods.items():
        if name in METHODS and not isinstance(method, Fused):
            methods[name] = Fused(method, METHODS[name])


def main() -> None:
    """The console script: mergekit-yaml with our ops."""
    install()
    run_yaml.main()


@dataclass(frozen=True)
class Fused(GroupMergeMethod):
    """A method under the name and with the parameters that mergekit gives it."""

    stock: MergeMethod
    declared: type[Method]

    @property
    def spec(self) -> MergeMethodSpec:
        return self.stock.spec

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """One tensor of the merged model."""
        base, experts = self._inputs(group)
        merging = self._method(experts, parameters) if mergeable(group.tensors) else None
        if merging is None:
            if isinstance(self.stock, GroupMergeMethod):
                return self.stock.merge_group(group, **parameters)
            dtype = group.tensors[0].dtype if group.entries else None
            (merged,) = self.stock._execute((group,), [parameters], BatchOptions(), input_dtypes=[dtype])
            return merged
        out = torch.empty_like(experts[0].tensor, memory_format=torch.contiguous_format, requires_grad=False)
        name = group.metadata.name or "tensor"
        merging.merge(
            Scope(
                names=[name],
                base=[base.tensor.detach()] if base else [],
                experts=[[entry.tensor.detach() for entry in experts]],
                out=[out],
                owner={name: name},
                generator=torch.default_generator,
            )
        )
        return out

    def _inputs(self, group: TensorGroup) -> tuple[TensorEntry | None, list[TensorEntry]]:
        if self.declared.base == "none":
            return None, list(group.entries)
        return group.base, list(group.non_base)

    def _method(self, experts: list[TensorEntry], parameters: dict[str, Any]) -> Method | None:
        """With the numbers of one tensor; None where mergekit has rules of its own for them."""
        values = self.declared.recipe_defaults() | {"nonfinite": NONFINITE}
        for parameter in self.declared.parameters():
            if parameter.key in parameters:
                given = parameters[parameter.key]
                values[parameter.name] = [given[entry.id] for entry in experts] if parameter.per_model else given
        merging = self.declared(**values)
        try:
            merging.check(len(experts))
        except (ValueError, TypeError):
            return None
        return merging


if __name__ == "__main__":
    main()
