"""The vocabularies of the models of a merge, and that of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...recipes.model_reference import ModelReference
from ...recipes.recipe import Recipe
from ...recipes.tokenizer import TokenizerSettings
from ..reading.source import Source
from .by_token import ByToken, Member, Named
from .chat_templates import template_for
from .layers import Vocabulary
from .result import result_tokenizer
from .rows import Rows, common_rows
from .sizes import resized
from .tokenizer_files import Files, with_template
from .tokens import Tokens, has_tokenizer, read_tokens

SHOWN = 3  # tokens in a sentence


class Vocabularies:
    """What a recipe makes of tokens: the rows of every tensor that is indexed by them, and the tokenizer."""

    def __init__(self, recipe: Recipe, sources: Mapping[ModelReference, Source], find: Callable[[str], Path]) -> None:
        """`find` gives the folder of a model that only its tokenizer is taken from."""
        self._recipe = recipe
        self._sources = {reference: sources[reference] for reference in recipe.references}
        self._find = find
        self._num_rows: dict[str, int] = {}  # of the result
        self.notices: list[str] = []
        self._by_token = None if recipe.tokenizer is None else self._read(recipe.tokenizer)
        self.files = self._files()

    @property
    def by_token(self) -> bool:
        return self._by_token is not None

    def arranged(
        self, name: str, tensors: Sequence[Named], base: Source | None
    ) -> tuple[tuple[int, ...], list[Rows | None]]:
        """The shape of a tensor of the result, and what stands in its rows in every model.

        Args:
            name: Of the tensor, in the first model.
            tensors: Of all models that take part, the first one's first.
            base: The one of the recipe, if it takes part.
        """
        first, own = tensors[0]
        shape = first.tensors[own].shape
        axis = self._vocabulary(first).axes.get(name)
        if axis is None:
            return shape, [None] * len(tensors)
        if self._by_token is None:
            num_rows, rows = shape[axis], common_rows(tensors, axis)
        else:
            num_rows, rows = self._by_token.arranged(tensors, axis, base)
        self._num_rows["per layer" if name in self._vocabulary(first).short else "all"] = num_rows
        return (*shape[:axis], num_rows, *shape[axis + 1 :]), rows

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the donor with the number of tokens of the result; after all tensors are arranged."""
        before = self._vocabulary(self._sources[self._recipe.donor]).num_rows
        return resized(config, before, self._num_rows.get("all", before), self._num_rows.get("per layer"))

    def check(self, first: Source, names: Sequence[str]) -> None:
        """Raises ValueError where rows move that may belong to tokens, in one of the tensors `names` of a model.

        Rows only move where the tokens of the models, or their number, differ from those of the result.
        """
        vocabulary = self._vocabulary(first)
        if self._by_token is None or not self._by_token.moves(vocabulary.num_rows):
            return
        copied = [name for name in vocabulary.axes if not first.tensors[name].dtype.is_floating_point]
        for name in names:
            if name in vocabulary.unknown or name in copied:
                raise ValueError(
                    f"{name!r} of {first.name} must be known to have a row for every token, or not, for a merge by "
                    f"token, got shape {list(first.tensors[name].shape)} where the vocabulary has "
                    f"{vocabulary.num_rows} rows"
                )
        if not vocabulary.axes:
            raise ValueError(
                f"{first.name} must have a tensor with a row for every token for a merge by token, got none"
            )

    def _vocabulary(self, source: Source) -> Vocabulary:
        return self._known.setdefault(id(source), Vocabulary(source))

    @cached_property
    def _known(self) -> dict[int, Vocabulary]:
        return {}

    def _read(self, settings: TokenizerSettings) -> ByToken:
        donor = self._recipe.donor
        if not has_tokenizer(self._sources[donor].folder):
            raise ValueError(f"tokenizer_source must be left out for a model without a tokenizer, got {donor}")
        own = {model: self._tokens(source) for model, source in self._sources.items()}
        of_donor = own[donor]
        assert of_donor is not None
        members = {
            model: Member(source, own[model] or of_donor, self._vocabulary(source).num_rows or of_donor.num_rows)
            for model, source in self._sources.items()
        }
        for model, tokens in own.items():
            if tokens is None:
                self.notices.append(f"{model} has no tokenizer: it is taken to have the tokens of {donor}")
        others = [member for model, member in members.items() if model != donor and own[model] is not None]
        named = self._named(settings, members)
        folder = self._sources[donor].folder
        assert folder is not None
        result = result_tokenizer(settings, members[donor], others, folder, named)
        self._result = result
        by_token = ByToken(result.tokens.ids, members, settings)
        self._notice(by_token, members)
        return by_token

    def _tokens(self, source: Source) -> Tokens | None:
        return read_tokens(source.folder) if source.folder is not None and has_tokenizer(source.folder) else None

    def _named(
        self, settings: TokenizerSettings, members: Mapping[ModelReference, Member]
    ) -> tuple[Tokens, Path] | None:
        """Tokens and folder of a model that the recipe names as the source of the tokenizer."""
        if not isinstance(settings.source, ModelReference):
            return None
        member = members.get(settings.source)
        folder = member.source.folder if member else self._find(str(settings.source.model))
        if folder is None or not has_tokenizer(folder):
            raise ValueError(f"recipe.tokenizer.source must be a model with a tokenizer, got {settings.source}")
        return (member.tokens if member else read_tokens(folder)), folder

    def _files(self) -> Files:
        """That differ from those in the folder of the donor."""
        files: Files = {} if self._by_token is None else self._result.files
        if self._recipe.chat_template is None:
            return files
        folders = [source.folder for source in self._sources.values() if source.folder is not None]
        template = template_for(self._recipe.chat_template, folders)
        of_donor = self._sources[self._recipe.donor].folder
        if template is None:
            self.notices.append("recipe.chat_template is auto, and no model has one: there is none")
            return files
        if of_donor is None or not has_tokenizer(of_donor):
            raise ValueError(
                f"recipe.chat_template must be left out for a model without a tokenizer, got {self._recipe.donor}"
            )
        return with_template(of_donor, template, files)

    def _notice(self, by_token: ByToken, members: Mapping[ModelReference, Member]) -> None:
        for model, member in members.items():
            beyond = [token for token, row in member.tokens.ids.items() if row >= member.limit]
            if beyond:
                self.notices.append(
                    f"{model} has {_some(beyond)} in its tokenizer, and {member.limit} rows, none of them for that"
                )
        before = self._vocabulary(self._sources[self._recipe.donor]).num_rows
        if by_token.num_rows != before:
            padding = by_token.num_rows - len(self._result.tokens.ids)
            behind = f", {padding} of them without a token" if padding else ""
            self.notices.append(
                f"the result has {by_token.num_rows} rows for tokens{behind}, {self._recipe.donor} {before}"
            )


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:SHOWN]))
    more = len(tokens) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
