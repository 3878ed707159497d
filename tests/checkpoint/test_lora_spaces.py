"""LoRAs on disk merged from their factors: in recipes onto a base, and into the folder of an adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery_kernels.checkpoint import merge, merge_adapters
from surgery_kernels.checkpoint.loader import Loader
from surgery_kernels.checkpoint.reading.lora import LoraExpert
from surgery_kernels.checkpoint.steps import Input, Step
from surgery_kernels.merging import LowRank, merge_loras
from tests.checkpoints import save_lora, save_safetensors

pytestmark = pytest.mark.any_isa

SHAPES = {"a": (12, 9), "b": (7, 9), "c": (5, 5)}
RANKS = ({"a": 2, "b": 2}, {"a": 3, "b": 3}, {"a": 1, "c": 1})  # of three adapters


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], list[str], list[Any]]:
    """A base, folders of it and of adapters, and what these add."""
    generator = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    base["norm.weight"] = torch.ones(9, dtype=dtype)
    folders = [str(save_safetensors(folder / "base", base))]
    loras = []
    for t, ranks in enumerate(RANKS):
        factors = {}
        for name, rank in ranks.items():
            rows, columns = SHAPES[name]
            factors[name] = tuple(torch.randn(s, generator=generator) for s in ((rank, columns), (rows, rank)))
        folders.append(str(save_lora(folder / f"lora{t}", factors, lora_alpha=3)))
        loras.append({f"{k}.weight": LowRank(up * (3 / len(down)), down) for k, (down, up) in factors.items()})
    return base, folders, loras


def recipe(folders: list[str], method: str, **keys: Any) -> dict[str, Any]:
    models = [{"model": f"{folders[0]}+{lora}"} for lora in folders[1:]]
    return {"merge_method": method, "base_model": folders[0], "models": models, **keys}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_recipes_merge_the_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, scope: str, dtype: torch.dtype
) -> None:
    """No expert's weights are made for it."""
    base, folders, loras = saved(tmp_path, dtype)
    load = Loader.load

    def unchanged(self: Loader, wanted: Input, step: Step) -> Tensor:
        assert not isinstance(wanted.source, LoraExpert) or wanted.name not in wanted.source.changed
        return load(self, wanted, step)

    monkeypatch.setattr(Loader, "load", unchanged)
    parameters = {"density": 0.5, "lambda": 0.8}
    merge(recipe(folders, method, parameters=parameters, scope=scope), tmp_path / "out", progress=False)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = merge_loras(loras, method=method, scope=scope, density=0.5, lam=0.8)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        added = expected[name].product if name in expected else torch.zeros(())
        limit = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(merged[name], (weight.float() + added).to(dtype), rtol=limit, atol=limit)
        assert torch.equal(merged[name], weight) == (name not in expected)


def test_what_is_no_product_is_merged_as_it_is(tmp_path: Path) -> None:
    """An adapter that replaces a weight is a model like others; one over another base too."""
    base, folders, _ = saved(tmp_path)
    whole = {"c.weight": base["c.weight"] + torch.ones(5, 5)}
    factors = {"a": (torch.ones(1, 9), torch.ones(12, 1))}
    folders[3] = str(save_lora(tmp_path / "whole", factors, whole, modules_to_save=["c"], lora_alpha=1))
    parameters = {"inner": "task_arithmetic"}
    merge(recipe(folders, "knots", parameters=parameters), tmp_path / "out", progress=False)
    weighted = [{**model, "parameters": {"weight": 1}} for model in recipe(folders, "knots")["models"]]
    plain = {"merge_method": "task_arithmetic", "base_model": folders[0], "models": weighted}
    merge(plain, tmp_path / "plain", progress=False)
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    for name, weight in expected.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-4, atol=1e-4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.deep = nn.Linear(6, 8)
        self.conv = nn.Conv2d(3, 4, 2)
        self.wide = nn.Linear(8, 5, bias=False)


OPTIONS: list[dict[str, Any]] = [
    {"target_modules": ["embed", "deep", "conv", "wide"], "r": 2, "lora_alpha": 6},
    {"target_modules": ["deep", "conv"], "r": 3, "use_rslora": True},
    {"target_modules": "deep|wide|conv", "r": 1, "rank_pattern": {"deep": 2}, "alpha_pattern": {"wide": 5}},
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # two adapters of one base in turn
@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_an_adapter_out_of_adapters(tmp_path: Path, method: str) -> None:
    """A linear merge is the sum of what PEFT adds for each; PEFT loads the result."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    base = Model()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def fresh() -> Model:
        model = Model()
        model.load_state_dict(state)
        return model

    expected = {name: tensor.clone() for name, tensor in state.items()}
    for t, options in enumerate(OPTIONS):
        model = peft.get_peft_model(fresh(), peft.LoraConfig(**options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        model.save_pretrained(str(tmp_path / f"lora{t}"))
        for name, tensor in model.merge_and_unload().state_dict().items():
            expected[name] += 0.5 * (tensor - state[name])
    adapters = [tmp_path / f"lora{t}" for t in range(len(OPTIONS))]
    merge_adapters(adapters, tmp_path / "merged", method=method, inner="task_arithmetic", lam=0.5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora0", "lora1", "lora2", "merged"]
    merged = peft.PeftModel.from_pretrained(fresh(), str(tmp_path / "merged")).merge_and_unload().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-5)
        assert torch.equal(tensor, state[name]) == (name.endswith("bias"))


def test_ties_in_a_folder_is_that_of_the_factors(tmp_path: Path) -> None:
    base, folders, loras = saved(tmp_path)
    merge_adapters(folders[1:], tmp_path / "merged", density=0.5, rank=2)
    expected = merge_loras(loras, density=0.5, rank=2)
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {"c": 1})
    tensors = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    for name, product in expected.items():
        module = name.removesuffix(".weight")
        down, up = (tensors[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(up @ down, product.product, rtol=1e-5, atol=1e-5)


def test_refused(tmp_path: Path) -> None:
    _, folders, _ = saved(tmp_path)
    factors = {"a": (torch.ones(1, 9), torch.ones(12, 1))}
    whole = save_lora(tmp_path / "whole", factors, {"c.weight": torch.ones(5, 5)}, modules_to_save=["c"])
    key = "base_model.model.c.weight"
    other = save_lora(tmp_path / "other", factors, base_model_name_or_path="org/another")
    zeros = save_lora(tmp_path / "zeros", {"a": (torch.ones(1, 9), torch.zeros(12, 1))})
    for adapters, message in (
        ([], "adapters must be at least one folder, got none"),
        ([whole], f"{whole} must hold plain products alone to be merged as an adapter, got {key!r}"),
        ([folders[1], other], f"adapters must be of one base, got None and, of {other}, org/another"),
        ([zeros], "adapters must change their base, got products that are all 0"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            merge_adapters(adapters, tmp_path / "out")
    with pytest.raises(ValueError, match="^out must not exist, got "):
        merge_adapters(folders[1:], tmp_path / "lora1")
    with pytest.raises(FileNotFoundError, match="^.* must be a folder with adapter_model"):
        (tmp_path / "other" / "adapter_model.safetensors").unlink()
        merge_adapters([other], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
