"""Models of sentence-transformers: by their state dicts, and by their own `merge`, which calls mergekit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, merge_state_dicts
from tests.cases import assert_same
from tests.sentence_models import sentence_models

pytestmark = pytest.mark.any_isa

TEXTS = ["a cat sat", "on the mat", "a mat sat on the cat"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return sentence_models(tmp_path_factory.mktemp("bert"))


def test_by_state_dicts(models: list[Any], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base, *experts = (model.state_dict() for model in models)
    merged = merge_state_dicts(base, experts, method="dare_ties", density=0.5)
    models[0].save_pretrained(str(tmp_path / "merged"))
    encoder = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    encoder.load_state_dict(merged)
    encoder.save_pretrained(str(tmp_path / "merged"))
    again = SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    for key, tensor in again.state_dict().items():
        assert_same(tensor, merged[key], key)
    embeddings = again.encode(TEXTS, convert_to_tensor=True)
    assert embeddings.shape == (3, 8)
    assert not torch.equal(embeddings, models[0].encode(TEXTS, convert_to_tensor=True))


METHODS: list[tuple[str, bool, dict[str, Any]]] = [  # of mergekit, whether there is a base, parameters
    ("linear", False, {}),
    ("slerp", False, {}),
    ("karcher", False, {}),
    ("ties", True, {"density": 0.3}),
    ("model_stock", True, {}),
    ("della", True, {"density": 0.6}),
]


@pytest.mark.parametrize(("method", "has_base", "parameters"), METHODS)
def test_by_their_merge(
    models: list[Any], monkeypatch: pytest.MonkeyPatch, method: str, has_base: bool, parameters: dict[str, Any]
) -> None:
    from sentence_transformers import SentenceTransformer

    mergekit = importlib.import_module("surgery_kernels.integrations.mergekit")
    monkeypatch.setattr(mergekit.registry, "_METHODS", dict(mergekit.registry._METHODS))

    def merge() -> dict[str, Tensor]:
        torch.manual_seed(7)
        base = {"base_model": models[0]} if has_base else {}
        return SentenceTransformer.merge(models[1:], method, parameters=parameters, **base).state_dict()

    before = _C.bytes_read()
    expected = merge()
    assert _C.bytes_read() == before
    mergekit.install()
    actual = merge()
    assert _C.bytes_read() > before
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, rtol=1e-5, atol=1e-6)
