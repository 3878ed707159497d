"""merge_state_dicts: the ops over whole models."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import merge_state_dicts, reference, ties_merge
from surgery_kernels.merging import METHODS
from surgery_kernels.merging.state_dicts import SMALL
from tests.cases import (
    DTYPES,
    SEMANTICS,
    assert_same,
    bits,
    cancelling,
    equal,
    gaussian,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    option_id,
    weights_of,
)

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]

SHAPES = {
    "embed.weight": (40, 50),
    "scale": (),
    "empty": (0, 3),
    "block.weight": (4_099,),
    "block.bias": (3, 7, 11),
    "head.bias": (1,),
    "head.weight": (300, 100),
}
SIZES = [math.prod(shape) for shape in SHAPES.values()]
DTYPE_OF = {"block.weight": torch.bfloat16, "head.weight": torch.float16}


def named(flat: Tensor) -> StateDict:
    parts = zip(SHAPES, flat.split(SIZES), strict=True)
    return {name: part.reshape(SHAPES[name]).clone() for name, part in parts}


def models(kind: Any, num_tasks: int, dtype: torch.dtype) -> tuple[StateDict, list[StateDict]]:
    base, experts = inputs(kind, sum(SIZES), num_tasks, dtype)
    return named(base), [named(expert) for expert in experts]


def mixed_models(num_tasks: int) -> tuple[StateDict, list[StateDict]]:
    """float32, bfloat16 and float16 in one model."""
    base, experts = models(grid, num_tasks, torch.float32)
    cast = [{name: x.to(DTYPE_OF.get(name, x.dtype)) for name, x in model.items()} for model in (base, *experts)]
    return cast[0], cast[1:]


def expected_ties(base: StateDict, experts: Sequence[StateDict], scope: str, **options: Any) -> StateDict:
    if scope == "tensor":
        return {
            name: reference.ties_merge(base[name], [expert[name] for expert in experts], **options) for name in base
        }
    parts = reference.scope_merge(
        list(base.values()), [[expert[name] for name in base] for expert in experts], **options
    )
    return dict(zip(base, parts, strict=True))


def assert_same_models(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        assert_same(actual[name], expected[name], name)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("kind", [gaussian, grid, equal, leaning_up, leaning_down], ids=option_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_ties(dtype: torch.dtype, kind: Any, scope: str) -> None:
    base, experts = models(kind, 4, dtype)
    for options in (
        {"lam": 0.3},
        {"reduce": "max", "elect": "count", "density": [0.2, 0.9, 0.05, 1.0]},
        {"semantics": "mergekit", "weights": weights_of(4), "density": 0.57},
        {"semantics": "mergekit", "normalize": False, "rescale": dtype != torch.float64},
        {"semantics": "peft", "weights": weights_of(4), "density": 0.03},
    ):
        merged = merge_state_dicts(base, experts, scope=scope, **options)
        assert_same_models(merged, expected_ties(base, experts, scope, **options))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_of_mixed_dtypes(scope: str) -> None:
    base, experts = mixed_models(3)
    for semantics in SEMANTICS:
        merged = merge_state_dicts(base, experts, scope=scope, semantics=semantics)
        assert_same_models(merged, expected_ties(base, experts, scope, semantics=semantics))


def test_whole_model_is_the_default() -> None:
    base, experts = models(grid, 3, torch.float32)
    assert_same_models(merge_state_dicts(base, experts), expected_ties(base, experts, "model"))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, equal, cancelling, leaning_up, leaning_down], ids=option_id)
def test_a_model_is_its_tensors_in_a_row(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, sum(SIZES), 4, dtype)
    for semantics in SEMANTICS:
        options: dict[str, Any] = {"semantics": semantics, "lam": 0.3, "density": [0.2, 0.9, 0.05, 0.5]}
        merged = merge_state_dicts(named(base), [named(expert) for expert in experts], **options)
        flat = torch.cat([x.reshape(-1) for x in merged.values()])
        assert torch.equal(bits(flat), bits(ties_merge(base, experts, **options))), semantics


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_average(dtype: torch.dtype) -> None:
    base, experts = models(grid, 4, dtype)
    merged = merge_state_dicts(base, experts, method="average")
    expected = {name: (sum(expert[name].double() for expert in experts) / 4).to(dtype) for name in base}
    assert_same_models(merged, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_weighted_average(dtype: torch.dtype) -> None:
    base, experts = models(grid, 3, dtype)
    merged = merge_state_dicts(base, experts, method="average", weights=[1.0, 2.0, 1.0])
    expected = {
        name: ((experts[0][name].double() + 2 * experts[1][name].double() + experts[2][name].double()) / 4).to(dtype)
        for name in base
    }
    assert_same_models(merged, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_task_arithmetic(dtype: torch.dtype) -> None:
    base, experts = models(grid, 3, dtype)
    for lam, weights in ((0.5, None), (-0.25, [1.0, 2.0, -1.0])):
        merged = merge_state_dicts(base, experts, method="task_arithmetic", lam=lam, weights=weights)
        factors = weights or [1.0] * 3
        expected = {
            name: (
                x.double()
                + lam * sum(w * (e[name].double() - x.double()) for w, e in zip(factors, experts, strict=True))
            ).to(dtype)
            for name, x in base.items()
        }
        assert_same_models(merged, expected)


def test_linear_methods_round_once() -> None:
    base, experts = models(gaussian, 5, torch.bfloat16)
    for options in ({"method": "average"}, {"method": "task_arithmetic", "lam": 0.3}):
        merged = merge_state_dicts(base, experts, **options)
        wide = [{name: x.double() for name, x in model.items()} for model in (base, *experts)]
        exact = merge_state_dicts(wide[0], wide[1:], **options)
        for name in base:
            eps = torch.finfo(torch.bfloat16).eps
            torch.testing.assert_close(merged[name].double(), exact[name], rtol=eps, atol=4 * eps)


@pytest.mark.parametrize("method", ["ties", "average", "task_arithmetic"])
def test_buffers_of_integers_come_from_the_base(method: str) -> None:
    base, experts = models(grid, 2, torch.float32)
    for i, model in enumerate((base, *experts)):
        model["steps"] = torch.tensor([10 * i, 7])
        model["mask"] = torch.tensor([i == 0, False])
    merged = merge_state_dicts(base, experts, method=method)
    assert list(merged) == list(base)
    for name in ("steps", "mask"):
        assert_same(merged[name], base[name])
        assert merged[name].data_ptr() != base[name].data_ptr()


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("method", ["ties", "average", "task_arithmetic"])
def test_tied_weights_stay_tied(method: str, scope: str) -> None:
    base, experts = models(grid, 3, torch.float32)
    untied = merge_state_dicts(base, experts, method=method, scope=scope)
    for model in (base, *experts):
        model["tied.weight"] = model["embed.weight"]
    merged = merge_state_dicts(base, experts, method=method, scope=scope)
    assert list(merged) == list(base)
    assert merged["tied.weight"].data_ptr() == merged["embed.weight"].data_ptr()
    assert_same(merged["tied.weight"], merged["embed.weight"])
    # a tied weight counts once in the thresholds of the model
    assert_same_models({name: merged[name] for name in untied}, untied)


def test_modules() -> None:
    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).eval()

    base, experts = network(0), [network(1), network(2)]
    merged = merge_state_dicts(base.state_dict(), [expert.state_dict() for expert in experts], method="average")
    base.load_state_dict(merged)
    torch.testing.assert_close(base[0].weight, (experts[0][0].weight + experts[1][0].weight) / 2)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("method", ["ties", "average", "task_arithmetic"])
def test_inputs_stay_as_they_are(method: str, scope: str) -> None:
    base, experts = models(grid, 1, torch.float32)
    before = [{name: x.clone() for name, x in model.items()} for model in (base, *experts)]
    merged = merge_state_dicts(base, experts, method=method, scope=scope)
    for model, copy in zip((base, *experts), before, strict=True):
        assert_same_models(model, copy)
        for name in model:
            assert model[name].numel() == 0 or merged[name].data_ptr() != model[name].data_ptr()
    for x in merged.values():
        x.fill_(9)
    for model, copy in zip((base, *experts), before, strict=True):
        assert_same_models(model, copy)


@pytest.mark.parametrize("method", ["ties", "average", "task_arithmetic"])
def test_empty_models(method: str) -> None:
    assert merge_state_dicts({}, [{}, {}], method=method) == {}


@pytest.mark.parametrize("nonfinite", ["drop", "propagate"])
def test_nonfinite_values(nonfinite: str) -> None:
    base, experts = models(grid, 3, torch.float32)
    experts[1]["block.weight"][[3, 5]] = torch.tensor([math.nan, math.inf])
    for scope in ("model", "tensor"):
        merged = merge_state_dicts(base, experts, scope=scope, nonfinite=nonfinite)
        assert_same_models(merged, expected_ties(base, experts, scope, nonfinite=nonfinite))


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("method", ["ties", "average", "task_arithmetic"])
def test_nonfinite_values_are_named(method: str, scope: str) -> None:
    base, experts = models(grid, 3, torch.float32)
    experts[1]["block.weight"][[3, 5]] = torch.tensor([math.nan, math.inf])
    message = "experts[1] must be finite, got 2 NaN or infinite values in tensor 'block.weight'"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, method=method, scope=scope)


def without(model: StateDict, name: str) -> StateDict:
    return {n: x for n, x in model.items() if n != name}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda m: without(m, "scale"), "experts[1] must have the names of base, got no 'scale'"),
        (lambda m: {**m, "more": torch.ones(1)}, "experts[1] must have the names of base, got also 'more'"),
        (
            lambda m: {**m, "head.bias": torch.ones(2)},
            "experts[1]['head.bias'] must have the shape of base['head.bias'], (1,), got (2,)",
        ),
        (
            lambda m: {**m, "head.bias": torch.ones(1).half()},
            "experts[1]['head.bias'] must have the dtype of base['head.bias'], torch.float32, got torch.float16",
        ),
        (
            lambda m: {**m, "head.bias": torch.ones(1, device="meta")},
            "experts[1]['head.bias'] must be on the device of base['head.bias'], cpu, got meta",
        ),
    ],
    ids=["missing", "extra", "shape", "dtype", "device"],
)
@pytest.mark.parametrize("method", ["ties", "average", "task_arithmetic"])
def test_differences_are_named(method: str, changed: Any, message: str) -> None:
    base, experts = models(grid, 2, torch.float32)
    # differences come before any work: the NaN is not met
    experts[0]["embed.weight"][0, 0] = math.nan
    experts[1] = changed(experts[1])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "sleep"},
            f"method must be one of {', '.join(map(repr, METHODS))}, got 'sleep'",
        ),
        ({"scope": "layer"}, "scope must be one of 'model', 'tensor', got 'layer'"),
        ({"density": 0.0}, "density must be in (0, 1], got 0.0"),
        ({"lam": math.nan}, "lam must be finite, got nan"),
        ({"weights": [1.0, 2.0]}, "weights must be None with semantics='paper', got [1.0, 2.0]"),
        ({"semantics": "sd-mecha"}, "semantics must be one of 'paper', 'mergekit', 'peft', 'exact', got 'sd-mecha'"),
        ({"nonfinite": "x"}, "nonfinite must be one of 'error', 'propagate', 'drop', got 'x'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    base, experts = models(grid, 2, torch.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, **options)


def test_options_of_another_method() -> None:
    base, experts = models(grid, 2, torch.float32)
    message = "options of method='average' must be among weights, normalize, nonfinite, got 'lam'"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        merge_state_dicts(base, experts, method="average", lam=0.3)


def test_weights_without_a_mean() -> None:
    base, experts = models(grid, 2, torch.float32)
    with pytest.raises(
        ValueError, match="^weights must have a sum other than 0 unless normalize is false, got 1.0, -1.0$"
    ):
        merge_state_dicts(base, experts, method="average", weights=[1.0, -1.0])


def test_average_without_its_division() -> None:
    base, experts = models(grid, 2, torch.float32)
    summed = merge_state_dicts(base, experts, method="average", weights=[1.0, -1.0], normalize=False)
    for name, tensor in summed.items():
        expected = experts[0][name] - experts[1][name] if tensor.is_floating_point() else base[name]
        assert_same(tensor, expected, name)


def test_no_experts() -> None:
    base, _ = models(grid, 1, torch.float32)
    with pytest.raises(ValueError, match=r"^experts must be at least one state dict, got none$"):
        merge_state_dicts(base, [])


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    base, experts = models(grid, 2, torch.float32)
    for progress, shown in ((True, True), (False, False), (None, False)):
        merge_state_dicts(base, experts, progress=progress)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert bool(captured.err) == shown


@pytest.mark.parametrize(
    ("method", "options", "steps"),
    [
        ("adamerging", {"steps": 3}, 3),
        ("atlas", {"steps": 2}, 2),
        ("concrete_task_arithmetic", {"steps": 2}, 2),
        ("concrete_adamerging", {"steps": 2, "adamerging_steps": 3}, 7),
    ],
)
def test_progress_in_steps(
    capsys: pytest.CaptureFixture[str], method: str, options: dict[str, int], steps: int
) -> None:
    """Of what learns, as often as it asks; it is the same with and without."""
    base, experts = models(gaussian, 2, torch.float32)

    def objective(merged: dict[str, Tensor], step: int) -> Tensor:
        return sum(((x - 1) ** 2).sum() for x in merged.values())

    given = {"method": method, "objective": objective, **options}
    shown = merge_state_dicts(base, experts, progress=True, **given)
    assert f"| {steps}/{steps} [" in capsys.readouterr().err
    hidden = merge_state_dicts(base, experts, progress=False, **given)
    assert capsys.readouterr().err == ""
    assert_same_models(shown, hidden)


def test_any_mapping() -> None:
    base, experts = models(grid, 2, torch.float32)
    merged = merge_state_dicts(OrderedDict(base), tuple(OrderedDict(expert) for expert in experts))
    assert_same_models(merged, expected_ties(base, experts, "model"))


def test_order_of_names_is_that_of_the_base() -> None:
    base, experts = models(equal, 3, torch.float32)
    shuffled = [dict(reversed(expert.items())) for expert in experts]
    for semantics in SEMANTICS:
        merged = merge_state_dicts(base, shuffled, semantics=semantics)
        assert_same_models(merged, expected_ties(base, experts, "model", semantics=semantics))


def test_linear_methods_take_mixed_float64() -> None:
    base, experts = models(grid, 2, torch.float32)
    for model in (base, *experts):
        model["scale"] = model["scale"].double()
    for method in ("average", "task_arithmetic"):
        assert merge_state_dicts(base, experts, method=method)["scale"].dtype == torch.float64
    with pytest.raises(ValueError, match="^scope must be 'tensor' for a model that mixes float64"):
        merge_state_dicts(base, experts)


def test_one_memory_under_two_dtypes_is_not_tied() -> None:
    base, experts = models(grid, 2, torch.float32)
    for model in (base, *experts):
        model["as integers"] = model["block.weight"].view(torch.int32) if "block.weight" in model else torch.ones(1)
    merged = merge_state_dicts(base, experts)
    assert_same(merged["as integers"], base["as integers"])


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_small_tensors_go_by_the_call_for_the_one_before(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is decided by tensor; those of another precision by themselves."""
    shapes = {"a": SMALL + 1, "b": 0, "c": SMALL - 1, "d": 2, "e": 3, "f": SMALL + 1, "g": 5}
    base = {name: torch.zeros(size, dtype=torch.float64 if name == "e" else torch.float32)
            for name, size in shapes.items()}  # fmt: skip
    experts = [{name: torch.full_like(x, i) for name, x in base.items()} for i in (1, 2)]
    scopes = []
    merge = METHODS[method].merge

    def recorded(self: Any, scope: Any) -> None:
        scopes.append(scope.names)
        merge(self, scope)

    monkeypatch.setattr(METHODS[method], "merge", recorded)
    merged = merge_state_dicts(base, experts, method=method, scope="tensor")
    together = [["a", "b", "c"], ["d"], ["e"], ["f", "g"]]
    assert scopes == (together if method == "task_arithmetic" else [[name] for name in shapes])
    expected = 3.0 if method == "task_arithmetic" else 1.5
    assert list(merged) == list(shapes) and all((x == expected).all() for x in merged.values())
    experts[1]["g"][2] = math.nan
    with pytest.raises(
        RuntimeError, match=r"^experts\[1\] must be finite, got 1 NaN or infinite values in tensor 'g'$"
    ):
        merge_state_dicts(base, experts, method=method, scope="tensor")
