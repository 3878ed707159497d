"""Everything a merge will do, decided and checked before the first byte is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import torch

from .. import _C
from ..merging import Method
from ..merging.depths import num_layers
from ..ops import arguments
from ..recipes.parameters import resolve_methods
from ..recipes.recipe import ModelReference, Recipe
from .differences import ALLOWABLE, Difference, Match, check_allowed, match
from .reading.opening import open_checkpoint
from .reading.read_ahead import Span
from .reading.source import Source, TensorInfo
from .vocabulary.layers import is_vocabulary
from .vocabulary.rows import Rows, shared_rows
from .vocabulary.tokens import ids_by_token
from .writing.layout import Layout, lay_out


@dataclass(frozen=True)
class Input:
    """A tensor of one checkpoint."""

    source: Source
    name: str
    rows: Rows | None = None  # of a vocabulary whose tokens have other rows here

    @property
    def info(self) -> TensorInfo:
        return self.source.tensors[self.name]

    @property
    def identity(self) -> list[str | None]:
        return [self.source.name, self.name, None if self.rows is None else self.rows.identity]


@dataclass(frozen=True)
class Step:
    """One tensor of the result."""

    name: str
    shape: tuple[int, ...]
    first: Input  # the base where there is one; gives the rows that an expert has not
    experts: tuple[Input, ...]  # in the order of the recipe
    method: Method | None  # None: `first` is copied
    dtype: torch.dtype  # of the inputs of the merge
    out_dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_draws(self) -> int:
        """Numbers of the plan's generator that it takes."""
        return self.method.num_draws(self.numel, len(self.experts)) if self.method else 0

    @property
    def nbytes_scratch(self) -> int:
        """Of the inputs, and of a result to be cast, that do not lie in a file as the kernels want them."""
        loaded = [i for i in (self.first, *self.experts) if not self.takes_as_it_is(i)]
        return (len(loaded) + (self.dtype != self.out_dtype)) * self.numel * self.dtype.itemsize

    def takes_as_it_is(self, tensor: Input) -> bool:
        info = tensor.info
        aligned = info.offset is not None and info.offset % info.dtype.itemsize == 0 and info.strides is None
        return aligned and tensor.rows is None and info.dtype == self.dtype and info.shape == self.shape

    @property
    def spans(self) -> list[Span]:
        """What is read from disk."""
        infos = {id(info): info for info in (self.first.info, *(expert.info for expert in self.experts))}
        return [Span(info.file, info.offset or 0, info.nbytes) for info in infos.values() if info.file is not None]

    @property
    def nbytes_read(self) -> int:
        return sum(span.nbytes for span in self.spans)


@dataclass(frozen=True)
class Plan:
    """A merge that can begin; `close` it when done."""

    recipe: Recipe
    sources: Mapping[ModelReference, Source]
    steps: list[Step]
    layout: Layout
    differences: list[Difference]
    nonfinite: str

    @property
    def first(self) -> Source:
        """The checkpoint whose names, shapes and other files the result has."""
        return self.sources[self.recipe.donor]

    @property
    def notices(self) -> list[str]:
        """Sentences that a user should read before the merge begins."""
        return [notice for source in self.sources.values() for notice in source.notices]

    @property
    def ordered(self) -> list[Step]:
        """In the order in which they are merged: by name where mergekit draws masks, one tensor after the other."""
        return self.steps if self.generator() is None else sorted(self.steps, key=lambda step: step.name)

    def generator(self) -> torch.Generator | None:
        """A new one, of the masks; None where none are drawn one after the other."""
        return self.merged[0].method.generator() if self.merged and self.merged[0].method else None

    @property
    def merged(self) -> list[Step]:
        return [step for step in self.steps if step.method is not None]

    @property
    def nbytes_read(self) -> int:
        """What is decided over the whole model takes a read of its own."""
        steps = self.steps + (self.merged if self.recipe.scope == "model" else [])
        return sum(step.nbytes_read for step in steps)

    @property
    def nbytes_scratch(self) -> int:
        """Of temporary files, at most."""
        of_steps = [step.nbytes_scratch for step in self.steps]
        return sum(of_steps) if self.recipe.scope == "model" else max(of_steps)

    @property
    def identity(self) -> str:
        """The same for two merges that write the same bytes."""
        facts = {
            "versions": [_C.build_info()["version"], torch.__version__],
            "recipe": self.recipe.source,
            "nonfinite": self.nonfinite,
            "inputs": [[str(f.path), f.size, f.mtime_ns] for s in self.sources.values() for f in s.files],
            "steps": [
                [step.name, str(step.dtype), str(step.method), [e.identity for e in step.experts]]
                for step in self.steps
            ],
            "headers": [shard.header.hex() for shard in self.layout.shards],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def close(self) -> None:
        for source in self.sources.values():
            source.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_merge(
    recipe: Recipe,
    *,
    allow: Collection[str] = (),
    nonfinite: str = "error",
    random_seed: int | None = None,
    stream: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Plan:
    """Opens the checkpoints of a recipe and decides what happens to every tensor.

    Args:
        recipe: From `load_recipe`.
        allow: Which differences between the checkpoints are accepted: "missing" tensors and those of another "shape"
            are stood in for by the base's, "extra" ones are left out, of a "vocabulary" of another size the common rows
            are merged, of a "buffer" (integers) that differs the base's is kept.
        nonfinite: What NaN or infinity in a tensor does when the merge gets there: "error", "propagate" or "drop", as
            in `surgery_kernels.ties_merge`.
        random_seed: Of methods that draw masks, any integer of 64 bits. Given, masks are those of mergekit's
            ``--random-seed``; None: seed 0, and every entry is drawn by its own counter, which is faster.
        stream: "counter" or "mergekit": how masks are drawn, whether there is a seed or not.
        max_shard_bytes: Of tensors in one file, at least 1; a larger tensor has a file of its own.

    Raises:
        ValueError, TypeError, FileNotFoundError: the recipe and the checkpoints do not fit together; every difference
            that is not allowed is named.
    """
    for kind in allow:
        arguments.check_one_of("allow", kind, tuple(ALLOWABLE))
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_bytes}")
    sources: dict[ModelReference, Source] = {}
    try:
        for reference, source in _opened(recipe):
            sources[reference] = source
        options = {"nonfinite": nonfinite, "random_seed": random_seed, "stream": stream}
        return _plan(recipe, sources, frozenset(allow), options, max_shard_bytes)
    except BaseException:
        for source in sources.values():
            source.close()
        raise


def _opened(recipe: Recipe) -> Iterator[tuple[ModelReference, Source]]:
    """Every checkpoint once: the base first, adapters over the model they name or else over the base."""
    base: Source | None = None
    models: dict[str, Source] = {}
    for reference in sorted(recipe.references, key=lambda reference: reference != recipe.base_model):
        if reference.lora is None:
            source = models.get(str(reference)) or open_checkpoint(str(reference.model), base=base)
        else:
            below = models.get(str(reference.model))
            if below is None:
                below = models[str(reference.model)] = open_checkpoint(str(reference.model))
                yield reference.model_copy(update={"lora": None}), below  # to be closed with the others
            source = open_checkpoint(str(reference.lora), base=below)
        models.setdefault(str(reference), source)
        if reference == recipe.base_model:
            base = source
        yield reference, source


def _plan(
    recipe: Recipe,
    sources: Mapping[ModelReference, Source],
    allow: frozenset[str],
    options: Mapping[str, Any],
    max_shard_bytes: int,
) -> Plan:
    for source in sources.values():
        _check_unscaled(source)
    first = sources[recipe.donor]
    experts = [sources[reference] for reference in recipe.experts]
    by_token = recipe.tokenizer_source is not None
    merged = [name for name, info in first.tensors.items() if info.dtype.is_floating_point]
    if not merged:
        raise ValueError(f"{first.name} must have floating-point tensors to merge, got none")
    matches = [match(first, model, merged, casts=recipe.dtype is not None, by_token=by_token) for model in experts]
    differences = [difference for found in matches for difference in found.differences]
    check_allowed(differences, allow)
    methods = resolve_methods(recipe, merged, num_layers(first.config or {}), **options)
    vocabularies = _Vocabularies(first, experts) if by_token else None
    steps = [
        _merging(recipe, name, first, experts, matches, methods[name], vocabularies)
        if name in methods
        else Step(name, info.shape, Input(first, name), (), None, info.dtype, info.dtype)
        for name, info in first.tensors.items()
    ]
    if recipe.scope == "model" and len({step.dtype == torch.float64 for step in steps if step.method}) > 1:
        raise ValueError("scope must be 'tensor' for a model that mixes float64 with other dtypes, got 'model'")
    layout = lay_out({step.name: (step.out_dtype, step.shape) for step in steps}, max_shard_bytes)
    return Plan(recipe, sources, steps, layout, differences, options["nonfinite"])


def _check_unscaled(source: Source) -> None:
    """Numbers that are nothing without the scales beside them could be cast, and would come out as garbage."""
    if (source.config or {}).get("quantization_config"):
        for name, info in source.tensors.items():
            if info.dtype.is_floating_point and info.dtype not in arguments.DTYPES:
                raise ValueError(f"models must be without quantization, got {name!r} of {source.name} in {info.dtype}")


class _Vocabularies:
    """Whose rows are whose, and how many the result has: one for every token of the first model, as in mergekit."""

    def __init__(self, first: Source, experts: Sequence[Source]) -> None:
        tokens = ids_by_token(first)
        if not tokens:
            raise ValueError(
                f"tokenizer_source must be left out for a model without a tokenizer.json, got 'base' and {first.name}"
            )
        self.num_rows = 1 + max(tokens.values())
        self.rows = [shared_rows(tokens, ids_by_token(expert) or tokens) for expert in experts]


def _merging(
    recipe: Recipe,
    name: str,
    first: Source,
    experts: Sequence[Source],
    matches: Sequence[Match],
    method: Method,
    vocabularies: _Vocabularies | None,
) -> Step:
    kept = Input(first, name)
    shape = kept.info.shape
    of_tokens = vocabularies if is_vocabulary(name) and len(shape) == 2 else None
    if of_tokens:
        _check_rows(kept, of_tokens.num_rows)
        shape = (of_tokens.num_rows, *shape[1:])
    inputs = []
    for t, (expert, matched) in enumerate(zip(experts, matches, strict=True)):
        rows = of_tokens.rows[t] if of_tokens else None
        inputs.append(Input(expert, matched.names[name], rows) if name in matched.names else kept)
        if inputs[-1].rows is not None:
            _check_rows(inputs[-1], inputs[-1].rows.num_there)
    dtype = recipe.dtype or _common_dtype([kept, *inputs] if recipe.base else inputs)
    return Step(name, shape, kept, tuple(inputs), method, dtype, recipe.out_dtype or dtype)


def _check_rows(tensor: Input, num_rows: int) -> None:
    if (got := tensor.info.shape[0]) < num_rows:
        raise ValueError(
            f"{tensor.name!r} of {tensor.source.name} must have {num_rows} rows for the tokens it has, got {got}"
        )


def _common_dtype(inputs: Sequence[Input]) -> torch.dtype:
    """What mergekit merges tensors of several dtypes in: the dtype that holds them all."""
    for tensor in inputs:
        if tensor.info.dtype not in arguments.DTYPES:
            raise ValueError(
                f"{tensor.name!r} of {tensor.source.name} must be float64, float32, float16 or bfloat16 unless the "
                f"recipe has a dtype to cast to, got {tensor.info.dtype}"
            )
    return reduce(torch.promote_types, (tensor.info.dtype for tensor in inputs))
