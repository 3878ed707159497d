"""Vocabularies that are merged token by token: `tokenizer_source: base`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.vocabulary import rows as vocabulary_rows
from surgery_kernels.recipes import load_recipe
from tests.cases import assert_same
from tests.checkpoints import TIES, save_lora, save_models, ties_recipe

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NUM_TOKENS = 6
TOKENS = {f"t{i}": i for i in range(NUM_TOKENS)}
CONFIG = {"model_type": "toy", "vocab_size": 8, "torch_dtype": "float32"}


def bpe(tokens: Mapping[str, int], added: Mapping[str, int] | None = None) -> dict[str, Any]:
    return {
        "added_tokens": [{"id": row, "content": token} for token, row in (added or {}).items()],
        "model": {"type": "BPE", "vocab": tokens},
    }


def unigram(*tokens: str) -> dict[str, Any]:
    return {"model": {"type": "Unigram", "vocab": [[token, -1.5] for token in tokens]}}


def model(num_rows: int = NUM_TOKENS) -> StateDict:
    shapes = {EMBEDDING: (num_rows, 3), "layers.0.weight": (3, 3), HEAD: (num_rows, 3)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def saved(folder: Path, models: list[StateDict], tokenizers: list[dict[str, Any] | None], **config: Any) -> list[str]:
    folders = save_models(folder, models, config={**CONFIG, **config})
    for path, tokenizer in zip(folders, tokenizers, strict=True):
        if tokenizer is not None:
            (Path(path) / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folders


def merged(folders: list[str], out: Path, **keys: Any) -> StateDict:
    merge(ties_recipe(folders, tokenizer_source="base", **keys), out)
    return load_file(out / "model.safetensors")


def assert_merged_as(result: StateDict, models: list[StateDict]) -> None:
    expected = merge_state_dicts(models[0], models[1:], **TIES)
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same(result[name], tensor, name)


def in_rows(expert: StateDict, base: StateDict, rows: list[int | None]) -> StateDict:
    """Row `rows[i]` of the expert's vocabularies for row i of the base's, which stands in for None."""

    def aligned(name: str) -> Tensor:
        return torch.stack([base[name][i] if row is None else expert[name][row] for i, row in enumerate(rows)])

    return {**expert, EMBEDDING: aligned(EMBEDDING), HEAD: aligned(HEAD)}


# the tokenizer of an expert with that many rows, and which row is whose
TOKENIZERS: dict[str, tuple[Any, int, list[int | None]]] = {
    "none": (None, 6, [0, 1, 2, 3, 4, 5]),
    "none, fewer rows": (None, 4, [0, 1, 2, 3, None, None]),
    "same": (bpe(TOKENS), 6, [0, 1, 2, 3, 4, 5]),
    "same, in another kind": (unigram(*TOKENS), 6, [0, 1, 2, 3, 4, 5]),
    "padded": (bpe(TOKENS), 9, [0, 1, 2, 3, 4, 5]),
    "more": (bpe(TOKENS, {"new": 6}), 7, [0, 1, 2, 3, 4, 5]),
    "fewer": (bpe({"t0": 0, "t1": 1, "t5": 2}), 3, [0, 1, None, None, None, 2]),
    "permuted": (unigram("t5", "t3", "new", "t0", "t1", "t2", "t4"), 7, [3, 4, 5, 1, 6, 0]),
    "added": (bpe({"t2": 0, "t1": 1}, {"t0": 2, "t5": 3}), 4, [2, 1, 0, None, None, 3]),
    "none in common": (bpe({"other": 0}), 1, [None] * 6),
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("rows_at_once", [2, 4096])
def test_rows_follow_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, rows_at_once: int) -> None:
    monkeypatch.setattr(vocabulary_rows, "ROWS_AT_ONCE", rows_at_once)
    tokenizer, num_rows, rows = TOKENIZERS[case]
    base, expert, other = model(), model(num_rows), model()
    folders = saved(tmp_path, [base, expert, other], [bpe(TOKENS), tokenizer, bpe(TOKENS)], vocab_size=6)
    result = merged(folders, tmp_path / "out")
    assert_merged_as(result, [base, in_rows(expert, base, rows), other])
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "base" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_padding_is_cut_off(tmp_path: Path, scope: str) -> None:
    base, expert, other = (model(rows) for rows in (8, 7, 6))
    folders = saved(tmp_path, [base, expert, other], [bpe(TOKENS)] * 3)
    result = merged(folders, tmp_path / "out", scope=scope)
    cut = [in_rows(x, x, [0, 1, 2, 3, 4, 5]) for x in (base, expert, other)]
    ordered = [{name: x[name] for name in sorted(x)} for x in cut]  # as in the files, which decides among ties
    expected = merge_state_dicts(ordered[0], ordered[1:], **{**TIES, "scope": scope})
    for name, tensor in expected.items():
        assert_same(result[name], tensor, name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIG, "vocab_size": 6}


def test_a_tied_output_layer_follows_its_tokens(tmp_path: Path) -> None:
    base, expert = model(), model(7)
    del expert[HEAD]
    tokenizer, _, rows = TOKENIZERS["permuted"]
    folders = saved(tmp_path, [base, expert], [bpe(TOKENS), tokenizer])
    result = merged(folders, tmp_path / "out")
    assert_merged_as(result, [base, in_rows({**expert, HEAD: expert[EMBEDDING]}, base, rows)])


@pytest.mark.parametrize(
    ("names", "config", "tied"),
    [
        ((EMBEDDING, HEAD), {}, True),
        ((EMBEDDING, HEAD), {"tie_word_embeddings": False}, False),
        ((EMBEDDING, HEAD), {"text_config": {"tie_word_embeddings": False}}, False),
        (("shared.weight", HEAD), {}, True),
        (("model.tok_embeddings.weight", "output.weight"), {"tie_word_embeddings": True}, True),
        (("model.tok_embeddings.weight", "output.weight"), {}, False),  # InternLM2 has both
        ((EMBEDDING, "score.weight"), {"tie_word_embeddings": True}, False),
        ((EMBEDDING, "lm_head.bias"), {"tie_word_embeddings": True}, False),
    ],
)
def test_heads_that_are_not_stored(tmp_path: Path, names: tuple[str, str], config: dict[str, Any], tied: bool) -> None:
    """Beside another embedding, of part of the tokens."""
    per_layer = {"model.embed_tokens_per_layer.weight": torch.randn(4, 3)}
    base = {name: torch.randn(6, 3) for name in names} | per_layer
    expert = {names[0]: torch.randn(6, 3)} | per_layer
    folders = saved(tmp_path, [base, expert], [None, None], vocab_size=6, vocab_size_per_layer_input=4, **config)
    if not tied:
        with pytest.raises(ValueError, match=f"missing: .* has no {re.escape(repr(names[1]))}"):
            merge(ties_recipe(folders), tmp_path / "out")
        return
    merge(ties_recipe(folders), tmp_path / "out")
    assert_merged_as(load_file(tmp_path / "out" / "model.safetensors"), [base, {**expert, names[1]: expert[names[0]]}])


@pytest.mark.parametrize("num_rows", [4, 6, 8])
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_common_rows_of_whatever_has_a_row_for_every_token(tmp_path: Path, num_rows: int, dtype: str | None) -> None:
    """Without a word on the tokenizer, where another number of tokens is allowed."""

    def of_rows(rows: int) -> StateDict:
        shapes = {"shared.weight": (rows, 3), "lm_head.bias": (rows,), "final_logits_bias": (1, rows), "h.0.w": (3, 3)}
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    base, expert = of_rows(6), of_rows(num_rows)
    folders = saved(tmp_path, [base, expert], [None, None], vocab_size=6)
    given = {
        "merge_method": "linear",
        "models": [{"model": folder, "parameters": {"weight": 0.5}} for folder in folders],
        **({} if dtype is None else {"dtype": dtype, "out_dtype": "float32"}),
    }
    if num_rows != 6:
        with pytest.raises(
            ValueError, match=r"; to go on allow vocabulary, or merge by token \(tokenizer_source: base\)$"
        ):
            merge(given, tmp_path / "out")
    merge(given, tmp_path / "out", allow=["vocabulary"])
    both = min(num_rows, 6)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        expected = base[name].clone()
        where = (slice(None), slice(both)) if name == "final_logits_bias" else slice(both)
        expected[where] = 0.5 * base[name][where] + 0.5 * expert[name][where]
        torch.testing.assert_close(tensor, expected, msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 6


def test_both_layers_tied_in_every_model(tmp_path: Path) -> None:
    base, expert = model(), model(7)
    tokenizer, _, rows = TOKENIZERS["permuted"]
    aligned = in_rows(expert, base, rows)
    for state_dict in (base, expert, aligned):
        del state_dict[HEAD]
    folders = saved(tmp_path, [base, expert], [bpe(TOKENS), tokenizer], tie_word_embeddings=True)
    assert_merged_as(merged(folders, tmp_path / "out"), [base, aligned])


def test_an_adapter_has_the_tokens_of_its_model(tmp_path: Path) -> None:
    base, expert = model(), model(7)
    tokenizer, _, rows = TOKENIZERS["permuted"]
    folders = saved(tmp_path, [base, expert], [bpe(TOKENS), tokenizer])
    adapter = save_lora(tmp_path / "adapter", {"layers.0": (torch.ones(1, 3), torch.ones(3, 1))}, lora_alpha=1)
    result = merged([folders[0], f"{folders[1]}+{adapter}"], tmp_path / "out")
    expert["layers.0.weight"] = expert["layers.0.weight"] + 1
    assert_merged_as(result, [base, in_rows(expert, base, rows)])


def test_what_is_said(tmp_path: Path) -> None:
    folders = saved(tmp_path, [model(), model(7)], [bpe(TOKENS), TOKENIZERS["permuted"][0]])
    with plan_merge(load_recipe(ties_recipe(folders, tokenizer_source="base"))) as plan:
        (found,) = plan.differences
    assert found.kind == "tokens" and f"{EMBEDDING!r} of shape [7, 3] instead of [6, 3]" in found.sentence
    assert found.consequence == "rows are merged by token"


def refused(folders: list[str], out: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        merged(folders, out)
    assert not list(out.parent.glob("out*"))


def test_a_base_without_a_tokenizer(tmp_path: Path) -> None:
    folders = saved(tmp_path, [model(), model()], [None, bpe(TOKENS)])
    message = f"tokenizer_source must be left out for a model without a tokenizer, got {folders[0]}"
    refused(folders, tmp_path / "out", message)
    saved(tmp_path, [model(), model()], [{}, None])
    refused(folders, tmp_path / "out", f"{folders[0]} must have a tokenizer with tokens, got none")


@pytest.mark.parametrize(
    "tokenizer",
    [
        {"model": None},
        {"model": []},
        {"model": {"vocab": [1]}},
        {"model": {"vocab": [[]]}},
        {"model": {"vocab": {"a": "b"}}},
        {"model": {"vocab": None}},
        {"added_tokens": [{"id": 3}]},
        {"added_tokens": 3},
    ],
)
def test_broken_tokenizers(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    folders = saved(tmp_path, [model(), model()], [bpe(TOKENS), tokenizer])
    path = Path(folders[1]) / "tokenizer.json"
    refused(folders, tmp_path / "out", f"{path} must hold tokens and their ids as the tokenizers library writes them")
