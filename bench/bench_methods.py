"""Every method of mergekit's registry on one tensor: mergekit's own, and ours by its declaration.

8 experts of 4M entries, or a base and one or two models of 16M where the method takes no more. Random masks are drawn
by counter on our side and by torch on mergekit's, each at its own speed; the results are compared with torch's on both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import Measure
from inputs import NUM_TASKS, flat_inputs
from torch import Tensor

from surgery_kernels.merging import METHODS, Method, Scope

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW = 2048  # entries of a row
MANY, FEW = 4 << 20, 16 << 20


@dataclass(frozen=True)
class Case:
    """A method, with the numbers of a usual recipe."""

    name: str
    num_experts: int = NUM_TASKS
    reads: int = 2  # of all inputs, at least
    parameters: dict[str, Any] = field(default_factory=dict)  # by mergekit's keys
    same: bool = True  # whether both must give nearly the same

    @property
    def random(self) -> bool:
        return self.name.startswith(("dare", "della"))

    @property
    def num_params(self) -> int:
        return MANY if self.num_experts > 2 else FEW

    @property
    def method(self) -> type[Method]:
        return METHODS[self.name]

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        base, experts = flat_inputs(self.num_params, dtype)
        assert base is not None
        return base.view(-1, ROW), [expert.view(-1, ROW) for expert in experts[: self.num_experts]]

    def ours(
        self, base: Tensor, experts: list[Tensor], generator: torch.Generator | None = None
    ) -> Callable[[], Tensor]:
        out = torch.empty_like(base)
        names = {parameter.key: parameter.name for parameter in self.method.parameters()}
        given = {names[key]: value for key, value in self.parameters.items()}
        merging = self.method(**self.method.recipe_defaults() | given | {"nonfinite": "propagate"})
        merging.check(len(experts))
        has_base = self.method.base != "none"
        scope = Scope(["w"], [base] if has_base else [], [experts], [out], {"w": "w"}, generator=generator)

        def merge() -> Tensor:
            merging.merge(scope)
            return out

        return merge

    def mergekits(self, base: Tensor, experts: list[Tensor]) -> Callable[[], Tensor]:
        from mergekit.merge_methods import TensorGroup, registry

        has_base = self.method.base != "none"
        tensors = [base, *experts] if has_base else experts
        group = TensorGroup.from_tensors(tensors, base_index=0 if has_base else None)
        method = registry.get(self.name)

        def merge() -> Tensor:
            (merged,) = method([group], parameters=self.parameters)
            return merged

        return merge


WEIGHT = {"weight": 1 / NUM_TASKS}
SPARSE = {**WEIGHT, "density": 0.5}
CASES = [
    Case("linear", reads=1, parameters=WEIGHT),
    Case("slerp", 1, parameters={"t": 0.4}),
    Case("nuslerp", 2, parameters={"weight": 0.5}),
    Case("multislerp", parameters=WEIGHT),
    Case("karcher"),
    Case("model_stock"),
    Case("passthrough", 1, 1, {"scale": 0.5}),
    Case("nearswap", 1, 1, {"t": 0.0005}),
    Case("task_arithmetic", reads=1, parameters=WEIGHT),
    Case("ties", parameters={**WEIGHT, "density": 0.2}, same=False),
    Case("breadcrumbs", parameters=SPARSE, same=False),
    Case("breadcrumbs_ties", parameters=SPARSE, same=False),
    Case("dare_linear", parameters=SPARSE),
    Case("dare_ties", parameters=SPARSE),
    Case("della_linear", parameters=SPARSE),
    Case("della", parameters=SPARSE),
    Case("sce", parameters={"select_topk": 0.2}, same=False),
    Case("ram", reads=1),
    Case("ramplus_tl"),
    Case("arcee_fusion", 1, reads=3, same=False),
]


@pytest.mark.parametrize("contender", ["mergekit", "ours"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in METHODS], ids=lambda case: case.name)
@pytest.mark.benchmark(group="methods")
def test_method(measure: Measure, rounds: int, case: Case, dtype: str, contender: str) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    base, experts = case.inputs(DTYPES[dtype])
    ours = case.ours(base, experts)
    call = ours if contender == "ours" else case.mergekits(base, experts)
    num_inputs = len(experts) + (case.method.base != "none")

    def check(result: Tensor) -> float:
        """The share of entries that differ by more than what mergekit's rounding leaves."""
        expected = result.clone() if contender == "ours" else ours()
        if case.random:
            torch.manual_seed(0)
            expected = case.ours(base, experts, torch.default_generator)()
            torch.manual_seed(0)
            result = case.mergekits(base, experts)()
        change = (expected.float() - base.float()).abs().mean()
        differs = (result.float() - expected.float()).abs() > 0.1 * change + 2 * torch.finfo(
            base.dtype
        ).eps * base.abs()
        share = differs.float().mean().item()
        assert share < (0.01 if case.random else 0.001) or not case.same or dtype == "bf16"
        return share

    measure(
        call,
        ours=ours if contender == "mergekit" else None,
        check=check,
        rounds=rounds if contender == "mergekit" else 3 * rounds,
        extra={
            "op": f"method {case.name}",
            "num_params": case.num_params,
            "num_tasks": len(experts),
            "dtype": dtype,
            "contender": contender,
            "least_bytes": (case.reads * num_inputs + 1) * base.nbytes,
        },
    )
