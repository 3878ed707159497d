"""What to merge and how, read from mergekit's YAML.

    merge_method: ties
    base_model: org/base
    models:
      - model: org/expert_a@main
        parameters: {weight: 0.6, density: [0.3, 0.7]}    # over the layers
      - model: ./expert_b
    parameters: {weight: 0.4, density: 0.5, lambda: 0.9, normalize: true}
    dtype: bfloat16

A recipe is refused where mergekit ignores what it says: an unknown key, a parameter that the method does not have.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PrivateAttr, ValidationError, model_validator

from ..merging import METHODS, Method
from ..merging.method import count_in_words
from ..ops import arguments
from .model_reference import ModelReference
from .settings import Setting, check_keys, flag, read_setting, reader_of
from .strict_yaml import load_yaml

RECIPE_METHODS = {name: method for name, method in METHODS.items() if method.in_recipes}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in arguments.DTYPES}
SCOPES = ("tensor", "model")
UNSUPPORTED = {
    "slices": "a merge of whole models",
    "modules": "a merge of whole models",
    "tokenizer": "without a tokenizer of its own (tokenizer_source: base keeps that of the base)",
    "chat_template": "without a chat template of its own (that of the base is kept)",
}


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any]) -> Recipe:
    """The recipe in a YAML file, or given as the mapping that such a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML or not a recipe; one sentence, which names the line or the key.
    """
    if isinstance(source, Mapping):
        try:
            return parse_recipe(yaml.safe_dump(dict(source), sort_keys=False))
        except yaml.representer.RepresenterError as error:
            raise ValueError(f"recipe must hold strings, numbers, lists and mappings, got {error.args[-1]!r}") from None
    if not os.path.isfile(source):
        raise FileNotFoundError(f"recipe must be a YAML file, got {os.fspath(source)}")
    try:
        return parse_recipe(Path(source).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe must be text in UTF-8, got {error}") from None


def parse_recipe(text: str) -> Recipe:
    """The recipe in a YAML text.

    Raises:
        ValueError: it is not YAML or not a recipe; one sentence, which names the line or the key.
    """
    document = load_yaml(text, "recipe")
    try:
        return Recipe.model_validate(document, context=text)
    except ValidationError as error:
        raise ValueError(_sentence(error, document)) from None


class _Mapping(BaseModel):
    """The errors of its validators go on from the path of what they read: " must be ..." or ".dtype must be ..."."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        check_keys(value, cls.keys().values())
        return value

    @classmethod
    def keys(cls) -> dict[str, str]:
        """Of the YAML, by the names of the fields."""
        return {name: field.alias or name for name, field in cls.model_fields.items()}


def _one_of(*choices: str) -> PlainValidator:
    def read(value: Any) -> Any:
        arguments.check_one_of("", value, choices)
        return value

    return PlainValidator(read)


def _read_tokenizer_source(value: Any) -> str | None:
    if value not in ("base", None):
        raise ValueError(f" must be 'base' or left out, got {value!r}")
    return value


def _read_dtype(value: Any) -> torch.dtype | None:
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        raise ValueError(f" must be one of {', '.join(DTYPES)}, got {value!r}")
    return DTYPES[name] if name else None


Dtype = Annotated[torch.dtype | None, PlainValidator(_read_dtype)]


class Model(_Mapping):
    """A model to merge."""

    model: ModelReference
    parameters: Any = None  # as written; `Recipe.settings_of` has read them


class Recipe(_Mapping):
    """A merge: which models, by which method, with which settings."""

    merge_method: Annotated[str, _one_of(*RECIPE_METHODS)]
    base_model: ModelReference | None = None
    models: tuple[Model, ...] = Field(strict=False, min_length=1)  # YAML has lists
    parameters: Any = None  # as written; `settings` has read them
    dtype: Dtype = None
    out_dtype: Dtype = None
    tokenizer_source: Annotated[str | None, PlainValidator(_read_tokenizer_source)] = None
    scope: Annotated[str, _one_of(*SCOPES)] = "tensor"
    _source: str = PrivateAttr()
    _settings: dict[str, Setting] = PrivateAttr()
    _settings_of: list[dict[str, Setting]] = PrivateAttr()

    @property
    def source(self) -> str:
        """The YAML text."""
        return self._source

    @property
    def method(self) -> type[Method]:
        return RECIPE_METHODS[self.merge_method]

    @property
    def settings(self) -> Mapping[str, Setting]:
        """Of the merge and of all models, by their keys."""
        return self._settings

    def settings_of(self, model: ModelReference) -> Mapping[str, Setting]:
        """Of one model: they come before those for all."""
        of_models = zip(self.models, self._settings_of, strict=True)
        return next((settings for entry, settings in of_models if entry.model == model), {})

    @property
    def base(self) -> ModelReference | None:
        """What task vectors are taken from; None for methods to which a base is one model more."""
        return None if self.method.base == "none" else self.base_model

    @property
    def experts(self) -> tuple[ModelReference, ...]:
        """What is merged. Where the method has no base, one that is not among the models comes last."""
        models = [entry.model for entry in self.models if entry.model != self.base]
        if self.method.base == "none" and self.base_model and self.base_model not in models:
            models.append(self.base_model)
        return tuple(models)

    @property
    def donor(self) -> ModelReference:
        """The model whose configuration, tokenizer and other files the merged one gets."""
        return self.base_model or self.models[0].model

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """All models, each once, the base first where there is one."""
        return tuple(dict.fromkeys([self.donor, *self.experts]))

    def model_post_init(self, context: str) -> None:
        self._source = context

    @model_validator(mode="before")
    @classmethod
    def _supported_keys(cls, value: Any) -> Any:
        for key, requirement in UNSUPPORTED.items():
            if isinstance(value, dict) and key in value:
                raise ValueError(f" must be {requirement}, got {key!r}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.method.base == "required" and self.base_model is None:
            raise ValueError(f".base_model must be given for {self.merge_method}, got none")
        if self.method.decides != "scope" and self.scope != "tensor":
            raise ValueError(f".scope must be 'tensor' for {self.merge_method}, got {self.scope!r}")
        models = [entry.model for entry in self.models]
        for i, model in enumerate(models):
            if model in models[:i]:
                raise ValueError(f".models[{i}].model must be a model that is not listed yet, got {model}")
        if not self.method.takes(len(self.experts)):
            besides = " besides the base" if self.base else ""
            listed = ", ".join(map(str, self.experts)) or "none"
            number = count_in_words(self.method)
            raise ValueError(f".models must be {number}{besides} for {self.merge_method}, got {listed}")
        self._settings = self._read(self.parameters, ".parameters", per_model=False)
        self._settings_of = [
            self._read(entry.parameters, f".models[{i}].parameters", per_model=True)
            for i, entry in enumerate(self.models)
        ]
        return self

    def _read(self, written: Any, at: str, *, per_model: bool) -> dict[str, Setting]:
        """The settings of a mapping, by the parameters that the method has."""
        known = {
            parameter.key: reader_of(parameter)
            for parameter in self.method.parameters()
            if parameter.key is not None and (parameter.per_model or not per_model)
        }
        if not per_model:
            known |= dict.fromkeys(self.method.ignored, flag)
        if written is None:
            return {}
        check_keys(written, known, at, f" for {self.merge_method}")
        settings = {}
        for key, value in written.items():
            try:
                settings[key] = read_setting(value, known[key])
            except ValueError as error:
                raise ValueError(f"{at}.{key}{error}") from None
        return settings


def _sentence(error: ValidationError, document: Any) -> str:
    """The first of what pydantic found, with the path as the document has it."""
    first = error.errors()[0]
    path, node = "recipe", document
    for piece in first["loc"]:
        if isinstance(node, dict) and piece in node:
            path, node = f"{path}.{piece}", node[piece]
        elif isinstance(node, list) and isinstance(piece, int):
            path, node = f"{path}[{piece}]", node[piece]
    if first["type"] == "value_error":
        return f"{path}{first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{path}.{first['loc'][-1]} must be given, got none"
    expected = {"string_type": "a string", "tuple_type": "a list", "too_short": "a list of at least one"}
    return f"{path} must be {expected[first['type']]}, got {node!r}"
