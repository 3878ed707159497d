"""Which tensors of a model have a row for every token: by their names, and by the sizes of its vocabularies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any
from weakref import WeakKeyDictionary

from ..reading.source import Source, TensorInfo
from .sizes import PER_LAYER, Size, inner_configs, numbers_in, sizes_in

# Names that mean tokens wherever they stand, also in a numbered layer, as of the heads that predict several tokens.
INPUT = re.compile(
    r"(.*[./])?(embed_tokens(_per_layer|\.\d+)?|embed_text_tokens|tok_embeddings?|(text_)?token_emb(edding|ed)?"
    r"|tokens_embed|word_embeddings?|wte|embed_in)\.weight"
)
OUTPUT = re.compile(
    r"(.*[./])?((lm_head|lm_heads\.\d+|generator_lm_head|predictions|mlm_head)(\.(decoder|linear|out_proj))?"
    r"|embed_out|lm_loss|vocab_projector|pred_layer\.proj|shared_head\.head)\.(weight|bias)"
)
# Names that mean tokens outside the layers, where the size is that of the vocabulary.
LIKELY_INPUT = re.compile(
    r"(.*[./])?(shared|embeddings?|input_embeddings?|input_embeds_layer|emb|embd|embed|w)\.weight"
)
LIKELY_OUTPUT = re.compile(
    r"(.*[./])?(output(_layer|_projection)?|heads?|decoder|ff_out|proj_out|out|classifier_head|embedding_decoder"
    r"|prediction_head|ctc_head|speech_head|mmm_text_head)\.(weight|bias)"
)
# The same with tokens in another dimension than the first.
TURNED = re.compile(r"(.*[./])?(final_logits_bias|predictions\.dense\.weight)")
# Rows that continue those of another tensor, as in Idefics.
MORE = re.compile(r"(^|\.)additional_(embedding|fc)\.")
PER_LAYER_END = "embed_tokens_per_layer.weight"  # of Gemma 3n: as many rows as the configuration says
NUMBERED = re.compile(r"(.*[./])?\d+\.")
TIES = "tie_word_embeddings"


@dataclass(frozen=True)
class Vocabulary:
    """The tensors of a model that are indexed by tokens."""

    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    @cached_property
    def num_rows(self) -> int:
        """One for every token, and for padding; 0: there is no such tensor."""
        sizes = [size.value for size in self._sizes if size.is_of_language]
        for kind in (INPUT, LIKELY_INPUT):
            named = [name for name in self.tensors if kind.fullmatch(name) and not name.endswith(PER_LAYER_END)]
            rows = [shape[0] for name in named if len(shape := self.tensors[name].shape) > 1 and shape[0] > 1]
            if known := [size for size in sizes if size in rows]:
                return known[0]
            if rows and (kind is INPUT or not sizes):
                return max(rows)
        lengths = {length for info in self.tensors.values() for length in info.shape}
        return next((size for size in sizes if size in lengths and size > 1), 0)

    @cached_property
    def axes(self) -> dict[str, int]:
        """Which dimension of a tensor is that of tokens."""
        found = {}
        for name, info in self.tensors.items():
            axis = self._axis(name, info.shape)
            if axis is not None:
                found[name] = axis
        return found

    @cached_property
    def has_input(self) -> bool:
        """Whether the layer that tokens go into is among them."""
        return any(INPUT.fullmatch(name) or LIKELY_INPUT.fullmatch(name) for name in self.axes)

    @cached_property
    def short(self) -> frozenset[str]:
        """Names of `axes` with rows for the first tokens only, as the configuration says."""
        return frozenset(name for name, axis in self.axes.items() if self.tensors[name].shape[axis] != self.num_rows)

    @cached_property
    def unknown(self) -> frozenset[str]:
        """Tensors that may have a row for every token, and may not."""
        return frozenset(
            name
            for name, info in self.tensors.items()
            if name not in self.axes and (self._may_be(name, info.shape) or self._is_of_another(name, info.shape))
        )

    def _may_be(self, name: str, shape: tuple[int, ...]) -> bool:
        """A length is that of the vocabulary, and of nothing else that is known of the model."""
        if not self.num_rows or self.num_rows not in shape or self.num_rows in self._other_sizes | self._widths:
            return False
        return not (NUMBERED.match(name) and self._is_product)

    def _is_of_another(self, name: str, shape: tuple[int, ...]) -> bool:
        """Its name means tokens, and its length is neither that of this vocabulary nor of one that is known apart."""
        others = {size.value for size in self._sizes if not size.is_of_language}
        return bool(MORE.search(name)) or (_is_named(name) and bool(shape) and shape[0] not in others)

    @cached_property
    def _sizes(self) -> list[Size]:
        return sizes_in(self.config)

    @cached_property
    def _other_sizes(self) -> frozenset[int]:
        """What else a dimension of that length may be."""
        numbers = numbers_in(self.config)
        return frozenset(
            value
            for path, value in numbers
            if value > 1 and "vocab" not in path[-1] and not re.search(r"token|_id(s|x)?$|index", path[-1])
        )

    @cached_property
    def _is_product(self) -> bool:
        """Whether the length may be of several heads, or of projections that are stored as one."""
        factors = self._other_sizes | {2, 3, 4}
        return any(a * b == self.num_rows for a, b in combinations_with_replacement(factors, 2))

    @cached_property
    def _widths(self) -> frozenset[int]:
        """Of the tensors in layers."""
        shapes = [info.shape for name, info in self.tensors.items() if NUMBERED.match(name)]
        return frozenset(length for shape in shapes for length in shape[1:])

    def _axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        if not self.num_rows:
            return None
        if TURNED.fullmatch(name):
            return shape.index(self.num_rows) if self.num_rows in shape else None
        likely = not NUMBERED.match(name) and (LIKELY_INPUT.fullmatch(name) or LIKELY_OUTPUT.fullmatch(name))
        if not shape or not (_is_named(name) or likely):
            return None
        if shape[0] == self.num_rows:
            return 0
        per_layer = [size.value for size in self._sizes if size.path[-1] == PER_LAYER]
        return 0 if name.endswith(PER_LAYER_END) and shape[0] in per_layer else None


def vocabulary_of(model: Source) -> Vocabulary:
    """Of a model; looked for once."""
    if model not in _FOUND:
        _FOUND[model] = Vocabulary(model.tensors, model.config or {})
    return _FOUND[model]


_FOUND: WeakKeyDictionary[Source, Vocabulary] = WeakKeyDictionary()


def tied_to(name: str, model: Source) -> str | None:
    """The input layer of a model that stores its output layer `name` as nothing but that."""
    ties = says_tied(model.config or {})
    likely = LIKELY_OUTPUT.fullmatch(name) and not NUMBERED.match(name) and True in ties
    if not (OUTPUT.fullmatch(name) or likely) or not name.endswith(".weight") or False in ties:
        return None
    vocabulary = vocabulary_of(model)
    full = [own for own in vocabulary.axes if own not in vocabulary.short and own not in model.tied]
    for kind in (INPUT, LIKELY_INPUT):
        if inputs := [own for own in full if kind.fullmatch(own)]:
            return inputs[0] if len(inputs) == 1 else None
    return None


def says_tied(config: Mapping[str, Any]) -> list[Any]:
    """What a configuration says about tied layers, for itself and the language model in it."""
    return [of.get(TIES) for of in (config, *inner_configs(config).values())]


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose output layer is one of its own."""
    return {**config, **{key: {**inner, TIES: False} for key, inner in inner_configs(config).items()}, TIES: False}


def _is_named(name: str) -> bool:
    return bool(INPUT.fullmatch(name) or OUTPUT.fullmatch(name))
