"""Consensus, TALL masks, EMR, MagMax and Localize-and-Stitch against plain formulas in float64, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.merging import METHODS
from surgery_kernels.recipes import load_recipe
from tests.cases import DTYPES, KINDS, assert_same, gaussian, inputs, option_id
from tests.llama_checkpoints import gaussians, loaded, models, save

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
ROWS = torch.tensor([[4.0, -1, 0, 2], [2, 3, 0, -2], [-1, 1, 5, 2]], dtype=torch.float64)  # task vectors
SHAPES = {"matrix": (30, 17), "vector": (63,), "scalar": ()}


def of_rows(name: str, **options: Any) -> list[float]:
    base = {"w": torch.zeros(4, dtype=torch.float64)}
    return merge_state_dicts(base, [{"w": row} for row in ROWS], method=name, **options)["w"].tolist()


def elect(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """EMR's shared vector, masks and scales of task vectors.  # x: [num_tasks, num_params]"""
    sign = torch.where(x.sum(0) > 0, 1.0, -1.0)
    masks = x * sign > 0
    shared = sign * (x.abs() * masks).amax(0)
    return shared, masks, x.abs().sum(1) / (masks * shared.abs()).sum(1)


def tall(x: Tensor, shared: Tensor, selectivity: Tensor) -> Tensor:
    return x.abs() > selectivity[:, None] * (shared - x).abs()


def ties(x: Tensor, density: float) -> Tensor:
    """The sum of what agrees with the elected sign, as the paper's code has it."""
    keep = min(int(x.shape[1] * density) + 1, x.shape[1])
    trimmed = x * (x.abs() >= x.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep])
    sign = trimmed.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    return (trimmed * torch.where(sign > 0, trimmed > 0, trimmed < 0)).sum(0)


def localize(x: Tensor, density: float) -> Tensor:
    kept = x * (x.abs() > x.abs().sort(dim=1, descending=True).values[:, int(density * x.shape[1]) - 1, None])
    return kept.sum(0) / (kept != 0).sum(0).clamp(min=1)


def magmax(x: Tensor) -> Tensor:
    last = len(x) - 1 - x.abs().flip(0).argmax(0)
    return x.gather(0, last[None])[0]


SELECTIVITY = [0.2, 0.4, 0.6]
FORMULAS: dict[str, tuple[dict[str, Any], Any]] = {  # options, and what the method adds to the base
    "consensus_ta": (
        {"selectivity": SELECTIVITY, "lam": 0.7},
        lambda x: 0.7 * x.sum(0) * (tall(x, x.sum(0), torch.tensor(SELECTIVITY)).sum(0) >= 2),
    ),
    "consensus_ties": (
        {"selectivity": SELECTIVITY, "density": 0.3, "agreement": 3},
        lambda x: ties(x, 0.3) * (tall(x, ties(x, 0.3), torch.tensor(SELECTIVITY)).sum(0) >= 3),
    ),
    "tall_masks": (
        {"selectivity": SELECTIVITY, "task": 1},
        lambda x: x.sum(0) * tall(x, x.sum(0), torch.tensor(SELECTIVITY))[1],
    ),
    "emr": ({"task": 2}, lambda x: elect(x)[2][2] * elect(x)[1][2] * elect(x)[0]),
    "magmax": ({"lam": 0.3}, lambda x: 0.3 * magmax(x)),
    "localize_and_stitch": ({"density": 0.25}, lambda x: localize(x, 0.25)),
}


def drawn(kind: Any, dtype: torch.dtype = torch.float64) -> tuple[StateDict, list[StateDict]]:
    states = {name: inputs(kind, shape, 3, dtype) for name, shape in SHAPES.items()}
    base = {name: base for name, (base, _) in states.items()}
    return base, [{name: experts[t] for name, (_, experts) in states.items()} for t in range(3)]


def flat(base: StateDict, experts: list[StateDict]) -> Tensor:
    """[num_tasks, num_params]"""
    pairs = [[(expert[name].double() - base[name].double()).reshape(-1) for name in base] for expert in experts]
    return torch.stack([torch.cat(parts) for parts in pairs])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.__name__ not in ("denormal", "large")])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula(name: str, kind: Any) -> None:
    base, experts = drawn(kind)
    options, formula = FORMULAS[name]
    expected = formula(flat(base, experts)).nan_to_num(0, 0, 0)
    changes = flat(base, [merge_state_dicts(base, experts, method=name, scope="model", **options)])[0]
    torch.testing.assert_close(changes, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=option_id)
@pytest.mark.parametrize("name", FORMULAS)
def test_other_dtypes_round_once(name: str, dtype: torch.dtype) -> None:
    """But for entries that the rounding of stored task vectors puts on the other side of a limit."""
    base, experts = drawn(gaussian, dtype)
    options, formula = FORMULAS[name]
    actual = merge_state_dicts(base, experts, method=name, scope="model", **options)
    expected = flat({key: torch.zeros(()) for key in base}, [base])[0] + formula(flat(base, experts))
    far = (flat({key: torch.zeros(()) for key in base}, [actual])[0] - expected).abs()
    assert (far > torch.finfo(dtype).eps * expected.abs() + 1e-6).float().mean() < 0.01


def test_by_hand() -> None:
    assert [of_rows("emr", task=t) for t in range(3)] == [
        pytest.approx([14 / 3, 0, 0, 7 / 3]), [4, 3, 0, 0], pytest.approx([0, 2.7, 4.5, 1.8]),
    ]  # fmt: skip
    masks = [[5, 0, 0, 2], [5, 3, 0, 0], [0, 0, 5, 2]]
    assert [of_rows("tall_masks", task=t, selectivity=0.5) for t in range(3)] == masks
    assert of_rows("tall_masks", task=1, selectivity=1.0) == [0, 3, 0, 0]
    assert of_rows("consensus_ta", selectivity=0.5) == [5, 0, 0, 2]
    assert of_rows("consensus_ta", selectivity=0.5, agreement=0) == ROWS.sum(0).tolist()
    assert of_rows("magmax", lam=1.0) == [4, 3, 5, 2]
    assert of_rows("localize_and_stitch", density=0.5) == [4, 3, 5, 0]


def test_emr_by_the_means_of_tensors() -> None:
    base, experts = drawn(gaussian)
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for name in base:
        x = flat({name: base[name]}, [{name: expert[name]} for expert in experts])
        shared, masks, _ = elect(x)
        sums += torch.stack([x.abs().mean(1), (masks * shared.abs()).mean(1)])
    shared, masks, _ = elect(flat(base, experts))
    merged = merge_state_dicts(base, experts, method="emr", task=1, rescale="tensor_means")
    expected = (sums[0] / sums[1])[1] * masks[1] * shared
    torch.testing.assert_close(flat(base, [merged])[0], expected)


def test_each_tensor_alone() -> None:
    base, experts = drawn(gaussian)
    for name in ("emr", "consensus_ties", "localize_and_stitch"):
        options = FORMULAS[name][0]
        apart = merge_state_dicts(base, experts, method=name, scope="tensor", **options)
        for key in base:
            alone = merge_state_dicts({key: base[key]}, [{key: x[key]} for x in experts], method=name, **options)
            assert_same(apart[key], alone[key], f"{name}, {key}")


def test_nothing_to_keep() -> None:
    """One model, the same one, and one that did not change."""
    base, (expert, *_) = drawn(gaussian)
    for name, expected in (("emr", expert), ("tall_masks", expert), ("consensus_ta", base), ("magmax", expert)):
        options = {"task": 0} if METHODS[name].__name__ in ("Emr", "TallMasks") else {}
        options |= {"lam": 1.0} if name == "magmax" else {}
        actual = merge_state_dicts(base, [expert], method=name, **options)
        assert all(torch.allclose(actual[key], expected[key], rtol=0, atol=1e-12) for key in base), name
    for name in FORMULAS:
        options = {key: value for key, value in FORMULAS[name][0].items() if key != "selectivity"}
        same = merge_state_dicts(base, [base] * 3, method=name, **options)
        assert all(torch.equal(same[key], base[key]) for key in base), name
    unchanged = merge_state_dicts(base, [expert, base], method="emr", task=1)
    assert all(torch.equal(unchanged[key], base[key]) for key in base)
    sparse = merge_state_dicts(base, [expert] * 3, method="localize_and_stitch", density=1e-9)
    assert all(torch.equal(sparse[key], base[key]) for key in base)


def test_refused() -> None:
    base, experts = drawn(gaussian)
    for name in ("emr", "tall_masks"):
        with pytest.raises(ValueError, match=r"^task must be in \[0, 3\), got 3$"):
            merge_state_dicts(base, experts, method=name, task=3)
        with pytest.raises(ValueError, match=r"^task must be a whole number, got 0.5$"):
            merge_state_dicts(base, experts, method=name, task=0.5)


RECIPES: dict[str, dict[str, Any]] = {
    "consensus_ta": {"lambda": 0.7},
    "consensus_ties": {"density": 0.3},
    "tall_masks": {"task": 1, "selectivity": 0.3},
    "emr": {"task": 2},
    "magmax": {},
    "localize_and_stitch": {"density": 0.25},
}


@pytest.mark.parametrize("name", RECIPES)
def test_from_disk(tmp_path: Path, name: str) -> None:
    """Over the whole model as the papers have it, unless a recipe asks for tensors."""
    state_dicts = models(gaussians, torch.bfloat16)
    folders = save(tmp_path, state_dicts)
    given: dict[str, Any] = {
        "merge_method": name,
        "base_model": folders[0],
        "models": [{"model": folder} for folder in folders[1:4]],
        "parameters": RECIPES[name],
    }
    options = {{"lambda": "lam"}.get(key, key): value for key, value in RECIPES[name].items()}
    base, *experts = ({key: state[key] for key in sorted(state)} for state in state_dicts[:4])
    for scope in (None, "tensor"):
        merge(given | ({"scope": scope} if scope else {}), tmp_path / f"out {scope}")
        asked = scope if METHODS[name].decides == "scope" else None
        expected = merge_state_dicts(base, experts, method=name, scope=asked, **options)
        for key, tensor in loaded(tmp_path / f"out {scope}").items():
            assert_same(tensor, expected[key], f"{scope}, {key}")


def test_recipes_of_several_models_decide_by_tensor() -> None:
    """Where slices are of different models nothing can be decided over a whole one."""
    sources = [{"sources": [{"model": name, "layer_range": [0, 1]} for name in names]} for names in ("ab", "ac")]
    given = {"merge_method": "emr", "base_model": "a", "slices": sources, "parameters": {"task": 0}}
    message = r"^recipe.scope must be 'tensor' for slices of different models, got 'model'$"
    with pytest.raises(ValueError, match=message):
        load_recipe(json.loads(json.dumps(given)))
    assert load_recipe(given | {"scope": "tensor"}).scope == "tensor"
