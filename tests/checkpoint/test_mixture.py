"""Mixtures of dense models, beside mergekit-moe's own command."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.writing import writer
from surgery_kernels.cli import main
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import files_in
from tests.failing import after, no_room
from tests.llama_checkpoints import StateDict, assert_same_bits, loaded

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore")]

SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 4}
FAMILIES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
FAMILIES["qwen3"] = "Qwen3ForCausalLM"
WORDS = ["<s>", "</s>", "<unk>", "add", "numbers", "write", "a", "poem", "fix", "this", "code"]
SEED = 7
PROMPTS: list[dict[str, Any]] = [
    {"positive_prompts": ["add numbers", "add a numbers"], "negative_prompts": ["write a poem"]},
    {"positive_prompts": ["write a poem", "write this"]},
    {"positive_prompts": ["fix this code"], "negative_prompts": ["add", "write a poem this"]},
]


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The base and two experts, with a tokenizer."""
    of_model = getattr(transformers, FAMILIES[family])
    folders = [str(folder / name) for name in ("base", "a", "b")]
    for seed, each in enumerate(folders):
        torch.manual_seed(seed)
        model = of_model(of_model.config_class(**SIZES, bos_token_id=0, eos_token_id=1)).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(each)
        vocab = {word: number for number, word in enumerate(WORDS)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        fast.save_pretrained(each)
    return folders


def recipe(folders: list[str], gate_mode: str, *, shared: bool = False, **keys: Any) -> dict[str, Any]:
    base, a, b = folders
    given = {
        "base_model": base,
        "gate_mode": gate_mode,
        "experts": [
            {"source_model": a, **PROMPTS[0]},
            {"source_model": b, **PROMPTS[1], "residual_scale": 0.3},
        ],
        **keys,
    }
    return {**given, "shared_experts": [{"source_model": base, **PROMPTS[2]}]} if shared else given


def assert_same(stock: StateDict, ours: StateDict) -> None:
    assert ours.keys() == stock.keys()
    assert_same_bits(stock, {name: ours[name] for name in stock})


@pytest.mark.parametrize(
    ("family", "shared", "gate_mode"),
    [
        ("llama", False, "random"),
        ("mistral", False, "uniform_random"),
        ("mistral", False, "cheap_embed"),
        ("qwen2", True, "random"),
        ("qwen2", True, "cheap_embed"),
        ("qwen3", False, "uniform_random"),
    ],
)
def test_as_mergekit(tmp_path: Path, family: str, shared: bool, gate_mode: str) -> None:
    command = importlib.import_module("mergekit.scripts.moe").main
    cast = {"dtype": "bfloat16"} if gate_mode == "random" else {}
    given = recipe(save(tmp_path, family), gate_mode, shared=shared, **cast)
    (tmp_path / "r.yml").write_text(json.dumps(given))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    options = ["--random-seed", str(SEED), "--no-write-model-card", "--quiet"]
    command.main([str(tmp_path / "r.yml"), str(theirs), *options], standalone_mode=False)
    merge(tmp_path / "r.yml", ours, random_seed=SEED)
    assert_same(loaded(theirs), loaded(ours))
    configs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in (theirs, ours)]
    unlike = {key for key in configs[0].keys() | configs[1].keys() if configs[0].get(key) != configs[1].get(key)}
    assert unlike <= {"_name_or_path", "transformers_version", "layer_types", "max_window_layers"}, unlike
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(loading.values()) and type(model).__name__ == configs[0]["architectures"][0]


def test_an_older_model_of_llama_as_one_of_qwen(tmp_path: Path) -> None:
    """Whose attention has no biases, where that of the mixture has."""
    command = importlib.import_module("mergekit.scripts.moe").main
    given = recipe(save(tmp_path, "llama"), "random", shared=True)
    (tmp_path / "r.yml").write_text(json.dumps(given))
    options = ["--random-seed", str(SEED), "--no-write-model-card", "--quiet"]
    command.main([str(tmp_path / "r.yml"), str(tmp_path / "theirs"), *options], standalone_mode=False)
    merge(tmp_path / "r.yml", tmp_path / "ours", random_seed=SEED)
    assert_same(loaded(tmp_path / "theirs"), loaded(tmp_path / "ours"))


@pytest.mark.parametrize("layout", ["split", "fused"])
def test_layouts_and_seeds(tmp_path: Path, layout: str) -> None:
    given = recipe(save(tmp_path, "mistral"), "random", experts_per_token=1)
    merge(given, tmp_path / "first", moe_layout=layout)
    merge(given, tmp_path / "second", moe_layout=layout, random_seed=0)
    merge(given, tmp_path / "third", moe_layout=layout, random_seed=1)
    a, b, c = (loaded(tmp_path / name) for name in ("first", "second", "third"))
    inner = "block_sparse_moe" if layout == "split" else "mlp"
    assert {name for name in a if not torch.equal(a[name], c[name])} == {
        f"model.layers.{layer}.{inner}.gate.weight" for layer in (0, 1)
    }
    assert_same_bits(a, b)
    assert (f"model.layers.0.{inner}.experts.1.w2.weight" in a) == (layout == "split")
    assert json.loads((tmp_path / "first" / "config.json").read_text())["num_experts_per_tok"] == 1
    assert (tmp_path / "first" / "tokenizer.json").exists() and "A mixture around" in (
        tmp_path / "first" / "README.md"
    ).read_text()


def test_the_command(tmp_path: Path) -> None:
    given = recipe(save(tmp_path, "mistral"), "random", dtype="float16")
    (tmp_path / "r.yml").write_text(json.dumps(given))
    for arguments in (["check", "r.yml"], ["merge", "r.yml", "out", "--dry-run"], ["merge", "r.yml", "out"]):
        result = CliRunner().invoke(
            main, [str(tmp_path / each) if each in ("r.yml", "out") else each for each in arguments]
        )
        assert result.exit_code == 0, result.output
        assert f"method   mixture of experts around {given['base_model']}, routers random" in result.output.replace(
            "method  m", "method   m"
        )
    tensors = load_file(Path(given["experts"][0]["source_model"]) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 1e6
    save_file(tensors, Path(given["experts"][0]["source_model"]) / "model.safetensors")
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "r.yml"), str(tmp_path / "infinite")])
    assert result.exit_code == 1 and "'model.layers.1.block_sparse_moe.experts.0.w3.weight' in float16" in result.output


def test_what_is_refused(tmp_path: Path) -> None:
    folders = save(tmp_path, "mistral")

    def refused(given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            plan_merge(load_recipe(given))

    given = recipe(folders, "random")
    hidden = (
        "recipe.gate_mode must be one of random, uniform_random, cheap_embed, got 'hidden', which runs the base mod"
    )
    refused({key: value for key, value in given.items() if key != "gate_mode"}, hidden)
    refused({**given, "gate_mode": "hidden"}, hidden)
    refused({**given, "gate_mode": "best"}, "recipe.gate_mode must be one of 'random', 'uniform_random', 'cheap_embed'")
    refused({**given, "experts": []}, "recipe.experts must be a list of at least one, got")
    refused({**given, "experts_per_token": 3}, "recipe.experts_per_token must be 1 to 2, the experts, got 3")
    refused(
        {**given, "architecture": "deepseek"}, "recipe.architecture must be one of 'mixtral', 'qwen', 'qwen3', got 'd"
    )
    refused(
        {**given, "architecture": "qwen3"}, "recipe.architecture must fit the models .* got qwen3 from mistral with no"
    )
    experts = [{"source_model": folder} for folder in folders[1:]]
    cheap = {**given, "gate_mode": "cheap_embed"}
    refused(
        {**cheap, "experts": experts}, r"recipe.experts\[0\].positive_prompts must be given for routers made from pro"
    )
    same = [{**expert, "positive_prompts": ["add"]} for expert in experts]
    refused({**cheap, "experts": same}, "recipe.experts must have prompts of their own, got the same for all")
    refused(
        {**cheap, "experts": [{**same[0], "positive_prompts": "add"}]},
        r"positive_prompts must be a list of texts, got 'add'",
    )
    noisy = [{**expert, "noise_scale": 0.1} for expert in experts]
    refused({**given, "experts": noisy}, r"recipe.experts\[0\].noise_scale must be left out: noise is not added here")
    with plan_merge(load_recipe({**given, "experts": [experts[0], experts[0]]})) as plan:
        assert plan.notices == [f"recipe.experts are all {folders[1]}: it computes what that does until it is trained"]
    tensors = load_file(Path(folders[1]) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, Path(folders[1]) / "model.safetensors")
    refused(given, rf"experts must have the layers of .*base, '{name}' of shape \[12, 8\], got \[11, 8\] in .*a$")
    tensors = load_file(Path(folders[0]) / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.self_attn.k_proj.scale": torch.ones(1)}, Path(folders[0]) / "model.safetensors"
    )
    refused(
        given, "base must be a dense model whose tensors a mixture has too, got 'model.layers.0.self_attn.k_proj.scale'"
    )


def test_going_on_with_what_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = recipe(save(tmp_path, "mistral"), "random")
    merge(given, tmp_path / "whole")
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer.Writer, "_put", after(20, writer.Writer._put, no_room))
        with pytest.raises(OSError, match="No space left"):
            merge(given, tmp_path / "out")
    with pytest.raises(ValueError, match="resume must be of the same recipe, checkpoints and options"):
        merge(given, tmp_path / "out", resume=True, random_seed=5)
    merge(given, tmp_path / "out", resume=True)
    assert files_in(tmp_path / "out")["model.safetensors"] == files_in(tmp_path / "whole")["model.safetensors"]
