"""The tokenizer of a result, as transformers reads it, and the rows that it finds for its tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.recipes import parse_recipe
from tests.llama_checkpoints import EMBEDDING, Merges, StateDict, assert_same_bits, llama_shapes, loaded, save_one

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore::UserWarning")]
transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

WORDS = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(3, 24))]


def save_model(folder: Path, num_rows: int, added: Sequence[str] = (), words: Sequence[str] = WORDS) -> str:
    """A Llama, and a tokenizer of its own class."""
    save_one(folder, {name: torch.randn(shape) for name, shape in llama_shapes(num_rows).items()})
    model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    tokenizer = transformers.LlamaTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return save_model(tmp_path / "base", 24)


@pytest.fixture
def chat(tmp_path: Path) -> str:
    """Has two tokens more."""
    return save_model(tmp_path / "chat", 26, ["<|im_start|>", "<|im_end|>"])


@pytest.fixture
def short(tmp_path: Path) -> str:
    """Knows four tokens more than it has rows."""
    return save_model(tmp_path / "short", 24, [f"<unused{i}>" for i in range(4)])


def linear(models: Sequence[str], **keys: Any) -> dict[str, Any]:
    listed = [{"model": model, "parameters": {"weight": 1.0}} for model in models]
    return {"merge_method": "linear", "models": listed, "base_model": models[0], "dtype": "float32", **keys}


def of_token(folder: Path | str, token: str | int) -> Tensor:
    row = (
        transformers.LlamaTokenizerFast.from_pretrained(folder).get_vocab()[token] if isinstance(token, str) else token
    )
    return loaded(Path(folder))[EMBEDDING][row]


def tokens_of(folder: Path) -> set[str]:
    tokenizer = transformers.LlamaTokenizerFast.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert len(loaded(folder)[EMBEDDING]) == config.vocab_size
    assert config.vocab_size == len(tokenizer.get_vocab())
    return set(tokenizer.get_vocab())


def test_that_of_the_base(tmp_path: Path, base: str, chat: str, short: str) -> None:
    merge(linear([base, short, chat], tokenizer_source="base"), tmp_path / "out")
    assert tokens_of(tmp_path / "out") == set(WORDS)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (Path(base) / file).read_bytes()


def test_that_of_all_models(tmp_path: Path, base: str, chat: str, short: str) -> None:
    merge(linear([base, short, chat], tokenizer_source="union"), tmp_path / "out")
    assert tokens_of(tmp_path / "out") == {*WORDS, "<|im_start|>", "<|im_end|>"}
    for token in ("<|im_start|>", "<|im_end|>"):
        torch.testing.assert_close(of_token(tmp_path / "out", token), of_token(chat, token))
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        read("word3<|im_start|>word4").input_ids
        == transformers.AutoTokenizer.from_pretrained(chat)("word3<|im_start|>word4").input_ids
    )


def test_that_of_a_model(tmp_path: Path, base: str, chat: str, short: str) -> None:
    merge(linear([base, short, chat], tokenizer_source=chat), tmp_path / "out")
    assert tokens_of(tmp_path / "out") == {*WORDS, "<|im_start|>", "<|im_end|>"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (Path(chat) / "tokenizer.json").read_bytes()


def test_that_of_a_model_that_is_not_merged(tmp_path: Path, base: str, chat: str, short: str) -> None:
    merge(linear([base, short], tokenizer_source=chat), tmp_path / "out")
    assert tokens_of(tmp_path / "out") == {*WORDS, "<|im_start|>", "<|im_end|>"}
    assert (of_token(tmp_path / "out", "<|im_end|>") == 0).all()


def test_none_means_that_of_the_donor(tmp_path: Path, base: str, short: str) -> None:
    merge(linear([base, short]), tmp_path / "out")
    assert tokens_of(tmp_path / "out") == set(WORDS)


def test_files_that_cannot_be_changed_keep_tokens_without_rows(tmp_path: Path, base: str, chat: str) -> None:
    for file in Path(base).glob("*token*"):
        file.unlink()
    (Path(base) / "vocab.txt").write_text("\n".join([*WORDS, "one more"]))
    (Path(base) / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    merge(linear([base, chat], tokenizer_source="base"), tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (Path(base) / "vocab.txt").read_bytes()
    expected = (loaded(Path(base))[EMBEDDING] + loaded(Path(chat))[EMBEDDING][:24]) / 2
    torch.testing.assert_close(loaded(tmp_path / "out")[EMBEDDING], expected)
    with pytest.raises(ValueError, match=f"^{base} must have a tokenizer.json for its tokens to be changed, got none"):
        merge(linear([base, chat], tokenizer_source="union"), tmp_path / "union")


def test_slerp(tmp_path: Path, base: str, chat: str) -> None:
    given = linear([base, chat], tokenizer_source="union", merge_method="slerp", parameters={"t": 0.5})
    for entry in given["models"]:
        del entry["parameters"]
    merge(given, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == {*WORDS, "<|im_start|>", "<|im_end|>"}


def test_rows_that_the_recipe_names(tmp_path: Path, base: str, chat: str) -> None:
    """Against mergekit too, bit for bit, in `test_mergekit.py`."""
    tokens = {
        "word10": {"source": chat, "force": True},
        "word11": {"source": base, "force": True},
        "word12": {"source": {"kind": "model_token", "model": chat, "token_id": 24}, "force": True},
        "word13": {"source": {"kind": "model_token", "model": base, "token": "<s>"}, "force": True},
        "word14": {"source": {"kind": "zero"}, "force": True},
        "word15": {"source": chat},
        "<|im_end|>": {"source": {"kind": "model_token", "model": base, "token": "</s>"}},
        "<new>": {"source": {"kind": "model_token", "model": chat, "token": "<|im_end|>"}},
        "<none>": {},
    }
    out = tmp_path / "out"
    merge(linear([base, chat], tokenizer={"source": "union", "tokens": tokens}), out)
    assert tokens_of(out) == {*WORDS, "<|im_start|>", "<|im_end|>", "<new>", "<none>"}
    expected = {
        "word10": of_token(chat, "word10"),
        "word11": of_token(base, "word11"),
        "word12": of_token(chat, 24),
        "word13": of_token(base, "<s>"),
        "word14": torch.zeros(8),
        "word15": (of_token(base, "word15") + of_token(chat, "word15")) / 2,
        "<|im_end|>": (of_token(base, "</s>") + of_token(chat, "<|im_end|>")) / 2,
        "<new>": of_token(chat, "<|im_end|>"),
        "<none>": torch.zeros(8),
    }
    for token, row in expected.items():
        torch.testing.assert_close(of_token(out, token), row, msg=token)


def test_padding(tmp_path: Path, chat: str) -> None:
    merge(linear([chat], tokenizer={"source": "base", "pad_to_multiple_of": 16}), tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").vocab_size == 32
    assert len(transformers.LlamaTokenizerFast.from_pretrained(tmp_path / "out").get_vocab()) == 26
    embedding = loaded(tmp_path / "out")[EMBEDDING]
    assert len(embedding) == 32
    torch.testing.assert_close(embedding[26:], embedding[:26].mean(0).expand(6, -1))


TOKENS = [
    {"word10": {"source": 1, "force": True}, "word11": {"source": 0, "force": True}},
    {"<|im_end|>": {"source": {"kind": "zero"}}, "word3": {"source": {"kind": "zero"}, "force": True}},
    {"<|im_end|>": {"source": {"kind": "model_token", "model": 0, "token": "</s>"}}},
    {"<|im_end|>": {"source": {"kind": "model_token", "model": 1, "token_id": 3}, "force": True}},
    {"<new>": {"source": {"kind": "model_token", "model": 1, "token_id": 25}, "force": False}, "word9": {"source": 0}},
]


@pytest.mark.parametrize(
    ("tokens", "source"),  # mergekit cannot add tokens to "base"
    [(TOKENS[0], "base"), *((tokens, source) for tokens in TOKENS for source in ("union", 1))],
)
def test_rows_are_mergekits(merges: Merges, tmp_path: Path, base: str, chat: str, tokens: Any, source: Any) -> None:
    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) if key in ("source", "model") else inner for key, inner in value.items()}
        return [base, chat][value] if isinstance(value, int) else value

    of_tokens = {token: {**row, "source": named(row["source"])} for token, row in tokens.items()}
    settings = {"source": named(source), "tokens": of_tokens, "pad_to_multiple_of": 8}
    stock, ours = merges(linear([base, chat], tokenizer=settings))
    assert_same_bits(stock, ours)


def test_slices_take_rows_from_the_first_and_the_last(merges: Merges, tmp_path: Path, base: str, chat: str) -> None:
    """Embeddings are those of the first slice's models, the output layer's those of the last's."""
    given = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "base_model": base,
        "slices": [
            {"sources": [{"model": base, "layer_range": [0, 2]}]},
            {"sources": [{"model": chat, "layer_range": [1, 3]}]},
        ],
        "tokenizer_source": "union",
    }
    stock, ours = (dict(sorted(x.items())) for x in merges(given))
    assert_same_bits(stock, ours)
    rows: StateDict = {name: tensor[-1] for name, tensor in ours.items() if len(tensor) == 26}
    assert (rows[EMBEDDING] == 0).all() and (rows["lm_head.weight"] != 0).any()


def test_errors(tmp_path: Path, base: str, chat: str) -> None:
    def refused(message: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            plan_merge(parse_recipe(json.dumps(linear([base, chat], tokenizer=settings))))

    from_a_model = r"^recipe.tokenizer.tokens must take the row of 'x' from "
    refused(from_a_model + r"a model that is merged into '.*', got other$", tokens={"x": {"source": "other"}})
    refused(from_a_model + rf"a token that {chat} has in '.*', got 'x'$", tokens={"x": {"source": chat}})
    for token, got in (({"token": "y"}, "'y'"), ({"token_id": 26}, "26"), ({"token_id": -1}, "-1")):
        source = {"kind": "model_token", "model": chat, **token}
        refused(from_a_model + rf"a token that {chat} has in '.*', got {got}$", tokens={"x": {"source": source}})
    (Path(chat) / "tokenizer.json").unlink()
    refused(rf"^{chat} must have a tokenizer.json for its tokens to be known, got no vocabulary of the class Llama")
    for file in Path(chat).glob("*token*"):
        file.unlink()
    refused(f"^recipe.tokenizer.source must be a model with a tokenizer, got {chat}$", source=chat)
