"""Vocabularies that are merged token by token: whose rows are whose in the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...recipes.model_reference import ModelReference
from ...recipes.tokenizer import OtherToken, TokenizerSettings, TokenRow, Zero
from ..reading.source import Source
from .layers import vocabulary_of
from .rows import Part, Rows
from .tokens import Tokens

ABSENT = -1  # instead of a row
ZERO, MEAN = -1, -2  # instead of a model that gives a row

Named = tuple[Source, str]  # a tensor of a checkpoint


@dataclass(frozen=True)
class Member:
    """A model of a merge, and its tokens."""

    source: Source
    tokens: Tokens
    limit: int  # tokens from here on have no row


class ByToken:
    """Puts the rows of every model in the order of the tokens of the result.

    A token that a model has keeps its own row. Of a token that it lacks, the row comes from the one model that has it;
    where several have it, from the base, else it is the mean over those that have it; where none has it, zeros. What
    the recipe says about a token goes before that. Rows of padding are the mean of the others. A number that the
    tokenizer leaves out keeps the row of the model whose tokenizer it is.

    Source: mergekit 0.1.5, row for row; it cannot merge tokenizers that leave numbers out.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        members: Mapping[ModelReference, Member],
        settings: TokenizerSettings,
        owner: Source | None,
    ) -> None:
        """`owner` is the model whose numbers `ids` are, if it is one of the members."""
        multiple = settings.pad_to_multiple_of or 1
        self.num_tokens = 1 + max(ids.values())
        self.num_rows = -(-self.num_tokens // multiple) * multiple
        self._ids = ids
        self._owner = owner
        self._members = members
        self._said = {ids[token]: row for token, row in settings.tokens.items() if row.source is not None}
        self._places = {id(member.source): self._places_in(member) for member in members.values()}
        self._has_token = torch.zeros(self.num_rows, dtype=torch.bool)
        self._has_token[list(ids.values())] = True

    def arranged(self, tensors: Sequence[Named], axis: int, base: Source | None) -> tuple[int, list[Rows | None]]:
        """How many rows a tensor of the result has, and what stands in them in every model.

        Args:
            tensors: Of the models that take part; the one that the result is called after comes first.
            axis: Their dimension of tokens.
            base: Whose row is taken for a token that several have; None where the recipe has no base.

        Returns:
            The number of rows and, for every tensor, None where its first rows are as they should be.

        Raises:
            ValueError: the recipe takes a row from where there is none.
        """
        giving = list(dict.fromkeys(tensors))
        num_rows = self._num_rows_of(*giving[0], axis)
        places = torch.stack([self._places[id(source)][:num_rows] for source, _ in giving])  # [models, rows]
        for of_model, (source, name) in zip(places, giving, strict=True):
            of_model[of_model >= source.tensors[name].shape[axis]] = ABSENT
        lent = self._lent(giving, places, axis, base)
        found = {tensor: self._rows(giving, t, axis, places, lent) for t, tensor in enumerate(giving)}
        return num_rows, [found[tensor] for tensor in tensors]

    def moves(self, num_rows: int) -> bool:
        """Whether tensors with so many rows come out with others than they came in with, in any model."""
        same = torch.arange(self.num_rows)
        return num_rows != self.num_rows or not all(torch.equal(places, same) for places in self._places.values())

    def _places_in(self, member: Member) -> Tensor:
        """The row in a model of every row of the result, or ABSENT."""
        places = torch.full((self.num_rows,), ABSENT)
        theirs = member.tokens.ids
        pairs = [
            (row, theirs[token]) for token, row in self._ids.items() if theirs.get(token, member.limit) < member.limit
        ]
        if pairs:
            here, there = torch.tensor(pairs).unbind(1)
            places[here] = there
        return places

    def _num_rows_of(self, source: Source, name: str, axis: int) -> int:
        """One for every token, unless the tensor had not as many before."""
        if name in vocabulary_of(source).short:
            return min(self.num_tokens, source.tensors[name].shape[axis])
        return self.num_rows

    def _lent(self, giving: Sequence[Named], places: Tensor, axis: int, base: Source | None) -> _Lent:
        """What stands in a model for a row that it has not."""
        has = places != ABSENT
        count = has.sum(0)
        giver = torch.where(count == 1, has.int().argmax(0), ZERO)
        among = [source for source, _ in giving]
        several = torch.where(has[among.index(base)], among.index(base), MEAN) if base in among else torch.tensor(MEAN)
        giver = torch.where(count > 1, several, giver)
        row = places.gather(0, giver.clamp(min=0)[None])[0]
        padding = ~self._has_token[: len(count)]
        forced = torch.zeros(len(count), dtype=torch.bool)
        if self._owner in among:
            of_owner = among.index(self._owner)
            source, name = giving[of_owner]
            left_out = padding.clone()
            left_out[min(self.num_tokens, source.tensors[name].shape[axis]) :] = False
            giver[left_out], row[left_out] = of_owner, torch.arange(len(count))[left_out]
            padding &= ~left_out
        for at, said in self._said.items():
            if at < len(count) and (said.force or not has[:, at].all()):
                giver[at], row[at] = self._giver(said, at, giving, places, axis)
                forced[at] = said.force
        return _Lent(giver, row, forced, padding)

    def _giver(self, said: TokenRow, at: int, giving: Sequence[Named], places: Tensor, axis: int) -> tuple[int, int]:
        """The model and the row that the recipe names for a token."""
        if isinstance(said.source, Zero) or said.source is None:
            return ZERO, 0
        reference = said.source.model if isinstance(said.source, OtherToken) else said.source
        token = next(token for token, row in self._ids.items() if row == at)
        member = self._members.get(reference)
        of_model = next((t for t, (source, _) in enumerate(giving) if member and source is member.source), None)
        name = giving[0][1]
        if member is None or of_model is None:
            raise ValueError(
                f"recipe.tokenizer.tokens must take the row of {token!r} from a model that is merged into {name!r}, "
                f"got {reference}"
            )
        row, wanted = int(places[of_model, at]), repr(token)
        if isinstance(said.source, OtherToken):
            other = said.source.token
            row, wanted = (other if isinstance(other, int) else member.tokens.ids.get(other, ABSENT)), repr(other)
        if not 0 <= row < giving[of_model][0].tensors[giving[of_model][1]].shape[axis]:
            raise ValueError(
                f"recipe.tokenizer.tokens must take the row of {token!r} from a token that {reference} has in "
                f"{name!r}, got {wanted}"
            )
        return of_model, row

    def _rows(self, giving: Sequence[Named], t: int, axis: int, places: Tensor, lent: _Lent) -> Rows | None:
        """Of one of the models."""
        source, name = giving[t]
        own = (places[t] != ABSENT) & ~lent.forced
        if own.all() and axis == 0 and torch.equal(places[t], torch.arange(len(own))):
            return None
        lacked = ~own & ~lent.padding
        parts = [_part(giving[t], axis, own, places[t])]
        parts += [_part(giver, axis, lacked & (lent.giver == s), lent.row) for s, giver in enumerate(giving)]
        means = [
            _part(giver, axis, lacked & (lent.giver == MEAN) & (places[s] != ABSENT), places[s])
            for s, giver in enumerate(giving)
        ]
        padding = lent.padding.nonzero().flatten()
        return Rows(len(own), axis, _filled(parts), _filled(means), padding)


@dataclass(frozen=True)
class _Lent:
    """For every row of a tensor, what stands in where a model has none."""

    giver: Tensor  # a model, ZERO or MEAN
    row: Tensor  # of the giver
    forced: Tensor  # bool: it stands in for the models' own rows too
    padding: Tensor  # bool: there is no token


def _part(tensor: Named, axis: int, chosen: Tensor, there: Tensor) -> Part:
    here = chosen.nonzero().flatten()
    return Part(*tensor, here, there[here], axis)


def _filled(parts: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(part for part in parts if len(part.here))
