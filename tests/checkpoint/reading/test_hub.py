"""Models of the Hub: what is fetched, and what cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.reading.companions import companions
from surgery_kernels.checkpoint.reading.opening import find_folder, open_checkpoint
from tests.checkpoints import refused, save_lora, save_safetensors, save_torch, state_dict
from tests.hub import Hub, serving

pytestmark = pytest.mark.any_isa


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path / "cache", monkeypatch) as hub:
        yield hub


def check_weights(reference: str, expected: dict[str, torch.Tensor]) -> None:
    source = open_checkpoint(reference)
    assert source.name == reference and source.tensors.keys() == expected.keys()
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in expected.items())
    source.close()


def test_only_the_weights_that_count_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = save_torch(save_safetensors(tmp_path / "a", state_dict()), state_dict(1))
    for name in ("model.fp16.safetensors", "consolidated.safetensors", "onnx/model.onnx", "training_args.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"other weights")
    (folder / "onnx" / "config.json").write_text("{}")
    hub.put("org/some.model-1", folder)
    check_weights("org/some.model-1@main", state_dict())
    assert hub.fetched == {"model.safetensors"}


def test_of_a_model_that_gives_its_tokenizer_no_weights_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = save_safetensors(tmp_path / "a", state_dict(), config={})
    (folder / "tokenizer.json").write_text("{}")
    hub.put("org/a", folder)
    assert (find_folder("org/a") / "tokenizer.json").read_text() == "{}"
    assert not hub.fetched & {"model.safetensors"}
    assert find_folder(str(folder)) == folder


@pytest.mark.parametrize("save", [save_safetensors, save_torch])
def test_shards_are_those_of_the_index(hub: Hub, tmp_path: Path, save: object) -> None:
    folder = save(tmp_path / "a", state_dict(), num_shards=2)  # type: ignore[operator]
    [index] = folder.glob("*.index.json")
    whole = json.loads(index.read_text())["weight_map"]
    renamed = {old: f"part [{number}]{Path(old).suffix}" for number, old in enumerate(sorted(set(whole.values())))}
    for old, new in renamed.items():
        (folder / old).rename(folder / new)
    index.write_text(json.dumps({"weight_map": {name: renamed[file] for name, file in whole.items()}}))
    (folder / f"part [2]{index.suffixes[0]}").write_bytes(b"an old one")
    hub.put("org/a", folder)
    check_weights("org/a", state_dict())
    assert hub.fetched == {index.name, *renamed.values()}


def test_the_same_files_as_from_a_folder(hub: Hub, tmp_path: Path) -> None:
    """Components, what is small, and a word on what stays behind."""
    folder = tmp_path / "a"
    save_safetensors(folder, state_dict(), config={"model_type": "bert"})
    save_safetensors(folder / "2_Dense", {"linear.weight": torch.ones(3, 3)})
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    files = {
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": "{}",
        "modeling_toy.py": "raise SystemExit",
        "toy/__init__.py": "raise SystemExit",
        "qwen.tiktoken": "a",
        "spiece.model": "b",
        "LICENSE": "free",
        "README.md": "---\nlicense: mit\n---\n\n# Toy\n",
        "visual.pt": "other weights",
        "other/model.safetensors": "other weights",
        "other/config.json": "{}",
        "logo.png": "c",
        "voices.dat": "d",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    hub.put("org/a", folder)
    for reference, out in (("org/a", "of_hub"), (str(folder), "of_folder")):
        recipe = {"merge_method": "linear", "models": [{"model": reference, "parameters": {"weight": 1}}]}
        with pytest.warns(
            UserWarning, match=f"^the result goes without these files of {reference}: other/, visual.pt, voices.dat$"
        ):
            merge(recipe, tmp_path / out)
    ours = {path.relative_to(tmp_path / "of_hub") for path in (tmp_path / "of_hub").rglob("*") if path.is_file()}
    theirs = {
        path.relative_to(tmp_path / "of_folder") for path in (tmp_path / "of_folder").rglob("*") if path.is_file()
    }
    assert ours == theirs and {str(path) for path in ours} >= set(files) - {
        *("visual.pt", "other/model.safetensors", "other/config.json", "logo.png", "voices.dat"),
    }
    assert not {"visual.pt", "other/model.safetensors", "logo.png", "voices.dat"} & hub.fetched
    assert "license: mit" in (tmp_path / "of_hub" / "README.md").read_text()


def test_adapters(hub: Hub, tmp_path: Path) -> None:
    base = open_checkpoint(save_safetensors(tmp_path / "base", state_dict()))
    folder = save_lora(tmp_path / "lora", {"layers.0": (torch.ones(2, 6), torch.ones(6, 2))})
    (folder / "optimizer.pt").write_bytes(b"large")
    hub.put("org/lora", folder)
    assert open_checkpoint("org/lora", base=base).changed == {"layers.0.weight"}
    assert hub.fetched == {"adapter_config.json", "adapter_model.safetensors"}


def test_what_is_in_the_cache_does_without_a_network(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("org/a", save_safetensors(tmp_path / "a", state_dict(), num_shards=2, config={}))
    hub.put("org/b", tmp_path / "a")
    check_weights("org/a", state_dict())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_weights("org/a", state_dict())
    message = "reference must be a path or a model of the Hub that can be had, got 'org/b': "
    refused("org/b", message, FileNotFoundError)


def test_a_component_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    """Its files are links, to what the cache keeps beside the model."""
    component = save_safetensors(tmp_path / "a" / "unet", state_dict(), config={"_class_name": "Toy"})
    (tmp_path / "a" / "model_index.json").write_text('{"unet": ["diffusers", "Toy"]}')
    hub.put("org/a", component.parent)
    files = [stamp.path for stamp in open_checkpoint("org/a").files]
    assert files[0].parent.name == "unet" and files[0].is_symlink()
    source = open_checkpoint(files[0].parent)
    assert not source.notices and companions(source).files.keys() == {"config.json"}


def test_a_folder_comes_first(hub: Hub, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "org" / "model", state_dict())
    check_weights("org/model", state_dict())
    assert not hub.fetched


def test_models_that_cannot_be_had(hub: Hub, tmp_path: Path) -> None:
    message = "reference must be a path or a model of the Hub that can be had, got 'org/{0}': "
    none = "there is none of that name, or it is private: then run `hf auth login`"
    refused("org/none", message.format("none") + none, FileNotFoundError)
    hub.put("org/gated", save_safetensors(tmp_path / "gated", state_dict(), config={}))
    hub.gated.add("org/gated")
    way_on = "accept its conditions at https://huggingface.co/org/gated and run `hf auth login`"
    refused("org/gated", message.format("gated") + way_on, FileNotFoundError)
    save_file(state_dict(), tmp_path / "gated" / "model.fp16.safetensors")
    (tmp_path / "gated" / "model.safetensors").rename(tmp_path / "gated" / "model.non_ema.safetensors")
    hub.put("org/two", tmp_path / "gated")
    with pytest.raises(ValueError, match=r" must have one file of weights, got model\.fp16\.safetensors, model\.non"):
        open_checkpoint("org/two")


def test_references_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    for reference in ("nothing", "./nothing/here", "/nothing", "a/b/c", "org/", "../model"):
        message = f"reference must be a path or a model of the Hub, org/name[@revision], got {reference!r}"
        refused(reference, message, FileNotFoundError)
    way_on = (
        ": of a folder within org/model, run `hf download org/model --include 'sub/deep/*' --local-dir model` and name "
        "model/sub/deep"
    )
    for reference in ("org/model/sub/deep", "org/model/sub/deep@main"):
        message = f"reference must be a path or a model of the Hub, org/name[@revision], got {reference!r}{way_on}"
        refused(reference, message, FileNotFoundError)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = "huggingface_hub must be installed for a model of the Hub, got no path 'org/model' here and: "
    refused("org/model", message, ImportError)
