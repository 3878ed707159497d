"""Which tensors have a row for every token."""

from __future__ import annotations

from ..reading.source import Source

INPUT_LAYERS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_LAYERS = ("lm_head.weight", "embed_out.weight")


def is_vocabulary(name: str) -> bool:
    return name.endswith(INPUT_LAYERS + OUTPUT_LAYERS)


def tied_to(name: str, model: Source) -> str | None:
    """The input layer of a model that stores its output layer `name` as nothing but that."""
    if not name.endswith(OUTPUT_LAYERS) or (model.config or {}).get("tie_word_embeddings") is False:
        return None
    inputs = [own for own in model.tensors if own.endswith(INPUT_LAYERS)]
    return inputs[0] if len(inputs) == 1 else None
