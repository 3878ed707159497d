"""Which tokenizer and chat template the result has, and where the rows of its tokens come from.

    tokenizer:
      source: union                # or base, or a model
      tokens:
        <|im_start|>:
          source: org/expert       # the row that this model has for the token
          force: true              # in every model, also in those that have the token
        <pad>:
          source: {kind: zero}
        <|im_end|>:
          source: {kind: model_token, model: org/base, token: </s>}    # or token_id: 2
      pad_to_multiple_of: 64

`tokenizer_source: union` says no more than `tokenizer: {source: union}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .model_reference import ModelReference
from .node import Node
from .settings import flag, whole_number

OWN_WORDS = ("base", "union")  # as a source; anything else is a model


@dataclass(frozen=True)
class OtherToken:
    """The row of another token of a model."""

    model: ModelReference
    token: str | int  # or its id


@dataclass(frozen=True)
class Zero:
    """A row of zeros."""


@dataclass(frozen=True)
class TokenRow:
    """Where the row of a token comes from in the models that have none, or in all."""

    source: ModelReference | OtherToken | Zero | None = None  # None: as for any other token
    force: bool = False  # also in the models that have one

    @classmethod
    def read(cls, node: Node) -> TokenRow:
        keys = node.given(("source", "force"), "a token")
        row = cls(
            _read_row_source(keys["source"]) if "source" in keys else None,
            "force" in keys and bool(flag(keys["force"])),
        )
        if row.force and row.source is None:
            raise ValueError(f"{node.at}.source must be given where it is forced, got none")
        return row


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer of the result."""

    source: ModelReference | str = "union"
    tokens: Mapping[str, TokenRow] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None  # rows; those without a token are the mean of the others

    @classmethod
    def read(cls, node: Node) -> TokenizerSettings:
        keys = node.given(("source", "tokens", "pad_to_multiple_of"), "a tokenizer")
        tokens = keys["tokens"] if "tokens" in keys else Node({}, f"{node.at}.tokens")
        if not isinstance(tokens.value, dict):
            raise tokens.must("be a mapping of tokens")
        return cls(
            _read_source(keys["source"]) if "source" in keys else "union",
            {str(token): TokenRow.read(tokens.key(token, value)) for token, value in tokens.value.items()},
            _read_multiple(keys["pad_to_multiple_of"]) if "pad_to_multiple_of" in keys else None,
        )


def read_tokenizer(root: Node, keys: Mapping[str, Node]) -> TokenizerSettings | None:
    """What a recipe says about its tokenizer; None: that of the donor is copied, rows are merged by their numbers."""
    both = [name for name in ("tokenizer_source", "tokenizer") if name in keys]
    if len(both) > 1:
        raise ValueError(f"{root.at} must have one of tokenizer_source and tokenizer, got both")
    if "tokenizer_source" in keys:
        return TokenizerSettings(_read_source(keys["tokenizer_source"]))
    return TokenizerSettings.read(keys["tokenizer"]) if "tokenizer" in keys else None


def _read_source(node: Node) -> ModelReference | str:
    return node.value if node.value in OWN_WORDS else ModelReference.read(node)


def _read_row_source(node: Node) -> ModelReference | OtherToken | Zero:
    if not isinstance(node.value, dict) or "kind" not in node.value:
        return ModelReference.read(node)
    keys = node.given(("kind", "model", "token", "token_id"), "a source")
    if keys["kind"].one_of(("model_token", "zero")) == "zero":
        return Zero()
    named = [name for name in ("token", "token_id") if name in keys]
    if len(named) != 1:
        raise ValueError(f"{node.at} must have one of token and token_id, got {' and '.join(named) or 'none'}")
    kind = str if named == ["token"] else int
    token = keys[named[0]]
    if not isinstance(token.value, kind) or isinstance(token.value, bool):
        raise token.must("be a string" if kind is str else "be a whole number")
    return OtherToken(ModelReference.read(node.required(keys, "model")), token.value)


def _read_multiple(node: Node) -> int | None:
    multiple = whole_number(node)
    if multiple < 0:
        raise node.must("be at least 0")
    return multiple or None  # as mergekit, which asks for truth


def read_chat_template(node: Node | None) -> str | None:
    if node is None:
        return None
    if not isinstance(node.value, str):
        raise node.must("be auto, a name or a template")
    return node.value or None
