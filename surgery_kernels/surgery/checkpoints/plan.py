"""Everything a calibration from disk to disk will do, decided and checked before the first byte is written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ... import _C
from ...checkpoint.plan import Plan, plan_merge
from ...checkpoint.reading.opening import find_folder
from ...checkpoint.reading.source import FileStamp, Source
from ...ops import arguments
from ...recipes import Recipe, load_recipes
from ..calibrate.settings import Settings
from .data import TokenBatches, check_same_tokens, encoder_of, read_texts, tokenized, tokenizer_of
from .language_model import LanguageModel


@dataclass(frozen=True)
class CalibrationPlan:
    """A calibration that can begin; `close` it when done."""

    merge: Plan  # the models, and how they become one
    merged: Path | None  # where they have become one already
    how: Settings
    config: Any  # of all models, as transformers reads it
    dtype: torch.dtype  # that they run in
    models: Mapping[str, LanguageModel]  # of the experts, as the recipe names them
    base_names: Mapping[str, str]  # of the base's tensors, by those of the backbone's parameters
    batches: Mapping[str, TokenBatches]  # by expert
    max_shard_bytes: int
    facts: tuple[object, ...]  # what else the result depends on

    @property
    def base(self) -> Source | None:
        return self.merge.sources[self.merge.recipe.base_model] if self.merge.recipe.base_model else None

    @property
    def nbytes(self) -> int:
        """On disk while it runs: the merged model, the result and the tokens of two blocks, of two models."""
        of_tokens = self.config.get_text_config().hidden_size * self.dtype.itemsize
        tokens = sum(of_expert.num_tokens for of_expert in self.batches.values())
        return 2 * self.merge.layout.nbytes + self.merge.nbytes_scratch + 4 * tokens * of_tokens

    @property
    def identity(self) -> str:
        """The same for two calibrations that write the same bytes."""
        merged = [str(FileStamp.of(file)) for file in sorted(self.merged.iterdir())] if self.merged else []
        facts = [self.merge.identity, merged, asdict(self.how), self.max_shard_bytes, *self.facts]
        return hashlib.sha256(json.dumps([_C.build_info()["version"], torch.__version__, facts]).encode()).hexdigest()

    def close(self) -> None:
        self.merge.close()

    def __enter__(self) -> CalibrationPlan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_calibration(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    data: str | os.PathLike[str],
    how: Settings,
    *,
    merged: str | os.PathLike[str] | None = None,
    max_length: int = 512,
    batch_size: int = 8,
    max_shard_bytes: int = 5 * 10**9,
) -> CalibrationPlan:
    """Opens the models of a recipe and reads the texts; arguments and errors as of `calibrate_checkpoint`."""
    arguments.check_count("max_length", max_length, least=2)
    arguments.check_count("batch_size", batch_size)
    recipe = recipe if isinstance(recipe, Recipe) else _only(load_recipes(recipe))
    _check_recipe(recipe, how)
    texts = read_texts(Path(data), [str(expert) for expert in recipe.experts])
    config = _config(find_folder(str(recipe.donor.model)))
    plan = plan_merge(recipe, max_shard_bytes=max_shard_bytes)
    try:
        models = {reference: LanguageModel(source, config) for reference, source in plan.sources.items()}
        dtype = _dtype(plan, models[recipe.donor].in_blocks)
        folder = plan.first.folder
        tokenizer = tokenizer_of(folder)
        if tokenizer is None:
            raise ValueError(f"{plan.first.name} must have a tokenizer for the texts, got none in its folder")
        encode = encoder_of(tokenizer)
        for expert in recipe.experts:
            of_expert = tokenizer_of(plan.sources[expert].folder)
            if of_expert is not None:
                check_same_tokens(str(expert), of_expert, texts[str(expert)], encode)
        batches = {name: tokenized(name, lines, encode, max_length, batch_size) for name, lines in texts.items()}
        rows = config.get_text_config().vocab_size
        for name, of_expert in batches.items():
            if of_expert.largest >= rows:
                raise ValueError(f"texts of {name!r} must have tokens of the models' {rows}, got {of_expert.largest}")
        digest = hashlib.sha256(Path(data).read_bytes()).hexdigest()
        return CalibrationPlan(
            merge=plan,
            merged=None if merged is None else _merged(merged),
            how=how,
            config=config,
            dtype=dtype,
            models={str(expert): models[expert] for expert in recipe.experts},
            base_names=models[recipe.base_model].names if recipe.base_model else {},
            batches=batches,
            max_shard_bytes=max_shard_bytes,
            facts=(digest, max_length, batch_size),
        )
    except BaseException:
        plan.close()
        raise


def _only(recipes: list[Recipe]) -> Recipe:
    if len(recipes) > 1:
        raise ValueError(f"recipe must have one document to be calibrated, got {len(recipes)}")
    return recipes[0]


def _check_recipe(recipe: Recipe, how: Settings) -> None:
    if recipe.origins or len(recipe.slices) > 1:
        raise ValueError("recipe must be of whole models to be calibrated, got slices")
    if recipe.tokenizer is not None:
        raise ValueError("recipe must keep the tokenizer of its models to be calibrated, got another")
    if recipe.base_model is None and how.anchor != 1:
        raise ValueError(f"anchor must be 1 for a recipe without base_model, got {how.anchor}")


def _config(folder: Path) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError(
            "transformers must be installed for language models: pip install 'surgery-kernels[language]'"
        ) from error
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} must have a config.json that transformers knows, got: {error}") from error


def _dtype(plan: Plan, in_blocks: Collection[str]) -> torch.dtype:
    """Of the merged model's blocks."""
    dtypes = {step.out_dtype for step in plan.steps if step.name in in_blocks and step.out_dtype.is_floating_point}
    if len(dtypes) != 1:
        got = " and ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(f"blocks must be of one dtype to be calibrated, got {got}")
    return dtypes.pop()


def _merged(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ValueError(f"merged must be the folder of a merged model, got {str(folder)!r}")
    return path
