"""BERT as a sentence encoder: tokens to the mean of the last hidden states. Its parameters have transformers' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError


@dataclass(frozen=True)
class Shape:
    """What a config.json says of it."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, config: bytes) -> Shape:
        """Raises InputError for any other architecture."""
        content: dict[str, Any] = json.loads(config)
        kind = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        for name, wanted in kind.items():
            if content.get(name, wanted) != wanted:
                raise InputError(f"config.json must have {name} {wanted!r}, got {content[name]!r}")
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


class Embeddings(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.word_embeddings = nn.Embedding(shape.vocab_size, width)
        self.position_embeddings = nn.Embedding(shape.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(shape.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=shape.layer_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Numbers of tokens [batch, tokens], all of the first segment, to [batch, tokens, width]."""
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        return self.LayerNorm(self.word_embeddings(input_ids) + positions + self.token_type_embeddings.weight[0])


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(shape.hidden_size, shape.hidden_size) for _ in range(3))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (  # [batch, num_heads, tokens, width / num_heads] each
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A layer whose result is added to the tokens, and the sum normalised."""

    def __init__(self, features: int, shape: Shape) -> None:
        super().__init__()
        self.dense = nn.Linear(features, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden) + tokens)


class Block(nn.Module):
    """Self-attention and a perceptron; modules within modules for the sake of their names."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"self": SelfAttention(shape), "output": Output(shape.hidden_size, shape)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(shape.hidden_size, shape.intermediate_size)})
        self.output = Output(shape.intermediate_size, shape)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens [batch, tokens, width]; True in mask [batch, 1, 1, tokens] where they are none of the padding."""
        tokens = self.attention["output"](self.attention["self"](tokens, mask), tokens)
        return self.output(F.gelu(self.intermediate["dense"](tokens)), tokens)


class TextEncoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embeddings = Embeddings(shape)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Numbers of tokens [batch, tokens], and 1 where they are none of the padding, to features [batch, width]."""
        tokens, mask = self.embeddings(input_ids), attention_mask.bool()[:, None, None]
        for block in self.encoder["layer"].children():
            tokens = block(tokens, mask)
        weights = attention_mask.unsqueeze(-1).to(tokens)
        return (tokens * weights).sum(1) / weights.sum(1)


def load_encoder(shape: Shape, state: Mapping[str, Tensor]) -> TextEncoder:
    """An encoder in evaluation mode, without gradients; what `state` has beside it, such as a pooler, is left out.

    Raises:
        InputError: a parameter is missing or has another shape.
    """
    with torch.device("meta"):
        encoder = TextEncoder(shape)
    for name, parameter in encoder.state_dict().items():
        if name not in state or state[name].shape != parameter.shape:
            got = list(state[name].shape) if name in state else "no such tensor"
            raise InputError(f"the encoder must have {name} of shape {list(parameter.shape)}, got {got}")
    encoder.load_state_dict({name: state[name] for name in encoder.state_dict()}, assign=True)
    return encoder.eval().requires_grad_(False)
