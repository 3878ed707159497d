"""What the experiments give to declared methods: a newly declared one needs a line here only where its defaults are not
for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ...merging import METHODS, Method, Objective
from ..methods import DENSITY, LAM

OF_ONE = ("passthrough", "wise_ft")  # nothing is merged, or only with the base


class Inputs(Protocol):
    """What the inputs of an experiment say of its experts, by the parameters of methods that ask for it."""

    steps: int  # of methods that learn

    def objective(self) -> Objective: ...

    def fishers(self) -> Sequence[Mapping[str, Tensor]]: ...

    def grams(self) -> Sequence[Mapping[str, Tensor]]: ...


GIVEN = ("objective", "fishers", "grams")  # of `Inputs`


@dataclass(frozen=True)
class Without:
    """Where there are no inputs to look at."""

    steps: int = 0


def names(*, from_inputs: bool) -> list[str]:
    """Methods that merge experts, of those from inputs what `Inputs` can give."""
    return [
        name
        for name, method in METHODS.items()
        if name not in OF_ONE
        and (not method.from_inputs or (from_inputs and any(p.name in GIVEN for p in method.parameters())))
    ]


def usual(num_tasks: int) -> dict[str, dict[str, Any]]:
    """What a usual recipe gives a method, where its own defaults are for other models than these."""
    return {
        "dni": {"weights": 1 / num_tasks},
        "expo": {"extrapolation": 0.5},
        "lines": {"first": 1 / num_tasks, "last": 2.5 / num_tasks},
        "task_arithmetic": {"lam": LAM},
        "ties": {"density": DENSITY, "lam": LAM, "reduce": "sum"},
        "dare_linear": {"density": 0.5, "lam": LAM},
        "dare_ties": {"density": 0.5, "lam": LAM},
        "della_linear": {"density": 0.5, "lam": LAM},
        "della": {"density": 0.5, "normalize": False, "lam": LAM},
        "breadcrumbs": {"density": 0.9, "lam": LAM},
        "breadcrumbs_ties": {"density": 0.9, "lam": LAM},
        "consensus_ta": {"lam": 0.5},
        "consensus_ties": {"lam": 0.5},
    }


def of_each(method: type[Method]) -> bool:
    """Whether it gives a model for every task."""
    return any(parameter.name == "task" for parameter in method.parameters())


def options(name: str, num_tasks: int, inputs: Any) -> dict[str, Any]:
    """Of `merge_state_dicts`; `inputs` are looked at where the method asks for them."""
    method = METHODS[name]
    asked = {p.name for p in method.parameters() if p.name in GIVEN} if method.from_inputs else set()
    given = usual(num_tasks).get(name, {}) | {what: getattr(inputs, what)() for what in asked}
    if "objective" in asked:
        steps = ("steps", "adamerging_steps")  # of Concrete, which learns a mask first
        given |= {parameter.name: inputs.steps for parameter in method.parameters() if parameter.name in steps}
    return given | ({"task": 0} if of_each(method) else {})
