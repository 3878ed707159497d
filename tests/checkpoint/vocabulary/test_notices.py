"""What is said about tokens before a merge begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import save_safetensors
from tests.llama_checkpoints import loaded

pytestmark = pytest.mark.any_isa

TOKENS = {f"t{i}": i for i in range(6)}
MOVED = {f"t{i}": 5 - i for i in range(6)}
EMBEDDING = "model.embed_tokens.weight"


def save(folder: Path, tokens: Mapping[str, int] | None, num_rows: int = 6, **config: Any) -> str:
    config = {"model_type": "llama", "vocab_size": num_rows, **config}
    save_safetensors(folder, {EMBEDDING: torch.randn(num_rows, 3)}, config=config)
    if tokens is not None:
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": tokens, "merges": []}}))
    return str(folder)


def given(*models: str, **keys: Any) -> dict[str, Any]:
    listed = [{"model": model, "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": listed, **keys}


def said(*models: str, **keys: Any) -> list[str]:
    with plan_merge(load_recipe(given(*models, **keys))) as plan:
        return plan.notices


def test_nothing_where_nothing_is_to_be_known(tmp_path: Path) -> None:
    base, same = save(tmp_path / "a", TOKENS), save(tmp_path / "b", dict(reversed(TOKENS.items())))
    more = save(tmp_path / "c", {**TOKENS, "more": 6})
    none = save(tmp_path / "d", None)
    assert said(base, same, more, none) == []
    assert said(none, base) == []
    assert said(base, same, tokenizer_source="base") == []
    assert said(base, same, tokenizer_source="union") == []


def test_rows_that_are_merged_by_their_numbers(tmp_path: Path) -> None:
    base, other = save(tmp_path / "a", TOKENS), save(tmp_path / "b", MOVED)
    assert said(base, other) == [
        f"{other} has other rows than {base} for 't0', 't1', 't2' and 3 more, and rows are merged by their numbers: "
        f"tokenizer_source: base merges them by token"
    ]
    assert said(base, other, tokenizer_source="base") == []
    (tmp_path / "b" / "tokenizer.json").unlink()
    (tmp_path / "b" / "qwen.tiktoken").write_text("")
    assert said(base, other) == [
        f"{other} has another tokenizer than {base}, of a kind that is not read: rows are merged by their numbers"
    ]


def test_tokens_without_rows(tmp_path: Path) -> None:
    more = {**TOKENS, "<pad>": 6, "<x>": 7}
    base, other = save(tmp_path / "a", more), save(tmp_path / "b", more)
    assert said(base, other, tokenizer_source="base") == [
        f"{model} has 6 rows and no row for '<pad>', '<x>', which its tokenizer knows" for model in (base, other)
    ]


def test_numbers_of_rows(tmp_path: Path) -> None:
    base, other = save(tmp_path / "a", TOKENS, 8), save(tmp_path / "b", {**TOKENS, "more": 6}, 7)
    assert said(base, other, tokenizer_source="base") == [f"the result has 6 rows for tokens, {base} has 8"]
    assert said(base, other, tokenizer={"pad_to_multiple_of": 4}) == []
    assert said(other, base, tokenizer={"source": "base", "pad_to_multiple_of": 5}) == [
        f"the result has 10 rows for tokens, 3 of them without a token, {other} has 7"
    ]


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    base, other = save(tmp_path / "a", TOKENS), save(tmp_path / "b", None)
    assert said(base, other, tokenizer_source="union") == [
        f"{other} has no tokenizer: it is taken to have the tokens of {base}"
    ]


def test_ids_in_the_configuration(tmp_path: Path) -> None:
    ids = {"eos_token_id": 0, "pad_token_id": None, "text_config": {"image_token_index": 5}, "bos_token_id": 2}
    base, other = save(tmp_path / "a", TOKENS, **ids), save(tmp_path / "b", {**MOVED, "t2": 2, "t3": 3})
    assert said(base, other, tokenizer_source=other) == [
        "config.json has eos_token_id 0, which was 't0' and is 't5' in the tokenizer of the result",
        "config.json has text_config.image_token_index 5, which was 't5' and is 't0' in the tokenizer of the result",
    ]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_same_tokenizer_need_not_be_read(tmp_path: Path) -> None:
    base, other = save(tmp_path / "a", None), save(tmp_path / "b", None)
    for folder in (base, other):
        (Path(folder) / "qwen.tiktoken").write_text("YQ== 0\n")
    for source in ("base", "union"):
        (notice,) = said(base, other, tokenizer_source=source)
        assert notice.startswith("all models have the same tokenizer, and all rows stay where they are: ")
        assert "must have a tokenizer.json for its tokens to be known, got qwen.tiktoken" in notice
    merge(given(base, other, tokenizer_source="base"), tmp_path / "out")
    assert torch.equal(
        loaded(tmp_path / "out")[EMBEDDING], (loaded(Path(base))[EMBEDDING] + loaded(Path(other))[EMBEDDING]) / 2
    )
    for keys in ({"tokenizer_source": other}, {"tokenizer": {"pad_to_multiple_of": 4}}):
        with pytest.raises(ValueError, match="must have a tokenizer.json for its tokens to be known"):
            said(base, other, **keys)
    (Path(other) / "qwen.tiktoken").write_text("Yg== 0\n")
    with pytest.raises(ValueError, match="must have a tokenizer.json for its tokens to be known"):
        said(base, other, tokenizer_source="base")
