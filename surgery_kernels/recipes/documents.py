"""Recipes in a file: one, or several documents of which later ones merge what earlier ones have made.

name: first
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
---
merge_method: slerp
base_model: first                                     # the result of the document of that name
models: [{model: c}]
parameters: {t: 0.5}
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from .model_reference import ModelReference
from .node import Node
from .recipe import Recipe, read_recipe
from .yaml_documents import load_documents


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = False) -> Recipe:
    """The recipe in a YAML file of one document, or given as the mapping that such a file holds.

    Args:
        source: The file or the mapping.
        strict: Refuse what would only be noticed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML or not a recipe; one sentence, which names the line or the key.
    """
    return _only(load_recipes(source, strict=strict))


def parse_recipe(text: str, *, strict: bool = False) -> Recipe:
    """The recipe in a YAML text of one document; arguments and errors as in `load_recipe`."""
    return _only(parse_recipes(text, strict=strict))


def load_recipes(source: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = False) -> list[Recipe]:
    """The recipes in a YAML file, those first that others need; arguments and errors as in `load_recipe`."""
    if isinstance(source, Mapping):
        try:
            return parse_recipes(yaml.safe_dump(dict(source), sort_keys=False), strict=strict)
        except yaml.representer.RepresenterError as error:
            raise ValueError(f"recipe must hold strings, numbers, lists and mappings, got {error.args[-1]!r}") from None
    if not os.path.isfile(source):
        raise FileNotFoundError(f"recipe must be a YAML file, got {os.fspath(source)}")
    try:
        return parse_recipes(Path(source).read_text(encoding="utf-8"), strict=strict)
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe must be text in UTF-8, got {error}") from None


def parse_recipes(text: str, *, strict: bool = False) -> list[Recipe]:
    """The recipes in a YAML text, those first that others need; arguments and errors as in `load_recipe`."""
    documents = load_documents(text, "recipe")
    at = ["recipe"] if len(documents) == 1 else [f"recipe[{i}]" for i in range(len(documents))]
    roots = [
        Node(document.value, path, [f"{path}: {notice}" for notice in document.repeated])
        for document, path in zip(documents, at, strict=True)
    ]
    if len(roots) == 1:
        if isinstance(roots[0].value, dict) and "name" in roots[0].value:
            roots[0].key("name", None).ignored(": only several documents call one another by name")
    else:
        _check_names(roots)
    recipes = [read_recipe(root, document.text) for root, document in zip(roots, documents, strict=True)]
    # what becomes the result is made from all of them
    recipes = [recipe if recipe.name is not None else replace(recipe, source=text) for recipe in recipes]
    notices = [notice for recipe in recipes for notice in recipe.notices]
    if strict and notices:
        raise ValueError(f"recipe must have no notices to be strict, got: {'; '.join(notices)}")
    return _ordered(recipes) if len(recipes) > 1 else recipes


def needed(recipe: Recipe, names: Collection[str]) -> list[str]:
    """Those of the `names` of documents whose results a recipe merges."""
    tokenizer = recipe.tokenizer.source if recipe.tokenizer else None
    models = [*recipe.references, *([tokenizer] if isinstance(tokenizer, ModelReference) else [])]
    locations = [at for model in models for at in (model.model, model.lora) if at]
    return list(dict.fromkeys(at.path for at in locations if at.path in names))


def _only(recipes: Sequence[Recipe]) -> Recipe:
    if len(recipes) > 1:
        raise ValueError(f"recipe must be one document, got {len(recipes)}")
    return recipes[0]


def _check_names(roots: Sequence[Node]) -> None:
    names = [root.value.get("name") if isinstance(root.value, dict) else None for root in roots]
    if names.count(None) > 1:
        raise ValueError(f"recipe must have at most one document without a name, got {names.count(None)}")
    for i, (root, name) in enumerate(zip(roots, names, strict=True)):
        at = root.key("name", name)
        if name is None:
            continue
        if not isinstance(name, str) or not name or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise at.must("be the name of a folder")
        if name in names[:i]:
            raise at.must("be a name that no other document has")


def _ordered(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Every one after those it needs, else as they are written, and the one without a name last."""
    by_name = {recipe.name: recipe for recipe in recipes if recipe.name is not None}
    ordered: list[Recipe] = []
    path: list[Recipe] = []

    def add(recipe: Recipe) -> None:
        if recipe in path:
            circle = " needs ".join(str(each.name) for each in [*path[path.index(recipe) :], recipe])
            raise ValueError(f"recipe must have documents that do not need one another, got {circle}")
        if any(recipe is done for done in ordered):
            return
        path.append(recipe)
        for name in needed(recipe, by_name):
            add(by_name[name])
        path.pop()
        ordered.append(recipe)

    for recipe in sorted(recipes, key=lambda recipe: recipe.name is None):
        add(recipe)
    return ordered
