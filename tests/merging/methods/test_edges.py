"""Every declared method at the edges of what it takes: dtypes, empty and equal tensors, one model and 64, NaN."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import METHODS
from tests.cases import DTYPES, assert_same, gaussian, inputs, option_id

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]

REQUIRED: dict[str, dict[str, Any]] = {  # what has no default, or takes long
    "slerp": {"t": 0.3},
    "nearswap": {"t": 0.1},
    "doge": {"steps": 3},
    "lines": {"first": 0.2, "last": 0.8},
    **dict.fromkeys(["tall_masks", "emr"], {"task": 0}),
    **dict.fromkeys(["dare_linear", "dare_ties", "della_linear", "della"], {"density": 0.5}),
    **dict.fromkeys(["breadcrumbs", "breadcrumbs_ties"], {"density": 0.5}),
}
CONCRETE = ("concrete_task_arithmetic", "concrete_adamerging")
NO_POLICY = ["fisher", "regmean", "adamerging", "atlas", *CONCRETE]  # refuse what is not finite


def options_of(name: str, experts: list[StateDict]) -> dict[str, Any]:
    """For these experts; together they leave a model alone that is the same in all."""
    count = len(experts)
    if name == "dni":
        return {"weights": [1 / count] * count}
    if name == "fisher":
        return {"fishers": [{key: torch.ones_like(x) for key, x in expert.items()} for expert in experts]}
    if name == "regmean":
        return {
            "grams": [
                {"matrix": torch.eye(expert["matrix"].shape[-1])} if "matrix" in expert else {} for expert in experts
            ]
        }
    if name in ("adamerging", "atlas", *CONCRETE):
        options = {
            "objective": lambda tensors, step: sum((x.double() ** 2).sum() for x in tensors.values()),
            "steps": 1,
        }
        if name in CONCRETE:  # which draw from fewer bits in float32
            options["mask"] = "probabilities"
        return options | ({"adamerging_steps": 1} if name == "concrete_adamerging" else {})
    return REQUIRED.get(name, {})


def counts_of(name: str, wanted: int) -> int:
    least, most = METHODS[name].num_experts
    return min(max(wanted, least), most or wanted)


def merged(name: str, base: StateDict, experts: list[StateDict], **options: Any) -> StateDict:
    given = None if METHODS[name].base == "none" else base
    return merge_state_dicts(given, experts, method=name, **{**options_of(name, experts), **options})


def models(num_tasks: int, dtype: torch.dtype = torch.float32) -> tuple[StateDict, list[StateDict]]:
    shapes = {"matrix": (30, 17), "vector": (63,), "scalar": (), "column": (5, 1), "kernel": (4, 3, 2)}
    drawn = {key: inputs(gaussian, shape, num_tasks, dtype) for key, shape in shapes.items()}
    experts = [{key: of[t] for key, (_, of) in drawn.items()} for t in range(num_tasks)]
    return {key: base for key, (base, _) in drawn.items()}, experts


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("name", METHODS)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """The result of float64 to the rounding of the dtype, but for entries whose rank the rounding changes."""
    base, experts = models(counts_of(name, 3), dtype)
    wide = [{key: x.double() for key, x in state.items()} for state in (base, *experts)]
    expected = merged(name, wide[0], wide[1:])
    for key, tensor in merged(name, base, experts).items():
        assert (tensor.dtype, tensor.shape) == (dtype, base[key].shape)
        limit = 16 * torch.finfo(dtype).eps * expected[key].abs().clamp(min=1)
        far = (tensor - expected[key]).abs() > limit
        if (name, key) == ("multislerp", "scalar"):
            continue  # of one entry two directions all but cancel
        assert far.double().mean() <= (0.0 if dtype.itemsize > 2 else 0.2), key


@pytest.mark.parametrize("name", METHODS)
def test_identical_models_are_the_result(name: str) -> None:
    base, _ = models(1)
    for key, tensor in merged(name, base, [base] * counts_of(name, 3)).items():
        torch.testing.assert_close(tensor, base[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_zeros_and_empty_tensors(name: str) -> None:
    base = {"matrix": torch.zeros(7, 5), "vector": torch.zeros(9)}
    for key, tensor in merged(name, base, [base] * counts_of(name, 3)).items():
        assert_same(tensor, base[key], key)
    empty = {"vector": torch.empty(0), "kernel": torch.empty(3, 0, 2), "matrix": torch.empty(0, 4)}
    for key, tensor in merged(name, empty, [empty] * counts_of(name, 3)).items():
        assert_same(tensor, empty[key], key)


@pytest.mark.parametrize("name", METHODS)
def test_a_zero_expert_or_base(name: str) -> None:
    """Vectors without a direction."""
    base, experts = models(counts_of(name, 3))
    zeros = {key: torch.zeros_like(x) for key, x in base.items()}
    for state, others in ((zeros, experts), (base, [zeros, *experts[1:]]), (base, [base, *experts[1:]])):
        assert all(tensor.isfinite().all() for tensor in merged(name, state, others).values())


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("name", METHODS)
def test_one_expert_and_64(name: str, count: int) -> None:
    base, experts = models(count)
    if not METHODS[name].takes(count):
        words = {(1, 1): "exactly 1", (2, 2): "exactly 2", (2, None): "at least 2"}[METHODS[name].num_experts]
        message = f"experts must be {words} for {name}, got {count}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            merged(name, base, experts)
        return
    for tensor in merged(name, base, experts).values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_not_finite(name: str) -> None:
    more = {"scale": 0.5} if name == "passthrough" else {}  # without one it copies what there is
    for value in (math.nan, math.inf):
        base, experts = models(counts_of(name, 3))
        experts[-1]["matrix"][3, 5] = value
        last = len(experts) - 1
        # a base that is one of the models counts as the first
        message = rf"^experts\[({last}|{last + 1})\] must be finite, got 1 NaN or infinite values in tensor 'matrix'$"
        with pytest.raises(RuntimeError, match=message):
            merged(name, base, experts, **more)
        if name in NO_POLICY:
            continue
        passed, dropped = (merged(name, base, experts, nonfinite=how, **more) for how in ("propagate", "drop"))
        assert all(tensor.isfinite().all() for tensor in dropped.values())
        apart = [key for key in base if key != "matrix" and METHODS[name].decides not in ("model", "scope")]
        assert all(passed[key].isfinite().all() for key in apart)


@pytest.mark.parametrize("name", METHODS)
def test_what_must_be_given(name: str) -> None:
    base, experts = models(counts_of(name, 3))
    if METHODS[name].base == "required":
        with pytest.raises(ValueError, match=f"^base must be given for {name}, got None$"):
            merge_state_dicts(None, experts, method=name, **options_of(name, experts))
    for parameter in METHODS[name].parameters():
        if parameter.required:
            given = {key: value for key, value in options_of(name, experts).items() if key != parameter.name}
            with pytest.raises(TypeError, match=f"^{parameter.name} must be given, got none$"):
                merge_state_dicts(base, experts, method=name, **given)
        elif parameter.kind is float:
            with pytest.raises(ValueError, match=f"^{parameter.name} must be "):
                merged(name, base, experts, **{parameter.name: math.nan})


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if "weights" in [p.name for p in method.parameters()]]
)
def test_weights_that_cancel(name: str) -> None:
    """Where a sum of weights must be divided by they are refused, elsewhere the result is finite."""
    base, experts = models(2)
    weights = {"weights": [1.0, -1.0]}
    refused = {
        "linear": "weights must have a sum other than 0 unless normalize is false, got 1.0, -1.0",
        "average": "weights must have a sum other than 0 unless normalize is false, got 1.0, -1.0",
        "multislerp": "weights must have a sum other than 0, got [1.0, -1.0]",
        "dni": "weights must have the sum 1 for dni, got [1.0, -1.0]",
        "fisher": "weights must be finite and 0 or greater, got -1.0",
    }
    if name in refused:
        with pytest.raises(ValueError, match=f"^{re.escape(refused[name])}$"):
            merged(name, base, experts, **weights)
        return
    normalize = {"normalize": True} if any(p.name == "normalize" for p in METHODS[name].parameters()) else {}
    semantics = {"semantics": "mergekit"} if name == "ties" else {}
    for tensor in merged(name, base, experts, **weights, **normalize, **semantics).values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_scope(name: str) -> None:
    """Refused where it would change who decides together."""
    base, experts = models(counts_of(name, 3))
    only = {"tensor": "tensor", "row": "tensor", "model": "model"}.get(METHODS[name].decides)
    for scope in ("tensor", "model"):
        if only in (None, scope):
            merged(name, base, experts, scope=scope)
            continue
        with pytest.raises(ValueError, match=f"^scope must be '{only}' for {name}, got '{scope}'$"):
            merged(name, base, experts, scope=scope)
