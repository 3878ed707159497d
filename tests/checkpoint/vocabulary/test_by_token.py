"""Whose rows stand where, against the rule in plain words, token by token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels.checkpoint.vocabulary import rows as row_module
from surgery_kernels.checkpoint.vocabulary.by_token import ByToken, Member
from surgery_kernels.checkpoint.vocabulary.tokens import Tokens
from surgery_kernels.recipes.model_reference import Location, ModelReference
from surgery_kernels.recipes.tokenizer import OtherToken, TokenizerSettings, TokenRow, Zero

pytestmark = pytest.mark.any_isa

WORDS = [f"t{i}" for i in range(9)]
NAME = "embed_tokens.weight"


class Model:
    """A source with one tensor."""

    def __init__(self, number: int, ids: dict[str, int], num_rows: int, axis: int) -> None:
        self.name, self.folder, self.config, self.tied = str(number), None, None, {}
        self.ids, self.reference = ids, ModelReference(Location(str(number)))
        shape = (num_rows, 3) if axis == 0 else (3, num_rows)
        self._tensor = torch.randn(shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        self.tensors = {NAME: SimpleNamespace(shape=self._tensor.shape, dtype=self._tensor.dtype)}

    def tensor(self, _: str) -> Tensor:
        return self._tensor

    def row(self, row: int, axis: int) -> Tensor:
        return self._tensor.movedim(axis, 0)[row]

    def has(self, token: str, axis: int) -> bool:
        return self.ids.get(token, 99) < self._tensor.shape[axis]


@st.composite
def merges(draw: st.DrawFn) -> tuple[list[Model], dict[str, int], TokenizerSettings, int, int | None, int | None]:
    """Models, ids of the result, what the recipe says, the dimension of tokens, the base, and whose ids they are."""
    axis = draw(st.sampled_from([0, 0, 1]))
    models = []
    for number in range(draw(st.integers(1, 4))):
        words = draw(st.permutations(WORDS).map(lambda words: words[: draw(st.integers(1, 9))]))
        num_rows = draw(st.integers(1, 11))
        models.append(Model(number, {word: i for i, word in enumerate(words)}, num_rows, axis))
    words = draw(st.permutations(WORDS))[: draw(st.integers(1, 9))]
    if draw(st.booleans()):
        words = list(models[0].ids)
    skipped = draw(st.integers(0, 2))  # ids that no token has
    ids = {word: i + skipped * (i > len(words) // 2) for i, word in enumerate(words)}
    tokens = {}
    for token in draw(st.lists(st.sampled_from(words), max_size=3, unique=True)):
        model = draw(st.sampled_from(models))
        sources: list[Any] = [None, Zero()]
        sources += [model.reference] if model.has(token, axis) else []
        sources += [OtherToken(model.reference, word) for word in model.ids if model.has(word, axis)]
        sources += [OtherToken(model.reference, 0)]
        source = draw(st.sampled_from(sources))
        tokens[token] = TokenRow(source, source is not None and draw(st.booleans()))
    settings = TokenizerSettings("base", tokens, draw(st.sampled_from([None, 4, 16])))
    base, owner = (draw(st.sampled_from([None, *range(len(models))])) for _ in range(2))
    return models, ids, settings, axis, base, owner


def expected(
    model: Model,
    models: list[Model],
    ids: dict[str, int],
    settings: TokenizerSettings,
    axis: int,
    base: int | None,
    owner: int | None,
) -> Tensor:
    num_tokens, multiple = 1 + max(ids.values()), settings.pad_to_multiple_of or 1
    rows = torch.full((-(-num_tokens // multiple) * multiple, 3), float("nan"), dtype=torch.float64)
    for token, at in ids.items():
        having = [other for other in models if other.has(token, axis)]
        said = settings.tokens.get(token, TokenRow())
        if model in having and not said.force:
            rows[at] = model.row(model.ids[token], axis)
        elif isinstance(said.source, Zero):
            rows[at] = 0
        elif isinstance(said.source, OtherToken):
            other = next(other for other in models if other.reference == said.source.model)
            named = said.source.token
            rows[at] = other.row(named if isinstance(named, int) else other.ids[named], axis)
        elif said.source is not None:
            other = next(other for other in models if other.reference == said.source)
            rows[at] = other.row(other.ids[token], axis)
        elif base is not None and len(having) > 1 and models[base] in having:
            rows[at] = models[base].row(models[base].ids[token], axis)
        elif having:
            rows[at] = sum(other.row(other.ids[token], axis) for other in having) / len(having)
        else:
            rows[at] = 0
    for at in range(num_tokens) if owner is not None else ():
        if at not in ids.values() and at < models[owner].tensors[NAME].shape[axis]:
            rows[at] = models[owner].row(at, axis)
    padding = rows.isnan().any(1)
    rows[padding] = rows[~padding].mean(0)
    return rows.movedim(0, axis)


@given(merges(), st.sampled_from([1, 2, 4096]))
def test_rows(
    case: tuple[list[Model], dict[str, int], TokenizerSettings, int, int | None, int | None], at_once: int
) -> None:
    models, ids, settings, axis, base, owner = case
    members = {model.reference: Member(model, Tokens(model.ids), len(model.ids)) for model in models}
    by_token = ByToken(ids, members, settings, None if owner is None else models[owner])
    pairs = [(model, NAME) for model in models]
    num_rows, arranged = by_token.arranged(pairs, axis, None if base is None else models[base])
    assert num_rows == by_token.num_rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_module, "ROWS_AT_ONCE", at_once)
        for model, rows in zip(models, arranged, strict=True):
            wanted = expected(model, models, ids, settings, axis, base, owner)
            if rows is None:
                got = model.tensor(NAME).narrow(axis, 0, num_rows)
            else:
                got = rows.fill(torch.full(wanted.shape, float("nan"), dtype=torch.float64))
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_no_rows_are_moved_where_all_stay() -> None:
    model = Model(0, {word: i for i, word in enumerate(WORDS)}, 11, 0)
    by_token = ByToken(
        model.ids, {model.reference: Member(model, Tokens(model.ids), 11)}, TokenizerSettings("base"), None
    )
    assert by_token.arranged([(model, NAME)], 0, None) == (9, [None])
    assert by_token.moves(11) and not by_token.moves(9)


def test_identities_differ_with_the_rows() -> None:
    models = [Model(i, {word: (j * k) % 9 for j, word in enumerate(WORDS)}, 9, 0) for i, k in enumerate((1, 2, 4))]
    members = {model.reference: Member(model, Tokens(model.ids), 9) for model in models}
    _, arranged = ByToken(models[0].ids, members, TokenizerSettings("base"), models[0]).arranged(
        [(model, NAME) for model in models], 0, None
    )
    assert arranged[0] is None
    assert len({rows.identity for rows in arranged[1:] if rows}) == 2
    assert [list(rows.inputs) for rows in arranged[1:] if rows] == [[(model, NAME)] for model in models[1:]]
