"""Infinity and NaN that a merge makes are refused, whatever made them; what all models hold alike stays."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.infinities import BLOCK
from tests.checkpoints import save_models

pytestmark = pytest.mark.any_isa

INF = math.inf
ROOM = ": bfloat16 and float32 have room for larger numbers"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear"},
    "task_arithmetic": {"merge_method": "task_arithmetic"},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.5}},
    "ties, one threshold": {"merge_method": "ties", "scope": "model", "parameters": {"density": 0.5}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
    "model_stock": {"merge_method": "model_stock"},
    "karcher": {"merge_method": "karcher"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.5}},
    "nearswap": {"merge_method": "nearswap", "parameters": {"t": 0.5}},
}


def recipe(folders: list[str], method: dict[str, Any], **keys: Any) -> dict[str, Any]:
    weight = {} if method["merge_method"] in ("slerp", "karcher", "model_stock", "nearswap") else {"weight": 1.0}
    models = [{"model": folder, "parameters": weight} for folder in folders[1:]]
    if method["merge_method"] in ("slerp", "nearswap"):
        models = models[:1]
    base = {} if method["merge_method"] in ("linear", "karcher") else {"base_model": folders[0]}
    return {**method, **base, "models": models, **keys}


def merged(folder: Path, models: list[dict[str, Tensor]], method: str, **keys: Any) -> dict[str, Tensor]:
    folders = save_models(folder, models)
    options = {key: keys.pop(key) for key in ("nonfinite", "random_seed", "stream") if key in keys}
    merge(recipe(folders, METHODS[method], **keys), folder / "out", **options)
    return load_file(folder / "out" / "model.safetensors")


def full(value: float, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.full((4,), value, dtype=dtype)


@pytest.mark.parametrize(
    ("method", "values", "dtypes", "keys", "dtype"),
    [
        ("task_arithmetic", (0, 4e4, 4e4), (torch.float16,) * 3, {}, "float16"),
        ("ties", (0, 4e4, 4e4), (torch.float16,) * 3, {"parameters": {"density": 1, "normalize": False}}, "float16"),
        ("linear", (1e5, 1e5, 1e5), (torch.bfloat16,) * 3, {"dtype": "float32", "out_dtype": "float16"}, "float16"),
        ("linear", (1e5, 1e5, 1e5), (torch.bfloat16,) * 3, {"out_dtype": "float16"}, "float16"),
        ("linear", (3e38, 3e38, 2e38), (torch.float32,) * 3, {"parameters": {"normalize": False}}, "float32"),
        ("task_arithmetic", (0, 3e38, 2e38), (torch.bfloat16,) * 3, {}, "bfloat16"),
    ],
)
def test_what_a_merge_makes_is_refused(
    tmp_path: Path, method: str, values: Any, dtypes: Any, keys: Any, dtype: str
) -> None:
    models = [{"v": torch.ones(3), "w": full(x, kind)} for x, kind in zip(values, dtypes, strict=True)]
    message = f"merged must be finite, got 4 NaN or infinite values in tensor 'w' in {dtype}"
    room = ROOM if dtype == "float16" else ""
    with pytest.raises(RuntimeError, match=f"^{re.escape(message + room)}$"):
        merged(tmp_path, models, method, **keys)
    assert not (tmp_path / "out").exists()
    result = merged(tmp_path, models, method, **keys, nonfinite="propagate")
    assert bool(result["w"].isinf().all())


def test_what_a_cast_before_the_merge_makes_is_named_as_such(tmp_path: Path) -> None:
    models = [{"w": full(1e5, torch.bfloat16)} for _ in range(3)]
    message = (
        f"{tmp_path / 'expert0'} must have numbers that float16 holds, which the recipe casts to, got 4 too large in "
        f"tensor 'w' in bfloat16: choose another dtype"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}"):
        merged(tmp_path, models, "linear", dtype="float16")


def test_a_single_one_in_a_large_tensor(tmp_path: Path) -> None:
    large = torch.zeros(3 * BLOCK + 5, dtype=torch.float16)
    large[2 * BLOCK + 3] = 4e4
    models = [{"w": torch.zeros_like(large)}, {"w": large}, {"w": large}]
    with pytest.raises(RuntimeError, match=r"^merged must be finite, got 1 NaN or infinite values in tensor 'w'"):
        merged(tmp_path, models, "task_arithmetic")


def test_sums_of_finite_numbers_that_overflow_are_no_fault(tmp_path: Path) -> None:
    models = [{"w": torch.full((5000,), 1000, dtype=torch.float16)} for _ in range(3)]
    assert torch.equal(merged(tmp_path, models, "linear")["w"], models[0]["w"])


@pytest.mark.parametrize("method", METHODS)
def test_infinities_that_all_models_hold_stay(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    mask = torch.full((8, 8), -INF).triu(1)
    models = [{"mask": mask + torch.randn(8, 8), "v": torch.randn(6), "w": torch.randn(5, 4)} for _ in range(3)]
    result = merged(tmp_path / "masked", models, method)
    assert torch.equal(result["mask"].isinf(), mask.isinf()) and bool((result["mask"][mask.isinf()] == -INF).all())
    zeros = [{**model, "mask": model["mask"].nan_to_num(neginf=0)} for model in models]
    expected = merged(tmp_path / "zeros", zeros, method)
    assert torch.equal(result["mask"][~mask.isinf()], expected["mask"][~mask.isinf()])
    for name in ("v", "w"):
        assert torch.equal(result[name], expected[name])


@pytest.mark.parametrize("options", [{}, {"random_seed": 3}, {"stream": "mergekit"}])
def test_masks_are_drawn_as_if_there_were_none(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    models = [{"a": torch.randn(50), "b": torch.randn(50)} for _ in range(3)]
    for model in models:
        model["a"][7] = INF
    result = merged(tmp_path / "a", models, "dare_ties", **options)
    for model in models:
        model["a"][7] = 0
    expected = merged(tmp_path / "b", models, "dare_ties", **options)
    assert result["a"][7] == INF
    result["a"][7] = expected["a"][7]
    assert torch.equal(result["a"], expected["a"]) and torch.equal(result["b"], expected["b"])


def test_infinities_of_one_model_are_refused(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([-INF, 1.0])}, {"w": torch.tensor([-INF, 2.0])}, {"w": torch.tensor([-INF, INF])}]
    message = r"^experts\[1\] must be finite, got 1 NaN or infinite values in tensor 'w'"
    with pytest.raises(RuntimeError, match=message):
        merged(tmp_path, models, "task_arithmetic")


def test_equal_nan_is_refused(tmp_path: Path) -> None:
    models = [{"w": torch.tensor([math.nan, 1.0])} for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"^base must be finite, got 1 NaN or infinite values in tensor 'w'"):
        merged(tmp_path, models, "task_arithmetic")


def test_equal_entries_stay_where_the_sum_has_no_room(tmp_path: Path) -> None:
    least = torch.finfo(torch.float32).min
    models = [{"mask": torch.tensor([least, -INF, 0.0, float(t)])} for t in range(3)]
    result = merged(tmp_path, models, "linear", parameters={"normalize": False})
    assert result["mask"].tolist() == [least, -INF, 0.0, 3.0]


def test_what_is_copied_is_as_it_was(tmp_path: Path) -> None:
    copied = torch.tensor([math.nan, -INF, 1.0])
    folders = save_models(tmp_path, [{"w": copied}])
    merge({"merge_method": "passthrough", "models": [{"model": folders[0]}]}, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert result[0].isnan() and result[1:].tolist() == [-INF, 1.0]
    large = {"w": torch.tensor([1e5, 1.0])}
    folders = save_models(tmp_path / "large", [large])
    keys = {"merge_method": "passthrough", "models": [{"model": folders[0]}]}
    with pytest.raises(RuntimeError, match=r"^merged must be finite, got 1 NaN or infinite values in tensor 'w' in fl"):
        merge({**keys, "out_dtype": "float16"}, tmp_path / "out16")
    with pytest.raises(RuntimeError, match=r"^merged must be finite, got 1 NaN or infinite values in tensor 'w' in fl"):
        merge({**keys, "dtype": "float16"}, tmp_path / "out16")
