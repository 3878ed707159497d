"""Chat templates of results, as transformers renders them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.vocabulary import chat_templates
from tests.checkpoints import save_safetensors

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore::UserWarning")]
transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye"},
]
OURS = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi!\n\n### Instruction:\nBye\n\n",
        "### Response:\n",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi![|endofturn|]\n[|user|]Bye\n",
        "[|assistant|]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": ("<s>[INST] Be brief.\n\nHello [/INST] Hi!</s>[INST] Bye [/INST]", ""),
}
LONG = "{% for message in messages %}{{ message.content }}{% endfor %}{# " + 300 * "x" + " #}"


def save(folder: Path, template: Any = None, file: str = "tokenizer_config.json") -> str:
    config = {"model_type": "llama", "vocab_size": 3}
    save_safetensors(folder, {"embed_tokens.weight": torch.randn(3, 4)}, config=config)
    model = {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None and file == "tokenizer_config.json":
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None and file != "tokenizer_config.json":
        (folder / file).write_text(template)
    return str(folder)


def merged(models: list[str], out: Path, **keys: Any) -> Any:
    """The tokenizer of a merge."""
    listed = [{"model": model, "parameters": {"weight": 1}} for model in models]
    merge({"merge_method": "linear", "models": listed, "base_model": models[0], **keys}, out)
    return transformers.AutoTokenizer.from_pretrained(out)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", LONG, "{{ a_template_in\n_lines }}"])
def test_a_text(tmp_path: Path, template: str) -> None:
    base, other = save(tmp_path / "base", "{{ 'another' }}"), save(tmp_path / "other")
    assert merged([base, other], tmp_path / "out", chat_template=template).chat_template == template
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {"chat_template.jinja", "tokenizer.json", "config.json"} <= files


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("has_mergekit", [True, False])
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, has_mergekit: bool) -> None:
    if not has_mergekit:
        monkeypatch.setattr(chat_templates, "find_spec", lambda _: None)
    elif importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed")
    tokenizer = merged([save(tmp_path / "base")], tmp_path / "out", chat_template=name)
    if has_mergekit:
        package = Path(importlib.util.find_spec("mergekit").submodule_search_locations[0])
        stock = (package / "_data" / "chat_templates" / f"{name}.jinja").read_text()
        assert tokenizer.chat_template == stock
        return
    for ahead in (False, True):
        text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=ahead)
        assert text == OURS[name][0] + ahead * OURS[name][1]


A, B = "{{ 'a template' }}", "{{ 'b template' }}"


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ([A, B, B], B),
        ([A, B, None], A),  # as frequent: the first counts
        ([None, B, A], B),
        ([A, f" {B}\n", B], B),
        ([None, None, B], B),
        ([None, [{"name": "tool", "template": A}, {"name": "default", "template": B}], None], B),
        ([None, None, None], None),
    ],
)
@pytest.mark.parametrize("source", [None, "base", "union"])
def test_the_most_frequent(tmp_path: Path, templates: list[Any], expected: str | None, source: str | None) -> None:
    models = [save(tmp_path / str(i), template) for i, template in enumerate(templates)]
    keys = {} if source is None else {"tokenizer_source": source}
    assert merged(models, tmp_path / "out", chat_template="auto", **keys).chat_template == expected


def test_a_file_goes_before_the_settings(tmp_path: Path) -> None:
    models = [save(tmp_path / "a", A), save(tmp_path / "b", B, "chat_template.jinja"), save(tmp_path / "c", B)]
    assert merged(models, tmp_path / "out", chat_template="auto").chat_template == B
    (tmp_path / "c" / "chat_template.jinja").write_text(A)
    assert merged(models, tmp_path / "again", chat_template="auto").chat_template == A


@pytest.mark.parametrize("wrong", ["chatlm", "{{ x }}", "no template at all, and long"])
def test_what_is_no_template(tmp_path: Path, wrong: str) -> None:
    message = (
        "^recipe.chat_template must be auto, one of alpaca, chatml, exaone, llama3, mistral, or a template, got "
        f"{wrong!r}$"
    )
    with pytest.raises(ValueError, match=message):
        merged([save(tmp_path / "base")], tmp_path / "out", chat_template=wrong)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    for file in Path(base).glob("tokenizer*"):
        file.unlink()
    message = f"^recipe.chat_template must be left out for a model without a tokenizer, got {base}$"
    with pytest.raises(ValueError, match=message):
        merged([base], tmp_path / "out", chat_template="chatml")
