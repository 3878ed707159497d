"""Several documents in a recipe: their order, and what a wrong one says."""

from __future__ import annotations

import re

import pytest

from surgery_kernels.recipes import load_recipe, parse_recipe, parse_recipes

pytestmark = pytest.mark.any_isa

FIRST = "name: first\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
SECOND = "name: second\nmerge_method: slerp\nbase_model: first@main\nmodels: [{model: c+lora}]\nparameters: {t: 0.5}\n"
LAST = "merge_method: passthrough\nslices: [{sources: [{model: second, layer_range: [0, 1]}]}]\n"


@pytest.mark.parametrize("documents", [[FIRST, SECOND, LAST], [LAST, SECOND, FIRST], [SECOND, "", LAST, FIRST]])
def test_those_that_others_need_come_first(documents: list[str]) -> None:
    text = "---\n".join(documents)
    recipes = parse_recipes(text)
    assert [recipe.name for recipe in recipes] == ["first", "second", None]
    assert [recipe.source for recipe in recipes] == [FIRST, SECOND, text]
    assert not any(recipe.notices for recipe in recipes)


def test_the_document_without_a_name_comes_last() -> None:
    other = FIRST.replace("name: first\n", "")
    assert [recipe.name for recipe in parse_recipes(f"{other}---\n{FIRST}")] == ["first", None]


def test_a_document_that_gives_the_tokenizer() -> None:
    last = "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer_source: first\n"
    assert [recipe.name for recipe in parse_recipes(f"{last}---\n{FIRST}")] == ["first", None]
    circular = [FIRST + "tokenizer: {source: second}\n", SECOND]
    with pytest.raises(ValueError, match="got first needs second needs first"):
        parse_recipes("---\n".join(circular))


def test_the_text_of_a_document() -> None:
    (recipe,) = parse_recipes(f"--- # a\n# b\n{FIRST}...\n")
    assert recipe.source == f"--- # a\n# b\n{FIRST}...\n"
    first, second = parse_recipes(f"# a\n{FIRST}\n--- # b\n{SECOND}# c")
    assert (first.source, second.source) == (f"# a\n{FIRST}", f"# b\n{SECOND}# c\n")


def test_a_name_alone_means_nothing() -> None:
    recipe = parse_recipe(FIRST)
    assert recipe.notices == ("recipe.name is ignored: only several documents call one another by name",)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([FIRST, LAST, LAST], "recipe must have at most one document without a name, got 2"),
        ([FIRST, FIRST], "recipe[1].name must be a name that no other document has, got 'first'"),
        (
            [FIRST, LAST.replace("merge", "name: ../x\nmerge")],
            "recipe[1].name must be the name of a folder, got '../x'",
        ),
        ([FIRST, LAST.replace("merge", "name: /x\nmerge")], "recipe[1].name must be the name of a folder, got '/x'"),
        ([FIRST, LAST.replace("merge", "name: 3\nmerge")], "recipe[1].name must be the name of a folder, got 3"),
        ([FIRST, "a"], "recipe[1] must be a mapping with keys among"),
        ([FIRST.replace("linear", "x"), LAST], "recipe[0].merge_method must be one of"),
        (
            [FIRST.replace("model: b", "model: second"), SECOND],
            "recipe must have documents that do not need one another, got first needs second needs first",
        ),
        ([FIRST.replace("model: b", "model: first"), LAST], "not need one another, got first needs first"),
        ([FIRST, "a: 1\na: ["], "recipe must be valid YAML, got an error in line 7: expected the node content"),
    ],
)
def test_errors(documents: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse_recipes("---\n".join(documents))
    assert "\n" not in str(error.value)


def test_keys_that_are_written_twice() -> None:
    first, last = parse_recipes(f"{FIRST}---\n{LAST}merge_method: linear\nparameters: {{weight: 1}}\n")
    assert first.notices == ()
    assert last.notices == ("recipe[1]: line 6 has 'merge_method', which line 8 has again and replaces",)
    assert last.merge_method == "linear"


def test_one_document_where_one_is_asked_for() -> None:
    with pytest.raises(ValueError, match="^recipe must be one document, got 2$"):
        parse_recipe(f"{FIRST}---\n{LAST}")
    assert load_recipe({"merge_method": "linear", "models": [{"model": "a"}]}).name is None


def test_notices_of_all_documents_are_strict() -> None:
    with pytest.raises(ValueError, match=r"got: recipe\[1\].dype is ignored: did you mean 'dtype'\?$"):
        parse_recipes(f"{FIRST}---\n{LAST}dype: float16\n", strict=True)
