"""Families that fuse their experts with inputs first: matched with split ones, decided by matrix or by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.experts import in_one_layout, layout_of
from surgery_kernels.checkpoint.reading import lora
from surgery_kernels.checkpoint.reading.expert_views import FusedExperts
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.checkpoint.writing import writer
from tests.checkpoints import TIES, files_in, save_lora, save_safetensors, ties_recipe
from tests.failing import after, no_room
from tests.llama_checkpoints import loaded

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
EXPERTS, WIDTH, DIM = 3, 6, 8
# By model type: what the experts lie in, what they are called when fused, and whether they have biases.
FAMILIES = {
    "mixtral": ("block_sparse_moe", "mlp", "gate_up_proj", "down_proj", False),
    "qwen3_moe": ("mlp", "mlp", "gate_up_proj", "down_proj", False),
    "llama4_text": ("feed_forward", "feed_forward", "gate_up_proj", "down_proj", False),
    "aria": ("mlp", "mlp", "fc1.weight", "fc2.weight", False),
    "gpt_oss": ("mlp", "mlp", "gate_up_proj", "down_proj", True),
    "openai_privacy_filter": ("mlp", "mlp", "gate_up_proj", "down_proj", True),
}
NAMES = {"mixtral": ("w1", "w3", "w2")}
INPUTS_FIRST = [family for family in FAMILIES if family not in ("mixtral", "qwen3_moe")]


def split_model(family: str, seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    inner, *_, biases = FAMILIES[family]
    tensors: StateDict = {}
    for layer in range(2):
        block = f"model.layers.{layer}"
        for expert in range(EXPERTS):
            for matrix in NAMES.get(family, ("gate_proj", "up_proj", "down_proj")):
                shape = (DIM, WIDTH) if matrix in ("w2", "down_proj") else (WIDTH, DIM)
                name = f"{block}.{inner}.experts.{expert}.{matrix}"
                tensors[f"{name}.weight"] = torch.randn(shape, generator=generator)
                if biases:
                    tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator)
        tensors[f"{block}.{inner}.router.weight"] = torch.randn(EXPERTS, DIM, generator=generator)
    return tensors | {"model.norm.weight": torch.randn(DIM, generator=generator)}


def fused_model(family: str, split: StateDict) -> StateDict:
    """As the model of transformers has it."""
    inner, fused_inner, gate_up, down, _ = FAMILIES[family]
    names = NAMES.get(family, ("gate_proj", "up_proj", "down_proj"))
    out = {
        name.replace(f".{inner}.", f".{fused_inner}."): tensor
        for name, tensor in split.items()
        if ".experts." not in name
    }
    for layer in range(2):
        before = f"model.layers.{layer}.{inner}.experts"
        after = f"model.layers.{layer}.{fused_inner}.experts"
        for kind, end in (("weight", ""), ("bias", "_bias")):
            if f"{before}.0.{names[0]}.{kind}" not in split:
                continue
            gates, ups, downs = (
                torch.stack([split[f"{before}.{e}.{m}.{kind}"] for e in range(EXPERTS)]) for m in names
            )
            both = torch.stack([gates, ups], 2).flatten(1, 2) if family == "gpt_oss" else torch.cat([gates, ups], 1)
            turned = family in INPUTS_FIRST and kind == "weight"
            out[f"{after}.{gate_up}{end}"] = both.mT.contiguous() if turned else both
            out[f"{after}.{down}{end}"] = downs.mT.contiguous() if turned else downs
    return out


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[StateDict], list[str], list[str]]:
    """The family, split tensors, and folders of the same models split and fused: base and two experts."""
    family = request.param
    tensors = [split_model(family, seed) for seed in range(3)]
    config = {"model_type": family}
    split = [str(save_safetensors(tmp_path / "split" / str(i), x, config=config)) for i, x in enumerate(tensors)]
    fused = [
        str(save_safetensors(tmp_path / "fused" / str(i), fused_model(family, x), config=config))
        for i, x in enumerate(tensors)
    ]
    return family, tensors, split, fused


def assert_equal(found: StateDict, expected: StateDict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("which", ["sfs", "fff"])
def test_layouts_are_matched(models: Any, tmp_path: Path, which: str) -> None:
    family, tensors, split, fused = models
    folders = [split[i] if kind == "s" else fused[i] for i, kind in enumerate(which)]
    expected = merge_state_dicts(tensors[0], tensors[1:], **TIES)
    for asked in (None, "split", "fused"):
        out = tmp_path / f"out-{asked}"
        merge(ties_recipe(folders), out, moe_layout=asked, max_shard_bytes=1500)
        written = asked or ("split" if which[0] == "s" else "fused")
        assert_equal(loaded(out), fused_model(family, expected) if written == "fused" else expected)
        assert layout_of(open_checkpoint(out)) == written


def test_rows_are_outputs(models: Any, tmp_path: Path) -> None:
    family, tensors, split, fused = models
    recipe = {
        "merge_method": "model_stock",
        "base_model": fused[0],
        "parameters": {"filter_wise": True, "arithmetic": "exact"},
    }
    merge({**recipe, "models": [{"model": each} for each in fused[1:]]}, tmp_path / "out")
    expected = merge_state_dicts(tensors[0], tensors[1:], method="model_stock", filter_wise=True)
    assert_equal(loaded(tmp_path / "out"), fused_model(family, expected))


def test_decisions_over_fused_tensors(models: Any, tmp_path: Path) -> None:
    """As mergekit 0.1.5 takes them."""
    family, tensors, split, fused = models
    whole = [fused_model(family, each) for each in tensors]
    expected = merge_state_dicts(whole[0], whole[1:], **TIES)
    for number, folders in enumerate([split, fused, [split[0], *fused[1:]], [fused[0], *split[1:]]]):
        merge(ties_recipe(folders), tmp_path / str(number), moe_decisions="tensor")
        assert_equal(loaded(tmp_path / str(number)), expected)
    by_matrix = fused_model(family, merge_state_dicts(tensors[0], tensors[1:], **TIES))
    assert not any(torch.equal(by_matrix[name], expected[name]) for name in expected if ".experts." in name)
    with pytest.raises(ValueError, match="moe_layout must be 'fused' where moe_decisions is 'tensor', got 'split'"):
        merge(ties_recipe(split), tmp_path / "out", moe_decisions="tensor", moe_layout="split")
    with pytest.raises(ValueError, match="moe_decisions must be one of 'matrix', 'tensor', got 'expert'"):
        merge(ties_recipe(split), tmp_path / "out", moe_decisions="expert")


@pytest.mark.parametrize("family", INPUTS_FIRST)
def test_views_are_of_the_same_bytes(tmp_path: Path, family: str) -> None:
    split = split_model(family, 0)
    folder = save_safetensors(tmp_path / "base", fused_model(family, split), config={"model_type": family})
    (view,) = in_one_layout({0: open_checkpoint(folder)}).values()
    assert view.tensors.keys() == split.keys()
    for name, tensor in split.items():
        info = view.tensors[name]
        assert info.file is not None and info.offset is not None and info.nbytes == tensor.nbytes
        assert torch.equal(view.tensor(name), tensor) and view.tensor(name).is_contiguous()
    view.release()
    view.close()


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_columns_in_turn_are_written_again_after_a_stop(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of a tensor does not undo what lies between its elements."""
    folders = [
        str(save_safetensors(tmp_path / str(seed), split_model(family, seed), config={"model_type": family}))
        for seed in range(3)
    ]
    merge(ties_recipe(folders), tmp_path / "whole", moe_layout="fused")
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_between", after(7, writer._write_between, no_room))
        with pytest.raises(OSError, match="No space left"):
            merge(ties_recipe(folders), tmp_path / "out", moe_layout="fused")
    merge(ties_recipe(folders), tmp_path / "out", moe_layout="fused", resume=True)
    found, expected = files_in(tmp_path / "out"), files_in(tmp_path / "whole")
    assert found["model.safetensors"] == expected["model.safetensors"]


def test_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PIECE", 20)  # elements: one row and a part
    family = "gpt_oss"
    split = split_model(family, 0)
    folder = str(save_safetensors(tmp_path / "a", split, config={"model_type": family}))
    recipe = {"merge_method": "passthrough", "models": [{"model": folder}]}
    merge(recipe, tmp_path / "out", moe_layout="fused")
    assert_equal(loaded(tmp_path / "out"), fused_model(family, split))


def test_fused_targets_over_split_files(models: Any, tmp_path: Path) -> None:
    """An adapter that was trained with fused experts, over files that have them split."""
    family, tensors, split, fused = models
    name = f"model.layers.1.{FAMILIES[family][1]}.experts"
    own_name = f"{name}.{FAMILIES[family][3]}"
    count, rows, columns = fused_model(family, tensors[0])[own_name].shape
    outputs, inputs = (columns, rows) if family in INPUTS_FIRST else (rows, columns)
    factors = torch.randn(2 * count, inputs), torch.randn(outputs, 2 * count)
    options = {"r": 2, "lora_alpha": 2, "target_parameters": ["experts.down_proj"], "target_modules": []}
    save_lora(tmp_path / "lora", {name: factors}, **options)
    for number, folders in enumerate((split, fused)):
        model = {"model": f"{folders[0]}+{tmp_path / 'lora'}", "parameters": {"weight": 1}}
        recipe = {"merge_method": "task_arithmetic", "base_model": folders[0], "models": [model]}
        merge(recipe, tmp_path / str(number), moe_layout="split")
    assert_equal(loaded(tmp_path / "0"), loaded(tmp_path / "1"))
    merge({"merge_method": "passthrough", "models": [{"model": f"{split[0]}+{tmp_path / 'lora'}"}]}, tmp_path / "out")
    assert layout_of(open_checkpoint(tmp_path / "out")) == "split"  # as the files
    down, up = factors
    product = torch.einsum("ore,eri->eoi", up.view(outputs, 2, count), down.view(count, 2, inputs))
    product = product.mT if family in INPUTS_FIRST else product
    found = fused_model(family, loaded(tmp_path / "out"))[own_name]
    torch.testing.assert_close(found, fused_model(family, tensors[0])[own_name] + product, rtol=1e-5, atol=1e-5)


def test_targets_of_single_experts_over_fused_files(models: Any, tmp_path: Path) -> None:
    family, tensors, split, fused = models
    module = f"model.layers.0.{FAMILIES[family][0]}.experts.1.{NAMES.get(family, ['gate_proj'])[0]}"
    down, up = torch.randn(2, DIM), torch.randn(WIDTH, 2)
    save_lora(tmp_path / "lora", {module: (down, up)}, lora_alpha=2)
    expected = {**tensors[0], f"{module}.weight": tensors[0][f"{module}.weight"] + up @ down}
    for folders in (split, fused):
        out = tmp_path / Path(folders[0]).parent.name / "out"
        merge({"merge_method": "passthrough", "models": [{"model": f"{folders[0]}+{tmp_path / 'lora'}"}]}, out)
        found = loaded(out)
        same = fused_model(family, expected) if folders is fused else expected
        assert found.keys() == same.keys()
        for name, tensor in same.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def test_no_more_than_an_expert_is_computed_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an adapter on all of them, over files of either layout."""
    family, name = "qwen3_moe", "model.layers.1.mlp.experts"
    tensors = split_model(family, 0)
    factors = torch.randn(2 * EXPERTS, WIDTH), torch.randn(DIM, 2 * EXPERTS)
    save_lora(tmp_path / "lora", {name: factors}, r=2, target_parameters=["experts.down_proj"], target_modules=[])

    def whole(self: Any, name: str) -> Tensor:
        raise AssertionError(f"{name} is computed as a whole")

    computed: list[int] = []
    add = lora.add_products

    def counted(weight: Tensor, *arguments: Any) -> Tensor:
        computed.append(len(weight))
        return add(weight, *arguments)

    monkeypatch.setattr(FusedExperts, "_assembled", watched(FusedExperts._assembled, whole))
    monkeypatch.setattr(lora, "add_products", counted)
    for kind, model in (("split", tensors), ("fused", fused_model(family, tensors))):
        folder = save_safetensors(tmp_path / kind, model, config={"model_type": family})
        given = {"merge_method": "passthrough", "models": [{"model": f"{folder}+{tmp_path / 'lora'}"}]}
        merge(given, tmp_path / f"{kind}-out", moe_layout="split")
    assert computed == [1] * 2 * EXPERTS
    assert_equal(loaded(tmp_path / "split-out"), loaded(tmp_path / "fused-out"))


def watched(assembled: Any, refuse: Any) -> Any:
    return lambda self, name, experts: assembled(self, name, experts) if len(experts) == 1 else refuse(self, name)
