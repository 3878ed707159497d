"""Every declared method that needs no inputs, as `merge_method` of a recipe from disk to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.merging import METHODS, Method
from surgery_kernels.recipes import load_recipe
from surgery_kernels.recipes.examples import example_of
from tests.cases import assert_same
from tests.llama_checkpoints import loaded, models, save
from tests.untied import untied

pytestmark = pytest.mark.any_isa

TRAINING_FREE = [name for name, method in METHODS.items() if not method.from_inputs]


def recipe_of(method: type[Method], folders: list[str]) -> tuple[dict[str, Any], int]:
    """The least that a recipe says, and of how many experts."""
    least, most = method.num_experts
    return {"parameters": {}, **example_of(method, folders)}, most or max(least, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save(tmp_path_factory.mktemp("models"), models(untied, torch.float32))


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_from_disk_as_in_memory(folders: list[str], tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    assert method.in_recipes
    given, count = recipe_of(method, folders)
    merge(given, tmp_path / "out")
    actual = loaded(tmp_path / "out")
    options = {p.name: p.recipe_default for p in method.parameters() if not isinstance(p.recipe_default, tuple)}
    options |= {p.name: given["parameters"][p.key] for p in method.parameters() if p.key in given["parameters"]}
    # in the order of the files, which decides among ties
    base, *experts = ({key: loaded(Path(folder))[key] for key in actual} for folder in folders[: 1 + count])
    scope = load_recipe(given).scope if method.decides == "scope" else None
    expected = merge_state_dicts(
        None if method.base == "none" else base, experts, method=name, scope=scope, progress=False, **options
    )
    for key, tensor in expected.items():
        assert_same(actual[key], tensor, key)
    assert any(not torch.equal(actual[key], base[key]) for key in base)


def test_metagpt_decides_over_the_whole_model(folders: list[str]) -> None:
    given, _ = recipe_of(METHODS["metagpt"], folders)
    assert load_recipe(given).scope == "model"
    with pytest.raises(ValueError, match=r"^recipe\.scope must be 'model' for metagpt, got 'tensor'$"):
        load_recipe({**given, "scope": "tensor"})


def test_lines_goes_by_the_layer_or_by_what_a_recipe_says(folders: list[str], tmp_path: Path) -> None:
    given, _ = recipe_of(METHODS["lines"], folders)
    merge(given, tmp_path / "lines")
    scaled = {**given, "merge_method": "task_arithmetic", "parameters": {"weight": 1, "lambda": [0.2, 0.9]}}
    scaled["parameters"]["arithmetic"] = "exact"
    merge(scaled, tmp_path / "gradient")
    merge({**given, "parameters": {**given["parameters"], "depth": 1.0}}, tmp_path / "last")
    merge({**scaled, "parameters": {**scaled["parameters"], "lambda": 0.9}}, tmp_path / "all_last")
    for one, other in (("lines", "gradient"), ("last", "all_last")):
        expected = loaded(tmp_path / other)
        for key, tensor in loaded(tmp_path / one).items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)
