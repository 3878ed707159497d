"""The tokenizer of a result: which tokens it has, and the files that hold it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ...recipes.tokenizer import TokenizerSettings
from .by_token import Member
from .tokenizer_files import Files, files_of, with_tokens
from .tokens import FAST, Tokens


@dataclass(frozen=True)
class ResultTokenizer:
    """What the result knows, and what is written."""

    tokens: Tokens
    folder: Path  # whose tokenizer it is
    files: Files = field(default_factory=dict)  # that differ from those in the folder of the donor


def result_tokenizer(
    settings: TokenizerSettings,
    donor: Member,
    others: Collection[Member],
    folder: Path,
    named: tuple[Tokens, Path] | None = None,
) -> ResultTokenizer:
    """The tokenizer that a recipe asks for.

    New tokens come behind those that are there: first all that stand in the vocabulary of another model, model by model
    and by their ids, then all that were added to one, in the same order, then those that only the recipe names.

    Args:
        settings: Of the recipe.
        donor: The model to whose tokenizer others are added.
        others: The other models, in the order of the recipe.
        folder: Where the donor's tokenizer lies.
        named: Tokens and folder of the model that the recipe names as the source.

    Raises:
        ValueError: tokens have to be changed in a tokenizer where that is not possible.

    Source: mergekit 0.1.5, whose order of new tokens changes from run to run.
    """
    before, its_folder = (donor.tokens, folder) if named is None else named
    kept = before if named else before.below(donor.limit)
    grown = _Grown(kept)
    if settings.source == "union":
        grown.add_others(others)
    for token in settings.tokens:
        grown.add(token)
    files: dict[str, Path | str | None] = {}
    if its_folder != folder:
        files = {**dict.fromkeys(files_of(folder)), **files_of(its_folder)}
    gone = before.ids.keys() - kept.ids.keys() - before.unlisted
    new = (len(grown.ids), len(grown.added)) != (len(kept.ids), len(kept.added))
    # files of another kind cannot be changed: they keep what only goes
    if new or (gone and (its_folder / FAST).is_file()):
        files |= with_tokens(its_folder, before, grown.tokens)
    return ResultTokenizer(grown.tokens, its_folder, files)


class _Grown:
    """Tokens, and others behind them."""

    def __init__(self, tokens: Tokens) -> None:
        self.ids = dict(tokens.ids)
        self.added = dict(tokens.added)
        self._following = tokens.num_rows

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.ids, self.added)

    def add(self, token: str, options: Mapping[str, Any] | None = None) -> None:
        """One that is there keeps its id; with options, it is from now on found in a text before words are."""
        if token not in self.ids:
            self.ids[token] = self._following
            self._following += 1
            self.added[token] = options or {}
        elif options is not None:
            self.added.setdefault(token, options)

    def add_others(self, members: Collection[Member]) -> None:
        known = [member.tokens.below(member.limit) for member in members]
        in_any = {token for tokens in known for token in tokens.added}
        ordered = [sorted(tokens.ids, key=tokens.ids.__getitem__) for tokens in known]
        for token in chain.from_iterable(ordered):
            if token not in in_any:
                self.add(token)
        for tokens, names in zip(known, ordered, strict=True):
            for token in names:
                if token in tokens.added:
                    self.add(token, tokens.added[token])
