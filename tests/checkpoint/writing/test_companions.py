"""What comes along with the weights, what does not, and the card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.reading import companions
from tests.checkpoints import ADDED, files_in, refused, save_lora, save_safetensors, save_torch, state_dict

pytestmark = pytest.mark.any_isa


def copied(model: Path | str, out: Path) -> dict[str, bytes]:
    """What a merge of nothing but `model` writes, besides the weights and the card."""
    merge({"merge_method": "linear", "models": [{"model": str(model), "parameters": {"weight": 1}}]}, out)
    return {name: data for name, data in files_in(out).items() if not name.endswith((".safetensors", *ADDED))}


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of {name}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_safetensors(tmp_path / "model", state_dict())


def test_everything_small_comes_along(folder: Path, tmp_path: Path) -> None:
    names = (
        *("generation_config.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"),
        *("spm.model", "source.spm", "qwen.tiktoken", "tekken.json", "bpe.codes", "chat_template.jinja", "merges.bpe"),
        *("preprocessor_config.json", "video_preprocessor_config.json", "mel_filters.npz", "additional/chat.jinja"),
        *("modeling_toy.py", "toy/__init__.py", "toy/deep/kernel.cu", "requirements.txt", "config_of_mine.yaml"),
        *("sentence_bert_config.json", "LICENSE", "LICENSE-MODEL.txt", "NOTICE", "USE_POLICY.md", "legal/COPYING"),
    )
    write(folder, *names)
    assert copied(folder, tmp_path / "out") == {name: f"of {name}".encode() for name in names}


def test_what_stays_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "MAX_BYTES", 100)
    write(folder, "vocab.txt", *(f"of_training/{name}" for name in ("optimizer.pt", "config.json")))
    # without a word: other forms of the same weights, states of the training, hidden and decoration
    write(folder, "consolidated.safetensors", "model.fp16.safetensors", "tf_model.h5", "training_args.bin", "logo.png")
    write(folder, "trainer_state.json", "runs/events.txt", "__pycache__/a.py", ".git/config.txt", "checkpoint-5/a.json")
    write(folder, "onnx/model.onnx", "onnx/config.json", "original/params.json", "model.safetensors.index.json.old")
    # with a word
    write(folder, "visual.pt", "voices.dat", "other/model.safetensors", "other/tokenizer.json")
    (folder / "corpus.txt").write_text("a" * 101)
    (folder / "data").symlink_to(tmp_path)
    left = "corpus.txt, model.safetensors.index.json.old, of_training/, other/, visual.pt, voices.dat, data/"
    with pytest.warns(UserWarning, match=f"^the result goes without these files of {folder}: {left}$"):
        assert copied(folder, tmp_path / "out").keys() == {"vocab.txt"}


def test_an_index_is_not_copied(tmp_path: Path) -> None:
    folder = save_torch(tmp_path / "model", state_dict(), num_shards=2, config={})
    write(folder, "model.safetensors.index.fp16.json")
    assert copied(folder, tmp_path / "out").keys() == {"config.json"}


def test_custom_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_toy.Toy"}}))
    (folder / "modeling_toy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert copied(folder, tmp_path / "out").keys() == {"config.json", "modeling_toy.py"}
    assert not (tmp_path / "ran").exists()


def test_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("private")
    write(folder, "real.json")
    (folder / "inside.json").symlink_to("real.json")
    assert copied(folder, tmp_path / "out")["inside.json"] == b"of real.json"
    (tmp_path / "linked").symlink_to(folder)
    assert copied(tmp_path / "linked", tmp_path / "again").keys() == {"real.json", "inside.json"}
    link = folder / "tokenizer.json"
    link.symlink_to("../secret.json")
    message = (
        f"{link} must lie in its folder, got a link to {tmp_path / 'secret.json'}: put a copy in its place, or remove"
    )
    with pytest.raises(ValueError, match=f"^{message} it$"):
        copied(folder, tmp_path / "refused")
    assert not list(tmp_path.glob("refused*"))


def test_linked_weights_are_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    os.rename(folder / "model.safetensors", tmp_path / "large" / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "large" / "weights")
    with pytest.warns(UserWarning, match=f"^{folder}/model.safetensors is read at {tmp_path}/large/weights$"):
        copied(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    refused(folder, f"{folder / 'model.safetensors'} must be a file, got none", FileNotFoundError)


def test_of_an_adapter_the_files_of_its_base(folder: Path, tmp_path: Path) -> None:
    write(folder, "tokenizer.json")
    lora = save_lora(tmp_path / "lora", {"layers.0": (torch.ones(2, 6), torch.ones(6, 2))})
    write(lora, "tokenizer_config.json")
    assert copied(f"{folder}+{lora}", tmp_path / "out").keys() == {"tokenizer.json"}


def card(out: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_keeps_licence_and_text_of_the_donor(folder: Path, tmp_path: Path) -> None:
    other = save_safetensors(tmp_path / "other", state_dict(1))
    (other / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\nnot the donor\n")
    about = {
        "license": "other",
        "license_name": "toy-licence",
        "license_link": "LICENSE",
        "language": ["en", "日本語"],
        "pipeline_tag": "text-generation",
        "library_name": "diffusers",
        "tags": ["toy", "merge"],
        "base_model": "org/older",
        "model-index": [{"name": "a score"}],
    }
    text = "# Toy\n\n---\n\nA model.\n"
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(about, allow_unicode=True)}---\n{text}", encoding="utf-8")
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in (folder, other)]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    found, written = card(tmp_path / "out")
    del about["model-index"]
    assert found == {
        **about,
        "base_model": [str(folder), str(other)],
        "tags": ["toy", "merge", "surgery-kernels"],
    }
    assert f"- {folder} (license: toy-licence)\n- {other} (license: mit, apache-2.0)\n" in written
    assert written.endswith(
        f"The other files are those of {folder}, whose card follows; it is not about the merge.\n\n{text}"
    )
    assert "not the donor" not in written


@pytest.mark.parametrize(
    "text", ["no head", "---\nlicense: [\n---\ntext", "---\n- a list\n---\ntext", "---\nlicense: mit\n"]
)
def test_cards_that_are_not_as_the_hub_wants_them(folder: Path, tmp_path: Path, text: str) -> None:
    (folder / "README.md").write_text(text)
    copied(folder, tmp_path / "out")
    found, written = card(tmp_path / "out")
    assert found == {"base_model": [str(folder)], "library_name": "safetensors", "tags": ["merge", "surgery-kernels"]}
    assert written.endswith(f"\n\n{text.strip()}\n")
