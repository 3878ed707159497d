"""The tokenizer and the chat template of recipes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from surgery_kernels.recipes import Recipe, parse_recipe
from surgery_kernels.recipes.model_reference import Location, ModelReference
from surgery_kernels.recipes.tokenizer import OtherToken, TokenizerSettings, TokenRow, Zero

pytestmark = pytest.mark.any_isa

A, B = ModelReference(Location("a")), ModelReference(Location("b", "main"))


def read(**keys: Any) -> Recipe:
    return parse_recipe(json.dumps({"merge_method": "linear", "models": [{"model": "a"}], **keys}))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"tokenizer_source": None}, None),
        ({"tokenizer_source": "base"}, TokenizerSettings("base")),
        ({"tokenizer_source": "union"}, TokenizerSettings("union")),
        ({"tokenizer_source": "b@main"}, TokenizerSettings(B)),
        ({"tokenizer_source": {"model": {"path": "a"}}}, TokenizerSettings(A)),
        ({"tokenizer": {}}, TokenizerSettings("union")),
        ({"tokenizer": {"source": "base"}, "tokenizer_source": None}, TokenizerSettings("base")),
        ({"tokenizer": {"source": "a", "pad_to_multiple_of": 64}}, TokenizerSettings(A, pad_to_multiple_of=64)),
        ({"tokenizer": {"pad_to_multiple_of": "8"}}, TokenizerSettings(pad_to_multiple_of=8)),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, TokenizerSettings()),
        ({"tokenizer": {"tokens": None}}, TokenizerSettings()),
        ({"tokenizer": {"tokens": {"x": {}}}}, TokenizerSettings(tokens={"x": TokenRow()})),
        ({"tokenizer": {"tokens": {"x": {"source": "a"}}}}, TokenizerSettings(tokens={"x": TokenRow(A)})),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "zero"}, "force": True}}}},
            TokenizerSettings(tokens={"x": TokenRow(Zero(), force=True)}),
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token_id": 0}}}}},
            TokenizerSettings(tokens={"x": TokenRow(OtherToken(A, 0))}),
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "b@main", "token": "y"}}}}},
            TokenizerSettings(tokens={"x": TokenRow(OtherToken(B, "y"))}),
        ),
    ],
)
def test_tokenizers(keys: dict[str, Any], expected: TokenizerSettings | None) -> None:
    recipe = read(**keys)
    assert recipe.tokenizer == expected
    assert recipe.notices == ()


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("", None), ("auto", "auto"), ("{{ x }}", "{{ x }}")])
def test_chat_templates(given: str | None, expected: str | None) -> None:
    assert read(chat_template=given).chat_template == expected


def test_unknown_keys_are_ignored_with_a_notice() -> None:
    recipe = read(tokenizer={"sources": "base", "tokens": {"x": {"sorce": "a"}}})
    assert recipe.notices == (
        "recipe.tokenizer.sources is ignored: did you mean 'source'?",
        "recipe.tokenizer.tokens.x.sorce is ignored: did you mean 'source'?",
    )


TOKEN = ".tokenizer.tokens.x"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer_source": "base", "tokenizer": {}}, " must have one of tokenizer_source and tokenizer, got both"),
        ({"tokenizer_source": 3}, ".tokenizer_source must be a folder or a hub id, got 3"),
        ({"tokenizer": "base"}, ".tokenizer must be a mapping with keys among pad_to_multiple_of, source, tokens"),
        ({"tokenizer": {"source": ""}}, ".tokenizer.source must be path or path@revision"),
        ({"tokenizer": {"tokens": ["x"]}}, ".tokenizer.tokens must be a mapping of tokens, got ['x']"),
        ({"tokenizer": {"tokens": {"x": "a"}}}, TOKEN + " must be a mapping with keys among force, source, got 'a'"),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, TOKEN + ".source must be given where it is forced"),
        ({"tokenizer": {"tokens": {"x": {"force": "often"}}}}, TOKEN + ".force must be true or false, got 'often'"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "one"}}}}},
            TOKEN + ".source.kind must be one of 'model_token', 'zero', got 'one'",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            TOKEN + ".source must have one of token and token_id, got none",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "token": "y"}}}}},
            TOKEN + ".source.model must be given, got none",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token": 3}}}}},
            TOKEN + ".source.token must be a string, got 3",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token_id": "y"}}}}},
            TOKEN + ".source.token_id must be a whole number, got 'y'",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 1.5}}, ".tokenizer.pad_to_multiple_of must be a whole number, got 1.5"),
        ({"tokenizer": {"pad_to_multiple_of": -8}}, ".tokenizer.pad_to_multiple_of must be at least 0, got -8"),
        ({"chat_template": ["x"]}, ".chat_template must be auto, a name or a template, got ['x']"),
    ],
)
def test_errors(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^recipe" + re.escape(message)) as error:
        read(**keys)
    assert "\n" not in str(error.value)
