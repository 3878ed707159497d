"""Every method of mergekit's registry from files to files, beside mergekit's own command."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.merging import METHODS
from surgery_kernels.recipes import load_recipe
from tests.cases import assert_same
from tests.checkpoints import files_in
from tests.failing import after, no_room
from tests.llama_checkpoints import StateDict, gaussians, loaded, models, save
from tests.untied import untied

pytestmark = pytest.mark.any_isa

# number of experts, whether there is a base, parameters
RECIPES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "linear": (3, False, {"weight": [0.2, 0.8]}),
    "slerp": (1, True, {"t": [0, 0.5, 1]}),
    "nuslerp": (2, True, {"weight": 0.5}),
    "multislerp": (3, True, {"weight": [1, 0.5]}),
    "karcher": (3, False, {"max_iter": 4}),
    "model_stock": (3, True, {"filter_wise": True}),
    "passthrough": (1, False, {"scale": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}),
    "nearswap": (1, True, {"t": 0.01}),
    "task_arithmetic": (3, True, {"weight": 0.4, "lambda": 0.7}),
    "ties": (3, True, {"weight": 0.4, "density": 0.3}),
    "breadcrumbs": (3, True, {"weight": 0.4, "density": 0.6, "gamma": 0.1}),
    "breadcrumbs_ties": (3, True, {"weight": 0.4, "density": 0.6, "gamma": 0.1}),
    "dare_linear": (3, True, {"weight": 0.4, "density": 0.6}),
    "dare_ties": (3, True, {"weight": 0.4, "density": [0.3, 0.6], "normalize": True}),
    "della_linear": (3, True, {"weight": 0.4, "density": 0.6, "epsilon": 0.1}),
    "della": (3, True, {"weight": 0.4, "density": 0.6, "lambda": 1.1}),
    "sce": (3, True, {"select_topk": 0.5}),
    "ram": (3, True, {}),
    "ramplus_tl": (3, True, {"r": 0.2}),
    "arcee_fusion": (1, True, {}),
}
OURS: dict[str, tuple[int, bool, dict[str, Any]]] = {  # what mergekit does not have
    "tsv_m": (3, True, {"lambda": 0.8}),
    "iso_c": (3, True, {"of_rank": True}),
    "iso_cts": (3, True, {"common": 0.6}),
    "cart": (3, False, {"rank": 0.3}),
    "wudi": (2, True, {"steps": 5}),
}
PAIRS = ["slerp", "nuslerp", "nearswap", "arcee_fusion"]  # whose recipes list the base as well
RANDOM = ["dare_linear", "dare_ties", "della_linear", "della"]
# mergekit's float32 importance is noise next to the exact one
EXACT = ["arcee_fusion"]


def recipe(name: str, folders: list[str]) -> dict[str, Any]:
    count, has_base, parameters = {**RECIPES, **OURS}[name]
    listed = folders[0 if name in PAIRS else 1 : 1 + count]
    return {
        "merge_method": name,
        **({"base_model": folders[0]} if has_base else {}),
        "models": [{"model": folder} for folder in listed],
        "parameters": parameters,
    }


def by_mergekit(given: dict[str, Any], folder: Path, *options: str) -> StateDict:
    command = importlib.import_module("mergekit.scripts.run_yaml").main
    path = folder / "theirs.yml"
    path.write_text(json.dumps(given))
    arguments = [str(path), str(folder / "theirs"), "--no-copy-tokenizer", "--quiet", *options]
    command.main(arguments, standalone_mode=False)
    return loaded(folder / "theirs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_as_mergekit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    given = recipe(name, save(tmp_path, models(untied, dtype)))
    seed = 42 if name in RANDOM else None
    expected = by_mergekit(given, tmp_path, *(["--random-seed", "42"] if seed else []))
    merge(given, tmp_path / "ours", random_seed=seed)
    actual = loaded(tmp_path / "ours")
    assert list(actual) == list(expected)
    differing, total = 0, 0
    for key, tensor in actual.items():
        theirs = expected[key].to(dtype)  # mergekit writes arcee_fusion in float32 whatever the dtype
        far = (tensor - theirs).abs() > 16 * torch.finfo(dtype).eps * theirs.abs().clamp(min=0.01)
        differing, total = differing + int(far.sum()), total + far.numel()
    if name not in EXACT:
        # in bfloat16 equal magnitudes lie at every threshold, and exact interpolation is not rounded at every step
        assert differing / total < (0.0005 if dtype == torch.float32 else 0.25), f"{differing} of {total}"


ROUNDING = [name for name in RECIPES if any(p.key == "arithmetic" for p in METHODS[name].parameters())]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in (*RECIPES, *OURS)),
        *((name, {"arithmetic": "mergekit" if name == "karcher" else "exact"}) for name in ROUNDING),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_as_in_memory(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """From disk with numbers that are the same in all tensors: what `merge_state_dicts` gives."""
    state_dicts = models(gaussians, torch.bfloat16)
    count, has_base, parameters = {**RECIPES, **OURS}[name]
    plain = {key: value for key, value in parameters.items() if not isinstance(value, list)} | more
    plain |= {"t": 0.3} if name == "slerp" else {}
    plain |= {"weight": 0.4} if "weight" in parameters else {}
    plain |= {"density": 0.6} if "density" in parameters else {}
    given = {**recipe(name, save(tmp_path, state_dicts)), "parameters": plain}
    merge(given, tmp_path / "ours")
    method = load_recipe(given).method
    names = {parameter.key: parameter.name for parameter in method.parameters() if parameter.key}
    options = method.recipe_defaults() | {names[key]: value for key, value in plain.items()}
    base, experts = state_dicts[0] if has_base else None, state_dicts[1 : 1 + count]
    expected = merge_state_dicts(base, experts, method=name, scope="tensor", **options)
    for key, tensor in loaded(tmp_path / "ours").items():
        assert_same(tensor, expected[key], key)


@pytest.mark.parametrize("name", [name for name in RECIPES if METHODS[name].decides == "scope"])
def test_over_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Limits of all tensors together, found once, also by a merge that is taken up again."""
    state_dicts = models(gaussians, torch.bfloat16)
    given = {**recipe(name, save(tmp_path, state_dicts)), "scope": "model"}
    merge(given, tmp_path / "whole")
    options = {"density": 0.3} if name == "ties" else {"density": 0.6, "gamma": 0.1}
    rounding = {"semantics" if name == "ties" else "arithmetic": "mergekit"}
    # sorted as in the files, which decides among ties
    base, *experts = ({key: state[key] for key in sorted(state)} for state in state_dicts[:4])
    expected = merge_state_dicts(base, experts, method=name, scope="model", weights=0.4, **options, **rounding)
    for key, tensor in loaded(tmp_path / "whole").items():
        assert_same(tensor, expected[key], key)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", after(9, os.pwrite, no_room))
        with pytest.raises(OSError, match="No space left"):
            merge(given, tmp_path / "out")
    merge(given, tmp_path / "out", resume=True)
    assert files_in(tmp_path / "out")["model.safetensors"] == files_in(tmp_path / "whole")["model.safetensors"]


@pytest.mark.parametrize("stream", ["mergekit", "counter"])
@pytest.mark.parametrize("name", ["dare_ties", "della_linear"])
def test_random_masks_survive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stream: str) -> None:
    given = recipe(name, save(tmp_path, models(untied, torch.float32)))
    options: dict[str, Any] = {"random_seed": 7, "stream": stream}
    merge(given, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", after(9, os.pwrite, no_room))
        with pytest.raises(OSError, match="No space left"):
            merge(given, tmp_path / "out", **options)
    merge(given, tmp_path / "out", resume=True, **options)
    weights = "model.safetensors"
    assert files_in(tmp_path / "out")[weights] == files_in(tmp_path / "whole")[weights]
    merge(given, tmp_path / "other", random_seed=8, stream=stream)
    assert files_in(tmp_path / "other")[weights] != files_in(tmp_path / "whole")[weights]


def test_a_base_of_density_0_is_the_base(tmp_path: Path) -> None:
    state_dicts = models(untied, torch.float32)
    given = recipe("ties", save(tmp_path, state_dicts)) | {"parameters": {"weight": 1.0, "density": 0.0}}
    merge(given, tmp_path / "out")
    same(loaded(tmp_path / "out"), state_dicts[0])


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(actual[name], tensor, name)
