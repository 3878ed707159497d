"""What names say of layers, against the architectures that mergekit describes."""

from __future__ import annotations

import importlib

import pytest

from surgery_kernels.recipes.layers import comes_first, in_layer, layers_of

pytestmark = pytest.mark.any_isa


def test_what_comes_before_the_layers() -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    definitions = importlib.import_module("mergekit.architecture.json_definitions")
    checked = 0
    for architecture in definitions.JSON_ARCHITECTURES:
        if list(architecture.modules) != ["default"]:
            continue  # mergekit takes no slices of those
        described = architecture.modules["default"].architecture.definition
        for weights, expected in ((described.pre_weights, True), (described.post_weights, False)):
            for weight in weights or ():
                assert comes_first(weight.name) == expected, (architecture.architectures, weight.name)
                checked += 1
    assert checked > 100


def test_names_and_layers() -> None:
    names = ["model.embed_tokens.weight", "model.layers.7.mlp.experts.3.w1.weight", "lm_head.weight"]
    assert layers_of(names, "a") == dict(zip(names, [None, 7, None], strict=True))
    assert in_layer(names[1], 12) == "model.layers.12.mlp.experts.3.w1.weight"
    assert in_layer(names[0], 12) == names[0]
    with pytest.raises(ValueError, match="a must be of a model with one stack of layers to pick layers from, got none"):
        layers_of(names[:1], "a")
