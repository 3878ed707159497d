"""The vocabularies of the models of a merge, and that of its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...recipes.model_reference import ModelReference
from ...recipes.recipe import Recipe
from ...recipes.tokenizer import TokenizerSettings
from ..reading.source import Source
from . import notices
from .by_token import ByToken, Member, Named
from .chat_templates import template_for
from .layers import MORE, vocabulary_of
from .result import ResultTokenizer, result_tokenizer
from .rows import Rows, common_rows
from .sizes import resized
from .tokenizer_files import Files, with_template
from .tokens import Tokens, has_tokenizer, read_tokens


class Vocabularies:
    """What a recipe makes of tokens: the rows of every tensor that is indexed by them, and the tokenizer."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Mapping[ModelReference, Source],
        find: Callable[[str], Path],
        *,
        truncated: bool = False,
    ) -> None:
        """What rows follow.

        Args:
            recipe: With or without a tokenizer.
            sources: Its models.
            find: Gives the folder of a model that only its tokenizer is taken from.
            truncated: Rows that are merged by their numbers are those that all models have.
        """
        self._recipe = recipe
        self._sources = {reference: sources[reference] for reference in recipe.references}
        self._donor = self._sources[recipe.donor]
        self._find = find
        self._num_rows: dict[bool, int] = {}  # of tensors of the result, by whether they are short of rows
        self._result: ResultTokenizer | None = None
        self._parted = False
        self.notices: list[str] = []
        self._by_token = self._read()
        self._truncated = truncated and self._by_token is None
        self.files = self._with_template({} if self._result is None else self._result.files)

    @property
    def of_other_sizes(self) -> str:
        """What becomes of vocabularies that have other numbers of rows, as a kind of difference."""
        return "truncated" if self._truncated else "vocabulary" if self._by_token is None else "tokens"

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
        axis = vocabulary_of(first).axes.get(name)
        if axis is None:
            return shape, [None] * len(tensors)
        if self._truncated:
            num_rows = min(source.tensors[of].shape[axis] for source, of in tensors)
            if num_rows < shape[axis]:
                self.notices.append(notices.truncated(own, shape[axis], num_rows, str(self._recipe.donor)))
            return (*shape[:axis], num_rows, *shape[axis + 1 :]), common_rows(tensors, axis, num_rows)
        if self._by_token is None:
            num_rows, rows = shape[axis], common_rows(tensors, axis, shape[axis])
        else:
            num_rows, rows = self._by_token.arranged(tensors, axis, base)
        self._num_rows[name in vocabulary_of(first).short] = num_rows
        return (*shape[:axis], num_rows, *shape[axis + 1 :]), rows

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of the donor with the number of tokens of the result; after all tensors are arranged."""
        before = vocabulary_of(self._donor).num_rows
        return resized(config, before, self._num_rows.get(False, before), self._num_rows.get(True))

    def check(self, first: Source, names: Sequence[str]) -> None:
        """Raises ValueError where rows move that may belong to tokens, in one of the tensors `names` of a model.

        Rows only move where the tokens of the models, or their number, differ from those of the result.
        """
        vocabulary = vocabulary_of(first)
        if self._by_token is None or not (self._by_token.moves(vocabulary.num_rows) or self._parted):
            return
        copied = {name for name in vocabulary.axes if not first.tensors[name].dtype.is_floating_point}
        for name in names:
            if name in vocabulary.unknown or name in copied:
                raise ValueError(
                    f"{name!r} of {first.name} must be known to have a row for every token, or not, for a merge by "
                    f"token, got shape {list(first.tensors[name].shape)} where the vocabulary has "
                    f"{vocabulary.num_rows} rows"
                )
        if not vocabulary.has_input:
            raise ValueError(f"{first.name} must have an embedding of its tokens for a merge by token, got none")

    def _read(self) -> ByToken | None:
        """How rows follow tokens; None: they are merged by their numbers."""
        settings, folders = self._recipe.tokenizer, self._folders
        if settings is None:
            self._notice_other_rows()
            return None
        if self._recipe.donor not in folders:
            raise ValueError(
                f"tokenizer_source must be left out for a model without a tokenizer, got {self._recipe.donor}"
            )
        try:
            tokens = {model: read_tokens(folder) for model, folder in folders.items()}
        except ValueError as error:
            if settings in (TokenizerSettings("base"), TokenizerSettings()) and notices.same_files(
                list(folders.values())
            ):
                self.notices.append(f"all models have the same tokenizer, and all rows stay where they are: {error}")
                return None
            raise
        return self._merged_by_token(settings, tokens)

    @property
    def _folders(self) -> dict[ModelReference, Path]:
        """Of the models that have a tokenizer."""
        folders = {model: source.folder for model, source in self._sources.items()}
        return {model: folder for model, folder in folders.items() if folder is not None and has_tokenizer(folder)}

    def _merged_by_token(self, settings: TokenizerSettings, tokens: Mapping[ModelReference, Tokens]) -> ByToken:
        donor, of_donor = self._recipe.donor, tokens[self._recipe.donor]
        members = {
            model: Member(source, tokens.get(model, of_donor), vocabulary_of(source).num_rows or of_donor.num_rows)
            for model, source in self._sources.items()
        }
        others = [member for model, member in members.items() if model in tokens and model != donor]
        named = self._named(settings, tokens)
        result = result_tokenizer(settings, members[donor], others, self._folders[donor], named)
        owner = members.get(settings.source) if isinstance(settings.source, ModelReference) else members[donor]
        by_token = ByToken(result.tokens.ids, members, settings, owner.source if owner else None)
        for model, member in members.items():
            if model not in tokens:
                self.notices.append(f"{model} has no tokenizer: it is taken to have the tokens of {donor}")
            self.notices += notices.without_rows(str(model), member.tokens, member.limit)
        before = vocabulary_of(self._donor).num_rows
        self.notices += notices.other_number(str(donor), before, by_token.num_rows, result)
        self.notices += notices.moved_ids(self._donor.config or {}, of_donor, result.tokens)
        # Idefics: rows of the last tokens are in a tensor of their own
        beyond = of_donor.num_rows > members[donor].limit
        self._parted = beyond and any(MORE.search(name) for name in self._donor.tensors)
        self._result = result
        return by_token

    def _named(
        self, settings: TokenizerSettings, tokens: Mapping[ModelReference, Tokens]
    ) -> tuple[Tokens, Path] | None:
        """Tokens and folder of a model that the recipe names as the source of the tokenizer."""
        model = settings.source
        if not isinstance(model, ModelReference):
            return None
        if model in tokens:
            return tokens[model], self._folders[model]
        folder = None if model in self._sources else self._find(str(model.model))
        if folder is None or not has_tokenizer(folder):
            raise ValueError(f"recipe.tokenizer.source must be a model with a tokenizer, got {model}")
        return read_tokens(folder), folder

    def _notice_other_rows(self) -> None:
        folders = dict(self._folders)
        ours = folders.pop(self._recipe.donor, None)
        for model, folder in folders.items() if ours is not None else ():
            if ours is None or notices.same_files([ours, folder]) or not vocabulary_of(self._sources[model]).axes:
                continue
            try:
                tokens = read_tokens(ours), read_tokens(folder)
            except ValueError:
                self.notices.append(
                    f"{model} has another tokenizer than {self._recipe.donor}, of a kind that is not read: rows are "
                    f"merged by their numbers"
                )
                continue
            self.notices += notices.other_rows(str(self._recipe.donor), tokens[0], str(model), tokens[1])

    def _with_template(self, files: Files) -> Files:
        """Files that differ from those in the folder of the donor, with the chat template of the recipe."""
        wanted = self._recipe.chat_template
        if wanted is None:
            return files
        template = template_for(wanted, list(self._folders.values()))
        if template is None:
            self.notices.append("recipe.chat_template is auto, and no model has one: the result has none either")
            return files
        if self._recipe.donor not in self._folders:
            raise ValueError(
                f"recipe.chat_template must be left out for a model without a tokenizer, got {self._recipe.donor}"
            )
        return with_template(self._folders[self._recipe.donor], template, files)
