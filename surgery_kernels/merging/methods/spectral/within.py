"""Methods around another one, which merges for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ....ops.arguments import PerExpert
from ...method import SHARE, Method, nonfinite_policy, per_model, shared, task_vector_scale
from ...scope import Scope
from ..linear import TaskArithmetic
from ..localized import MagMax
from ..selective import Sce
from ..sparse import Breadcrumbs, BreadcrumbsTies, DareLinear, DareTies, Della, DellaLinear
from ..ties import Ties
from .descent import Wudi
from .directions import IsoC, IsoCts, TsvM

INNER: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Ties,
        TaskArithmetic,
        MagMax,
        Sce,
        DareLinear,
        DareTies,
        DellaLinear,
        Della,
        Breadcrumbs,
        BreadcrumbsTies,
        TsvM,
        IsoC,
        IsoCts,
        Wudi,
    )
}


@dataclass(frozen=True)
class Within(Method):
    """What such methods share.

    Args:
        inner: The name of the method that merges; `lam`, `density` and `weights` are its own, None its defaults.
        options: Other parameters of that method, by name, as `merge_state_dicts` takes them.
    """

    decides = "scope"
    decides_by = ("density",)
    scope = "model"

    inner: str = shared("ties", choices=tuple(INNER), meaning="the method that merges")
    lam: float = task_vector_scale()
    density: PerExpert | None = per_model(None, range=SHARE, meaning="share of its entries an expert keeps")
    weights: PerExpert | None = per_model(None, key="weight", meaning="factor of each task vector")
    options: Mapping[str, Any] | None = shared(None, kind=object, key=None, meaning="other parameters of that method")
    nonfinite: str = nonfinite_policy()

    def check(self, num_tasks: int) -> None:
        super().check(num_tasks)
        self._inner().check(num_tasks)

    def _inner(self) -> Method:
        """Raises ValueError or TypeError for parameters that it does not have."""
        method = INNER[self.inner]
        known = {declared.name for declared in fields(method)}
        given = {"density": self.density, "weights": self.weights, **(self.options or {})}
        given = {name: value for name, value in given.items() if value is not None}
        for name in given:
            if name not in known:
                raise ValueError(f"{name} must be left out where inner is {self.inner!r}, got {given[name]!r}")
        if method is Ties and self.weights is not None:  # which the paper's has not
            given = {"semantics": "exact", **given}
        return method(**{"lam": self.lam, "nonfinite": self.nonfinite, **given})

    @staticmethod
    def _merged_by(inner: Method, scope: Scope) -> None:
        """What decides over each tensor is given one at a time."""
        for part in scope.parts() if inner.decides in ("tensor", "row") else [scope]:
            inner.merge(part)
