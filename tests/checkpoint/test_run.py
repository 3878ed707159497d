"""Checkpoints against the same merge of state dicts, and what comes out beside the weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from surgery_kernels import merge_state_dicts, ties_merge
from surgery_kernels.checkpoint import memory, merge
from surgery_kernels.checkpoint import plan as plan_module
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.checkpoint.writing.layout import ALIGNMENT
from surgery_kernels.recipes import load_recipe
from tests.cases import assert_same, gaussian, grid, inputs, option_id
from tests.checkpoints import ADDED, save_lora, save_safetensors, save_torch

StateDict = dict[str, Tensor]

SHAPES = {
    "model.embed_tokens.weight": (24, 8),
    "model.layers.0.mlp.weight": (8, 20),
    "model.layers.0.norm.weight": (8,),
    "model.layers.1.mlp.weight": (8, 20),
    "model.layers.1.norm.weight": (8,),
    "scale": (),
    "empty": (0, 3),
    "lm_head.weight": (24, 8),
}
WEIGHTS, DENSITIES = [1.0, 0.5, -0.25], [0.3, 0.55, 1.0]
CONFIG = {"model_type": "toy", "torch_dtype": "float32", "num_hidden_layers": 2, "vocab_size": 24}


def models(data: Any = gaussian, dtype: torch.dtype = torch.float32, num_tasks: int = 3) -> list[StateDict]:
    """The base and the experts."""
    state_dicts: list[StateDict] = [{} for _ in range(1 + num_tasks)]
    for name, shape in SHAPES.items():
        base, experts = inputs(data, shape, num_tasks, dtype)
        for state_dict, tensor in zip(state_dicts, [base, *experts], strict=True):
            state_dict[name] = tensor.clone()
    for state_dict in state_dicts:
        state_dict["position_ids"] = torch.arange(5)
    return state_dicts


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., list[str]]:
    """Folders with models; `save` may differ between them."""

    def save(state_dicts: Sequence[StateDict], how: Any = save_safetensors, **options: Any) -> list[str]:
        names = ["base", *(f"expert{t}" for t in range(len(state_dicts) - 1))]
        options = {"config": CONFIG, **options}
        return [str(how(tmp_path / name, tensors, **options)) for name, tensors in zip(names, state_dicts, strict=True)]

    return save


def recipe(method: str, folders: Sequence[str], **keys: Any) -> dict[str, Any]:
    base, *experts = folders
    entries = [
        {"model": expert, "parameters": {"weight": weight, **({"density": density} if method == "ties" else {})}}
        for expert, weight, density in zip(experts, WEIGHTS, DENSITIES, strict=False)
    ]
    return {
        "merge_method": method,
        **({} if method == "linear" else {"base_model": base}),
        "models": entries,
        **keys,
    }


def loaded(folder: Path) -> StateDict:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    shard_of = json.loads(index.read_text())["weight_map"]
    shards = {shard: load_file(folder / shard) for shard in set(shard_of.values())}
    assert sum(len(shard) for shard in shards.values()) == len(shard_of)
    return {name: shards[shard][name] for name, shard in shard_of.items()}


def assert_same_model(merged: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert merged.keys() == expected.keys()
    for name in expected:
        assert_same(merged[name], expected[name], name)


_MERGEKIT = {"method": "ties", "weights": WEIGHTS, "semantics": "mergekit"}
EXPECTED: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weights": WEIGHTS},
    "ties": {**_MERGEKIT, "density": DENSITIES},
    "task_arithmetic": {**_MERGEKIT, "density": 1, "elect": "none", "normalize": False},
}
SCOPES = [("linear", "tensor"), ("task_arithmetic", "tensor"), ("ties", "tensor"), ("ties", "model")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize(("method", "scope"), SCOPES)
@pytest.mark.parametrize("data", [gaussian, grid], ids=option_id)
def test_same_as_state_dicts(
    saved: Any, tmp_path: Path, method: str, scope: str, dtype: torch.dtype, data: Any
) -> None:
    state_dicts = models(data, dtype)
    merge(recipe(method, saved(state_dicts), scope=scope), tmp_path / "out")
    # the files hold tensors in the order of their names, which decides among ties of the whole model
    base, *experts = (dict(sorted(state_dict.items())) for state_dict in state_dicts)
    with plan_merge(load_recipe(recipe(method, saved(state_dicts), scope=scope))) as plan:
        base = {step.name: base[step.name] for step in plan.steps}
    assert_same_model(loaded(tmp_path / "out"), merge_state_dicts(base, experts, scope=scope, **EXPECTED[method]))


@pytest.mark.any_isa
def test_parameters_by_tensor(saved: Any, tmp_path: Path) -> None:
    state_dicts = models()
    given = recipe("ties", saved(state_dicts))
    given["models"][0]["parameters"] = {
        "density": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}],
        "weight": [0.0, 2.0],
    }
    given["parameters"] = {"lambda": 0.5, "normalize": [{"filter": "norm", "value": False}, {"value": True}]}
    merge(given, tmp_path / "out")
    base, *experts = state_dicts
    for name, density, weight, normalize in [
        ("model.layers.0.mlp.weight", 0.2, 0.0, True),
        ("model.layers.1.mlp.weight", 0.8, 2.0, True),
        ("model.layers.1.norm.weight", 0.5, 2.0, False),
        ("lm_head.weight", 0.5, 0.0, True),
    ]:
        expected = ties_merge(
            base[name],
            [expert[name] for expert in experts],
            density=[density, *DENSITIES[1:]],
            weights=[weight, *WEIGHTS[1:]],
            lam=0.5,
            normalize=normalize,
            semantics="mergekit",
        )
        assert_same(loaded(tmp_path / "out")[name], expected, name)


@pytest.mark.any_isa
def test_an_expert_of_density_0_takes_no_part(saved: Any, tmp_path: Path) -> None:
    base, *experts = models()
    given = recipe("ties", saved([base, *experts]))
    given["models"][1]["parameters"]["density"] = [{"filter": "mlp", "value": 0}, {"value": 0.55}]
    for entry in given["models"]:
        entry["parameters"]["density"] = [{"filter": "norm", "value": 0}, *_as_list(entry["parameters"]["density"])]
    merge(given, tmp_path / "out")
    merged = loaded(tmp_path / "out")
    assert_same(merged["model.layers.0.norm.weight"], base["model.layers.0.norm.weight"])
    name = "model.layers.1.mlp.weight"
    rest = ties_merge(
        base[name],
        [experts[0][name], experts[2][name]],
        density=[0.3, 1.0],
        weights=[1.0, -0.25],
        semantics="mergekit",
    )
    assert_same(merged[name], rest)


def _as_list(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [{"value": setting}]


@pytest.mark.any_isa
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_same_from_every_layout(saved: Any, tmp_path: Path, scope: str) -> None:
    state_dicts = models()
    base, *experts = saved(state_dicts)
    merge(recipe("ties", [base, *experts], scope=scope), tmp_path / "expected")
    save_safetensors(tmp_path / "sharded", state_dicts[1], num_shards=3)
    save_torch(tmp_path / "pickled", state_dicts[2], num_shards=2)
    layouts = [str(tmp_path / "sharded"), str(tmp_path / "pickled"), str(tmp_path / "expert2" / "model.safetensors")]
    merge(recipe("ties", [base, *layouts], scope=scope), tmp_path / "out")
    assert_same_model(loaded(tmp_path / "out"), loaded(tmp_path / "expected"))


@pytest.mark.any_isa
@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_adapters_as_experts(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, in_memory: int
) -> None:
    monkeypatch.setattr(memory, "IN_MEMORY_BYTES", in_memory)
    base, expert = models(num_tasks=1)
    folders = saved([base, expert])
    module = "model.layers.1.mlp"
    down, up = torch.randn(2, 20), torch.randn(8, 2)
    adapter = save_lora(tmp_path / "adapter", {module: (down, up)}, r=2, lora_alpha=4)
    merge(recipe("ties", [*folders, str(adapter)], scope=scope), tmp_path / "out")
    with_adapter = {**base, f"{module}.weight": base[f"{module}.weight"] + 2.0 * (up @ down)}
    merge(
        recipe("ties", [*folders, str(save_safetensors(tmp_path / "dense", with_adapter))], scope=scope),
        tmp_path / "expected",
    )
    merged, expected = loaded(tmp_path / "out"), loaded(tmp_path / "expected")
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("of_recipe", "given", "of_adapter"),
    [
        (None, None, "bfloat16"),
        ("float32", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        (None, "float32", "float32"),
    ],
)
def test_the_dtype_of_adapters(
    saved: Any, tmp_path: Path, of_recipe: str | None, given: str | None, of_adapter: str
) -> None:
    """That of the recipe, unless another is asked for: what they change is rounded once."""
    (base,) = models(dtype=torch.bfloat16, num_tasks=0)
    (folder,) = saved([base])
    module = "model.layers.1.mlp"
    down, up = torch.randint(-8, 9, (2, 20)).float(), torch.randint(-8, 9, (8, 2)).float()
    adapter = save_lora(tmp_path / "adapter", {module: (down, up)}, r=2, lora_alpha=2)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{folder}+{adapter}"}], "dtype": of_recipe}
    merge(recipe, tmp_path / "out", lora_merge_dtype=given)
    merged = loaded(tmp_path / "out")
    name = f"{module}.weight"
    expected = (base[name].double() + (up @ down).double()).to(getattr(torch, of_adapter))
    written = getattr(torch, of_recipe or of_adapter)
    assert_same(merged[name], expected.to(written))
    assert_same(merged["lm_head.weight"], base["lm_head.weight"].to(getattr(torch, of_recipe or "bfloat16")))
    with pytest.raises(ValueError, match="lora_merge_dtype must be one of 'float64', .*, got 'int8'"):
        merge(recipe, tmp_path / "wrong", lora_merge_dtype="int8")


@pytest.mark.any_isa
def test_every_checkpoint_is_opened_and_closed_once(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is only named as what is below an adapter, and one that is also an expert itself."""
    opened: list[str] = []

    def open_and_count(reference: str, **options: Any) -> Any:
        opened.append(reference)
        return open_checkpoint(reference, **options)

    monkeypatch.setattr(plan_module, "open_checkpoint", open_and_count)
    base, first, second = saved(models(num_tasks=2))
    adapter = save_lora(tmp_path / "adapter", {"model.layers.1.mlp": (torch.randn(2, 20), torch.randn(8, 2))})
    files = len(os.listdir("/dev/fd"))
    plan = plan_merge(load_recipe(recipe("ties", [base, f"{first}+{adapter}", f"{second}+{adapter}", second])))
    assert sorted(opened) == sorted([base, first, second, str(adapter), str(adapter)])
    for source in plan.sources.values():
        for name in source.tensors:
            source.tensor(name)
    assert len(os.listdir("/dev/fd")) == files + 5
    plan.close()
    assert len(os.listdir("/dev/fd")) == files


@pytest.mark.any_isa
def test_bytes_to_read(saved: Any) -> None:
    """Whole-model thresholds need a read of their own, of what is merged."""
    folders = saved(models())
    nbytes = {}
    for scope in ("tensor", "model"):
        with plan_merge(load_recipe(recipe("ties", folders, scope=scope))) as plan:
            nbytes[scope] = plan.nbytes_read
    copied = 5 * 8
    merged = 4 * 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert nbytes == {"tensor": merged + copied, "model": 2 * merged + copied}


@pytest.mark.any_isa
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_dtypes(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(memory, "IN_MEMORY_BYTES", in_memory)
    state_dicts = models(dtype=torch.bfloat16)
    folders = saved(state_dicts, config={**CONFIG, "torch_dtype": "bfloat16"})
    merge(recipe("ties", folders, dtype="float32", out_dtype="float16"), tmp_path / "out")
    base, *experts = ({name: cast(x, torch.float32) for name, x in d.items()} for d in state_dicts)
    expected = merge_state_dicts(base, experts, scope="tensor", **EXPECTED["ties"])
    assert_same_model(loaded(tmp_path / "out"), {name: cast(x, torch.float16) for name, x in expected.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.any_isa
def test_models_of_several_dtypes_meet_in_the_wider_one(saved: Any, tmp_path: Path) -> None:
    base, *experts = models(dtype=torch.bfloat16)
    experts[1] = {name: cast(x, torch.float32) for name, x in experts[1].items()}
    merge(recipe("task_arithmetic", saved([base, *experts])), tmp_path / "out")
    wide = [{name: cast(x, torch.float32) for name, x in d.items()} for d in (base, *experts)]
    expected = merge_state_dicts(wide[0], wide[1:], scope="tensor", **EXPECTED["task_arithmetic"])
    assert_same_model(loaded(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@pytest.mark.any_isa
def test_linear_sums_a_base_that_is_not_listed(saved: Any, tmp_path: Path) -> None:
    base, *experts = models()
    folders = saved([base, *experts])
    given = recipe("linear", folders, base_model=folders[0], parameters={"weight": 0.75, "normalize": False})
    merge(given, tmp_path / "out")
    expected = merge_state_dicts(base, [*experts, base], method="linear", weights=[*WEIGHTS, 0.75], normalize=False)
    assert_same_model(loaded(tmp_path / "out"), expected)


@pytest.mark.any_isa
@pytest.mark.parametrize("threads", [1, 2])
def test_shards(saved: Any, tmp_path: Path, threads: int, restored_threads: None) -> None:
    state_dicts = models()
    given = recipe("ties", saved(state_dicts), scope="model")
    merge(given, tmp_path / "whole")
    merge(given, tmp_path / "shards", max_shard_bytes=1000, threads=threads)
    assert_same_model(loaded(tmp_path / "shards"), loaded(tmp_path / "whole"))
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in loaded(tmp_path / "whole").values())
    for name, info in open_checkpoint(tmp_path / "whole").tensors.items():
        assert info.offset % info.dtype.itemsize == 0, name
    header = (tmp_path / "whole" / "model.safetensors").read_bytes()[:8]
    assert (8 + int.from_bytes(header, "little")) % ALIGNMENT == 0


@pytest.mark.any_isa
def test_companions(saved: Any, tmp_path: Path) -> None:
    folders = saved(models())
    files = {
        "generation_config.json": b'{"do_sample": true}',
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
    }
    for name, content in files.items():
        (tmp_path / "base" / name).write_bytes(content)
    (tmp_path / "base" / "README.md").write_text("the base's own card")
    (tmp_path / "base" / "training_args.bin").write_bytes(b"private")
    path = tmp_path / "recipe.yml"
    path.write_text(f"# by hand\n{json.dumps(recipe('ties', folders))}\n")
    merge(path, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*files, "config.json", "model.safetensors", *ADDED}
    for name, content in files.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("# out\n", "# by hand", *folders, "surgery_kernels 0", f"torch {torch.__version__}", "- merge\n"):
        assert part in card


@pytest.mark.any_isa
def test_companions_of_a_model_with_an_adapter(saved: Any, tmp_path: Path) -> None:
    """Those of the model, of which the merge is one again."""
    folders = saved(models(num_tasks=1))
    (tmp_path / "base" / "tokenizer.json").write_bytes(b"{}")
    factors = {"model.layers.1.mlp": (torch.randn(2, 20), torch.randn(8, 2))}
    adapters = [f"{folders[0]}+{save_lora(tmp_path / name, factors)}" for name in ("a", "b")]
    merge(recipe("linear", ["", *adapters]), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors", *ADDED}


@pytest.mark.any_isa
def test_a_plain_file_has_no_companions(saved: Any, tmp_path: Path) -> None:
    files = [f"{folder}/model.safetensors" for folder in saved(models(), config=None)]
    merge(recipe("linear", files), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", *ADDED}


@pytest.mark.any_isa
def test_the_same_bytes_every_time(saved: Any, tmp_path: Path) -> None:
    given = recipe("ties", saved(models(grid)), scope="model")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        merge(given, tmp_path / folder / "out")
    for path in (tmp_path / "a" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "out" / path.name).read_bytes()
