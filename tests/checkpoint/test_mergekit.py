"""Checkpoints merged from one recipe file by mergekit's own command and by ours."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from tests.cases import Inputs, assert_same, grid, inputs, option_id
from tests.llama_checkpoints import (
    CONFIG,
    DENSITIES,
    HEAD,
    NUMBERS,
    VOCABULARY,
    Data,
    Merges,
    assert_same_bits,
    gaussians,
    models,
    recipe,
    save,
    save_one,
    written,
)
from tests.untied import untied

pytestmark = pytest.mark.any_isa

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# of the experts, and of all
Settings = tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]
SETTINGS: dict[str, Settings] = {
    "numbers": (NUMBERS, {}),
    "undivided": (NUMBERS, {"normalize": False, "lambda": 0.4, "int8_mask": True}),
    "divided": (NUMBERS, {"normalize": True, "lambda": -1.7, "rescale": False}),
    "shared": ([{}, {"weight": 0.25}, {"density": 0.0}], {"weight": "1e-1", "density": 0.35}),
    "gradients": (
        [{"weight": [0, 1], "density": [0.3, 0.9, 0.5, 0.1]}, {"weight": [0.2, 0.7, -0.4]}, {"weight": 1}],
        {"density": [0.1, 1], "lambda": [1, 0.5], "normalize": [True, False, True]},
    ),
    "filters": (
        [
            {
                "weight": [
                    {"filter": "mlp", "value": [0.5, 1.5]},
                    {"filter": "q_proj", "value": 0.1},
                    {"filter": "layers.1.", "value": 2},
                    {"value": 0.8},
                ],
                "density": [{"filter": "*", "value": [0.45, 0.65]}, {"value": 1}],
            },
            {"weight": [{"filter": "self_attn", "value": -0.2}], "density": {"filter": "head", "value": 0.2}},
            {},
        ],
        {
            "weight": [{"filter": "norm", "value": 0.3}, {"filter": None, "value": 0.9}],
            "density": 0.75,
            "lambda": [{"filter": "embed", "value": 0.9}],
            "normalize": [{"filter": "down_proj", "value": False}, {"filter": "up_proj", "value": True}],
        },
    ),
}


def multiples(shape: Sequence[int], num_tasks: int, dtype: torch.dtype) -> Inputs:
    return inputs(grid, shape, num_tasks, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("settings", SETTINGS)
def test_task_arithmetic(merges: Merges, tmp_path: Path, settings: str, dtype: torch.dtype) -> None:
    of_model, parameters = SETTINGS[settings]
    folders = save(tmp_path, models(gaussians, dtype))
    assert_same_bits(*merges(recipe("task_arithmetic", folders, of_model, parameters=parameters)))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("settings", SETTINGS)
def test_ties(merges: Merges, tmp_path: Path, settings: str, dtype: torch.dtype) -> None:
    of_model, parameters = SETTINGS[settings]
    folders = save(tmp_path, models(untied, dtype))
    assert_same_bits(*merges(recipe("ties", folders, of_model, parameters=parameters)))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_numbers_of_experts(merges: Merges, tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    for num_tasks in (1, 2, 4):
        folders = save(tmp_path / str(num_tasks), models(untied, dtype, num_tasks))
        assert_same_bits(*merges(recipe(method, folders)))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("data", [gaussians, multiples], ids=option_id)
def test_ties_of_equal_magnitudes(merges: Merges, tmp_path: Path, data: Data, dtype: torch.dtype) -> None:
    """Which of the entries at a threshold are kept is up to mergekit's sort; nothing else may differ."""
    base, *experts = models(data, dtype)
    stock, ours = merges(recipe("ties", save(tmp_path, [base, *experts])))
    assert list(ours) == list(stock)
    differing = 0
    for name, tensor in ours.items():
        at_a_threshold = torch.zeros(tensor.shape, dtype=torch.bool)
        for expert, density in zip(experts, DENSITIES, strict=False):
            magnitudes = (expert[name] - base[name]).abs()
            keep = max(1, int(density * magnitudes.numel()))
            threshold = magnitudes.flatten().sort(descending=True).values[keep - 1]
            at_a_threshold |= (magnitudes == threshold) & (density < 1)
        differs = tensor != stock[name]
        differing += int(differs.sum())
        assert not (differs & ~at_a_threshold).any(), name
    assert (differing > 0) == (data is multiples or dtype != torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("settings", SETTINGS)
def test_linear(merges: Merges, tmp_path: Path, settings: str, dtype: torch.dtype) -> None:
    of_model, parameters = SETTINGS[settings]
    given = recipe("linear", save(tmp_path, models(gaussians, dtype)), of_model, parameters=parameters)
    assert_same_bits(*merges(given))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_linear_with_a_base(merges: Merges, tmp_path: Path, dtype: torch.dtype) -> None:
    folders = save(tmp_path, models(gaussians, dtype))
    given = recipe("linear", folders, base_model=folders[0], parameters={"weight": 0.3})  # not listed: summed last
    assert_same_bits(*merges(given))
    given = recipe("linear", folders[1:], base_model=folders[3])  # listed: one of the models, with its weight
    assert_same_bits(*merges(given))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_base_among_the_models(merges: Merges, tmp_path: Path, method: str) -> None:
    folders = save(tmp_path, models(untied, torch.float32))
    given = recipe(method, folders)
    expected, _ = merges(given)
    given["models"].insert(1, {"model": folders[0], "parameters": {"weight": 5.0}})
    stock, ours = merges(given)
    assert_same_bits(stock, ours)
    assert_same_bits(expected, ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_rescale(merges: Merges, tmp_path: Path, dtype: torch.dtype) -> None:
    folders = save(tmp_path, models(untied, dtype))
    parameters = {"rescale": [{"filter": "mlp", "value": True}, {"filter": "embed", "value": True}]}
    assert_same_bits(*merges(recipe("ties", folders, parameters=parameters)))


CASTS = [
    (torch.bfloat16, {"dtype": "float32"}),
    (torch.float32, {"dtype": "bfloat16"}),
    (torch.float16, {"dtype": "float32", "out_dtype": "float16"}),
    (torch.bfloat16, {"dtype": "bfloat16", "out_dtype": "float32"}),
    (torch.float32, {"dtype": "float16", "out_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("dtype", "keys"), CASTS, ids=option_id)
def test_dtypes(merges: Merges, tmp_path: Path, dtype: torch.dtype, keys: dict[str, str]) -> None:
    folders = save(tmp_path, models(gaussians, dtype))
    stock, ours = merges(recipe("task_arithmetic", folders, **keys))
    assert_same_bits(stock, ours)
    expected = keys.get("out_dtype", keys["dtype"])
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, expected)}
    assert [config["dtype"] for config in written(tmp_path, "config.json")] == [expected, expected]


@pytest.mark.parametrize("wide", [0, 2])
def test_models_of_two_dtypes(merges: Merges, tmp_path: Path, wide: int) -> None:
    state_dicts = models(gaussians, torch.bfloat16)
    state_dicts[wide] = {name: tensor.float() for name, tensor in state_dicts[wide].items()}
    state_dicts[3] = {name: tensor.half() if "mlp" in name else tensor for name, tensor in state_dicts[3].items()}
    assert_same_bits(*merges(recipe("task_arithmetic", save(tmp_path, state_dicts))))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_shards(merges: Merges, tmp_path: Path, method: str) -> None:
    given = recipe(method, save(tmp_path, models(untied, torch.float32)))
    stock, ours = merges(given, max_shard_bytes=3000)
    assert_same_bits(stock, ours)
    places = written(tmp_path, "model.safetensors.index.json")
    assert places[0]["weight_map"] == places[1]["weight_map"]
    assert places[0]["metadata"]["total_size"] == places[1]["metadata"]["total_size"]
    assert len(set(places[0]["weight_map"].values())) > 3


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_tied_embeddings(merges: Merges, tmp_path: Path, method: str) -> None:
    state_dicts = models(untied, torch.float32)
    tied = [{name: tensor for name, tensor in x.items() if name != HEAD} for x in state_dicts]
    stock, ours = merges(recipe(method, save(tmp_path / "all", tied, tie_word_embeddings=True)))
    assert_same_bits(stock, ours)
    assert HEAD not in ours
    folders = save(tmp_path / "one", state_dicts)
    save_one(tmp_path / "one" / "expert1", tied[2], tie_word_embeddings=True)
    stock, ours = merges(recipe(method, folders))
    assert_same_bits(stock, ours)
    assert HEAD in ours


SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 20}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_embd": 8, "n_head": 2, "n_layer": 3, "vocab_size": 20, "n_positions": 8},
    "OPTForCausalLM": {**SIZES, "ffn_dim": 16, "word_embed_proj_dim": 8, "max_position_embeddings": 8},
    "Qwen2ForCausalLM": {**SIZES, "intermediate_size": 16, "num_key_value_heads": 1},
    "T5ForConditionalGeneration": {
        "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2, "vocab_size": 20,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_in_other_architectures(merges: Merges, tmp_path: Path, architecture: str) -> None:
    transformers = importlib.import_module("transformers")
    of_model = getattr(transformers, architecture)
    folders = [str(tmp_path / name) for name in ("base", "expert0", "expert1")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        model = of_model(of_model.config_class(**ARCHITECTURES[architecture]))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
    assert_same_bits(*merges(recipe("task_arithmetic", folders, [{"weight": [0, 1]}, {"weight": [1, 0.3, 0]}])))


def test_transformers_loads_the_result(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    base, *experts = models(gaussians, torch.float32)
    merge(recipe("ties", save(tmp_path, [base, *experts])), tmp_path / "out", max_shard_bytes=3000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    options = {"method": "ties", "semantics": "mergekit", "density": DENSITIES[:3], "scope": "tensor"}
    merged = merge_state_dicts(base, experts, weights=[entry["weight"] for entry in NUMBERS[:3]], **options)
    expected = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **CONFIG))
    expected.load_state_dict(merged)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        assert_same(logits, expected.eval()(tokens).logits)
    assert logits.isfinite().all()
