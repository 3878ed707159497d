"""How well a language model foretells the texts of an expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...modules.runner import BlockRunner, Started
from .language_model import LanguageModel

AT_ONCE = 256  # tokens whose logits are held


def perplexity(model: LanguageModel, runner: BlockRunner, begun: Sequence[Started], streams: Sequence[Tensor]) -> float:
    """exp of the mean cross entropy of every token but the first of its text.

    Args:
        streams: Of every batch the tokens behind the last block.
    """
    total, count = 0.0, 0
    outputs: list[Any] = []
    handle = model.backbone.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        for batch in range(len(begun)):
            started = begun[batch]
            outputs.clear()
            runner.finish(started, streams[batch])
            hidden = outputs[-1].last_hidden_state
            assert isinstance(started.inputs, dict)
            lengths = started.inputs["attention_mask"].sum(1).tolist()
            for row, length in enumerate(lengths):
                ids = started.inputs["input_ids"][row, :length]
                total += _cross_entropy(model, type(outputs[-1]), hidden[row, : length - 1], ids)
                count += length - 1
    finally:
        handle.remove()
    return math.exp(total / count)


def _cross_entropy(model: LanguageModel, output: Any, hidden: Tensor, ids: Tensor) -> float:
    total = 0.0
    for begin in range(0, len(hidden), AT_ONCE):
        part = hidden[None, begin : begin + AT_ONCE]
        here = ids[None, begin : begin + part.shape[1]]
        logits = model.logits(output(last_hidden_state=part), {"input_ids": here})[0].float()
        wanted = ids[begin + 1 : begin + 1 + part.shape[1]]
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
    return total
