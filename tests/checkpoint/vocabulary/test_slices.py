"""Tokens in slices: of models with other vocabularies, in mergekit's merge and in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.vocabulary.test_mergekit import assert_same_rows, save_donors, vocabularies
from tests.llama_checkpoints import LAYERS, Merges, gaussians, written

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore")]

SLICES: dict[str, tuple[str, list[list[tuple[int, int, int]]], dict[str, Any]]] = {
    # method, for every slice the number of the model and the layers, settings
    "a slice of whole models": ("task_arithmetic", [[(0, 0, LAYERS), (1, 0, LAYERS)]], {"weight": [0.25, 0.75]}),
    "layers of several": ("task_arithmetic", [[(0, 0, 2), (1, 1, 3)], [(0, 2, 3), (2, 0, 1)]], {"weight": 0.5}),
    "a frankenmerge": ("passthrough", [[(1, 0, 2)], [(0, 0, 1)], [(2, 1, 3)]], {}),
    "without the base": ("linear", [[(2, 0, 2), (1, 0, 2)], [(1, 1, 3), (2, 1, 3)]], {"weight": [1, 0.5]}),
}


# the union of two that add tokens is left out: mergekit takes them in the order of a set of Python
TOKENIZERS = [
    ("one adds", "union"),
    ("one adds", "one of them"),
    ("others lack", "base"),
    ("others lack", "union"),
    ("words of their own", "one of them"),
]


@pytest.mark.parametrize(("donors", "source"), TOKENIZERS)
@pytest.mark.parametrize("sliced", SLICES)
def test_as_mergekit(merges: Merges, tmp_path: Path, sliced: str, donors: str, source: str) -> None:
    folders = save_donors(tmp_path, gaussians, torch.float32, donors)
    method, slices, parameters = SLICES[sliced]
    given = {
        "merge_method": method,
        "base_model": folders[0],
        "slices": [
            {"sources": [{"model": folders[model], "layer_range": [first, end]} for model, first, end in sources]}
            for sources in slices
        ],
        "parameters": parameters,
        "tokenizer_source": folders[1] if source == "one of them" else source,
    }
    merged = merges(given)
    assert_same_rows(merged, vocabularies(tmp_path))
    stock, ours = written(tmp_path, "config.json")
    for key in ("vocab_size", "num_hidden_layers"):
        assert ours[key] == stock[key]
