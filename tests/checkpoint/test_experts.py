"""Experts split and fused are merged with one another, matrix by matrix, and written in the layout asked for."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.diff import diff
from surgery_kernels.checkpoint.experts import in_one_layout, layout_of
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.cli import main
from tests.checkpoints import TIES, save_lora, save_safetensors, ties_recipe

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
EXPERTS = 3
SIZES = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 1}
FAMILIES: dict[str, tuple[Any, tuple[str, str, str, str]]] = {
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=12, num_local_experts=EXPERTS)),
        ("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, intermediate_size=16, moe_intermediate_size=12, num_experts=EXPERTS, head_dim=4)
        ),
        ("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
}


def fused(tensors: StateDict, family: str) -> StateDict:
    inner, gate, up, down = FAMILIES[family][1]
    out = {}
    for name, tensor in tensors.items():
        block, found, rest = name.partition(f".{inner}.")
        if f".{inner}.experts." not in name:
            out[f"{block}.mlp.{rest}" if found else name] = tensor
            continue
        matrices = [{m: tensors[f"{block}.{inner}.experts.{e}.{m}.weight"] for m in (gate, up, down)} for e in range(3)]
        out[f"{block}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([x[gate], x[up]]) for x in matrices])
        out[f"{block}.mlp.experts.down_proj"] = torch.stack([x[down] for x in matrices])
    return out


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[StateDict], list[str], list[str]]:
    """Family, split tensors, and folders of the same models with split and with fused experts: base and two experts."""
    torch.manual_seed(0)
    family = request.param
    tensors, split, packed = [], [], []
    for name in ("base", "a", "b"):
        model: PreTrainedModel = FAMILIES[family][0]()
        model.save_pretrained(tmp_path / "split" / name)
        tensors.append(load_file(tmp_path / "split" / name / "model.safetensors"))
        config = model.config.to_dict()
        save_safetensors(tmp_path / "fused" / name, fused(tensors[-1], family), config={**config, "dtype": "float32"})
        split.append(str(tmp_path / "split" / name))
        packed.append(str(tmp_path / "fused" / name))
    return family, tensors, split, packed


def loaded(folder: Path) -> StateDict:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_equal(found: StateDict, expected: StateDict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("which", ["sss", "fff", "sfs", "fss", "sff"])
@pytest.mark.parametrize("asked", [None, "split", "fused"])
def test_layouts_are_matched(models: Any, tmp_path: Path, which: str, asked: str | None) -> None:
    family, tensors, split, packed = models
    folders = [split[i] if kind == "s" else packed[i] for i, kind in enumerate(which)]
    merge(ties_recipe(folders), tmp_path / "out", moe_layout=asked, max_shard_bytes=3000)
    expected = merge_state_dicts(tensors[0], tensors[1:], **TIES)  # matrix by matrix
    written = asked or ("split" if which[0] == "s" else "fused")
    assert_equal(loaded(tmp_path / "out"), fused(expected, family) if written == "fused" else expected)
    assert layout_of(open_checkpoint(tmp_path / "out")) == written


@pytest.mark.parametrize("asked", ["split", "fused"])
def test_transformers_loads_both(models: Any, tmp_path: Path, asked: str) -> None:
    family, tensors, split, packed = models
    recipe = {
        "merge_method": "linear",
        "models": [{"model": x, "parameters": {"weight": 1}} for x in (split[0], packed[0])],
    }
    merge(recipe, tmp_path / "out", moe_layout=asked)
    kind = type(FAMILIES[family][0]())
    ours, theirs = (kind.from_pretrained(folder).state_dict() for folder in (tmp_path / "out", split[0]))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-6)


def test_the_command(models: Any, tmp_path: Path) -> None:
    family, tensors, split, _ = models
    (tmp_path / "r.yml").write_text(str(ties_recipe(split)))
    arguments = ["merge", str(tmp_path / "r.yml"), str(tmp_path / "out"), "--moe-layout", "fused"]
    out = CliRunner().invoke(main, arguments)
    assert out.exit_code == 0, out.output
    assert_equal(loaded(tmp_path / "out"), fused(merge_state_dicts(tensors[0], tensors[1:], **TIES), family))


def test_views_are_of_the_same_bytes(models: Any) -> None:
    _, tensors, split, packed = models
    sources = in_one_layout({0: open_checkpoint(split[0]), 1: open_checkpoint(packed[0])})
    view = sources[1]
    assert view.tensors.keys() == tensors[0].keys()
    for name, tensor in tensors[0].items():
        info = view.tensors[name]
        assert torch.equal(view.tensor(name), tensor) and info.shape == tensor.shape and info.nbytes == tensor.nbytes
        assert info.offset is not None and info.file is not None
        content = info.file.read_bytes()[info.offset : info.offset + info.nbytes]
        assert content == tensor.numpy().tobytes(), name
    assert not list(diff(split[0], split[0]))
    view.close()


def test_adapters_of_fused_experts(models: Any, tmp_path: Path) -> None:
    family, tensors, split, packed = models
    gate_up = fused(tensors[0], family)["model.layers.0.mlp.experts.gate_up_proj"]
    down, up = torch.randn(2 * EXPERTS, gate_up.shape[2]), torch.randn(gate_up.shape[1], 2 * EXPERTS)
    factors = {"model.layers.0.mlp.experts": (down, up)}
    target = ["mlp.experts.gate_up_proj"]
    save_lora(tmp_path / "lora", factors, r=2, lora_alpha=2, target_parameters=target, target_modules=["q_proj"])
    model = {"model": f"{packed[0]}+{tmp_path / 'lora'}", "parameters": {"weight": 1}}
    merge({"merge_method": "task_arithmetic", "base_model": split[0], "models": [model]}, tmp_path / "out")
    product = torch.einsum("ore,eri->eoi", up.view(len(up), 2, EXPERTS), down.view(EXPERTS, 2, -1))
    found = fused(loaded(tmp_path / "out"), family)["model.layers.0.mlp.experts.gate_up_proj"]
    torch.testing.assert_close(found, gate_up + product, rtol=1e-5, atol=1e-5)


def test_experts_that_cannot_be_fused(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.{m}_proj.weight" for e in (0, 1) for m in ("gate", "up", "down")]
    tensors = {name: torch.ones(4, 4) for name in names}
    del tensors[names[-1]]
    folder = save_safetensors(tmp_path / "base", tensors)
    recipe = {"merge_method": "linear", "models": [{"model": str(folder), "parameters": {"weight": 1}}]}
    message = "moe_layout must be 'split' for experts that are not alike, got 'fused' and 'model.layers.0'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge(recipe, tmp_path / "out", moe_layout="fused")
    message = "moe_layout must be one of 'fused', 'split', got 'packed'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge(recipe, tmp_path / "out", moe_layout="packed")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_decisions_over_fused_tensors_as_mergekit(tmp_path: Path) -> None:
    command = importlib.import_module("mergekit.scripts.run_yaml").main
    folders = [str(tmp_path / name) for name in ("base", "a", "b")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = FAMILIES["mixtral"][0]()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
    (tmp_path / "r.yml").write_text(str(ties_recipe(folders)))
    options = ["--no-copy-tokenizer", "--quiet"]
    command.main([str(tmp_path / "r.yml"), str(tmp_path / "theirs"), *options], standalone_mode=False)
    arguments = ["merge", str(tmp_path / "r.yml"), str(tmp_path / "ours"), "--moe-decisions", "tensor"]
    out = CliRunner().invoke(main, arguments)
    assert out.exit_code == 0, out.output
    assert_equal(loaded(tmp_path / "ours"), loaded(tmp_path / "theirs"))


def test_fused_experts_beside_a_router_of_split_ones(models: Any, tmp_path: Path) -> None:
    """As files have it that somebody has fused by hand."""
    family, tensors, split, packed = models
    inner = FAMILIES[family][1][0]
    by_hand = {
        name if ".experts." in name else name.replace(".mlp.", f".{inner}."): tensor
        for name, tensor in load_file(Path(packed[1]) / "model.safetensors").items()
    }
    save_safetensors(Path(packed[1]), by_hand)
    for number, decisions in enumerate(("matrix", "tensor")):
        merge(ties_recipe([split[0], packed[1]]), tmp_path / f"{number}", moe_decisions=decisions)
        merge(ties_recipe([split[0], split[1]]), tmp_path / f"{number}-expected", moe_decisions=decisions)
        assert_equal(loaded(tmp_path / f"{number}"), loaded(tmp_path / f"{number}-expected"))


def test_what_is_no_mixture_or_of_another_layout(tmp_path: Path) -> None:
    gpt_oss = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 8),
        "model.layers.0.mlp.experts.down_proj": torch.ones(2, 4, 4),
    }
    biased = {**gpt_oss, "model.layers.0.mlp.experts.gate_up_proj_bias": torch.ones(2, 8)}
    for number, (tensors, config) in enumerate(
        [(gpt_oss, {"model_type": "gpt_oss"}), (biased, {}), ({"w": torch.ones(2)}, {})]
    ):
        source = open_checkpoint(save_safetensors(tmp_path / str(number), tensors, config=config))
        assert layout_of(source) is None
        assert in_one_layout({0: source})[0] is source
