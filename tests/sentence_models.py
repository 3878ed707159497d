"""Tiny models of sentence-transformers: a pretrained encoder and two fine-tuned ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat"]


def sentence_models(folder: Path) -> list[Any]:
    """A tiny BERT, mean pooling and a dense layer each."""
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    encoders = []
    for seed in range(3):
        words = Transformer(str(folder))
        torch.manual_seed(0)
        modules = [words, Pooling(16), Dense(16, 8)]
        encoders.append(sentence_transformers.SentenceTransformer(modules=modules, device="cpu"))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in encoders[-1].parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return encoders
