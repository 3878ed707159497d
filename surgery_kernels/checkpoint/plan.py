"""Everything a merge will do, decided and checked before the first byte is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .. import _C
from ..ops import arguments
from ..recipes import Recipe
from ..recipes.model_reference import Location, ModelReference
from ..recipes.modules import role_of
from ..recipes.recipe import DTYPES
from .differences import ALLOWABLE, Difference, check_allowed
from .experts import DECISIONS, LAYOUTS, fused_places, in_one_layout, layout_of, written_family
from .layer_lists import COUNTED_BY, counts, uncertain_layers
from .memory import memory_bytes
from .mixture import mixture_steps, output_of
from .modules import left_out
from .reading.companions import Companions, companions
from .reading.lora import LoraExpert
from .reading.opening import find_folder, open_checkpoint
from .reading.quantized import check_plain
from .reading.source import Source
from .steps import Step, plan_steps
from .vocabulary.vocabularies import Vocabularies
from .writing.layout import Layout, lay_out, with_parts

MOST_NEAR = 1 / 12  # of the entries of a tensor, near the thresholds of the model: more are not kept aside
POSITION_BYTES = 8  # of each of them, besides what the models hold there


@dataclass(frozen=True)
class Plan:
    """A merge that can begin; `close` it when done."""

    recipe: Recipe
    sources: Mapping[ModelReference, Source]
    steps: list[Step]
    layout: Layout
    differences: list[Difference]
    nonfinite: str
    vocabularies: Vocabularies
    results: Collection[str] = ()  # the models that are results of earlier documents, as the recipe names them

    @property
    def first(self) -> Source:
        """The checkpoint whose names, shapes and other files the result has."""
        return self.sources[self.recipe.donor]

    @property
    def notices(self) -> list[str]:
        """Sentences that a user should read before the merge begins."""
        of_sources = [notice for source in self.sources.values() for notice in source.notices]
        left = ", ".join(self.companions.left)
        of_files = f"the result goes without these files of {self.first.name}: {left}"
        return [
            *(*self.recipe.notices, *of_sources, *self.vocabularies.notices),
            *self._of_modules,
            *([of_files] if left else []),
        ]

    @property
    def _of_modules(self) -> Iterator[str]:
        """What the recipe leaves out, and what config.json does not say right of the layers that it picks."""
        for missing in left_out(self.recipe, self.first):
            yield f"recipe.modules has no {missing}, which mergekit would leave out: it is that of {self.first.name}"
        config = self.first.config or {}
        for module, origins in self.recipe.origins.items() if config else ():
            role, layers = role_of(module), [layer for _, layer in origins]
            if counting := ", ".join(uncertain_layers(layers, config, role)):
                yield (f"config.json of {self.first.name} tells layers apart by {counting}, which does not follow them")
            if module and role in COUNTED_BY and not counts(config, role):
                yield f"config.json of {self.first.name} does not say how many layers {module} has: set it by hand"

    @cached_property
    def companions(self) -> Companions:
        """The files beside the weights."""
        return companions(self.first)

    @property
    def ordered(self) -> list[Step]:
        """In the order in which they are merged: by name where mergekit draws masks, one tensor after the other."""
        return self.steps if self.generator() is None else sorted(self.steps, key=lambda step: step.order_of_draws)

    def generator(self) -> torch.Generator | None:
        """A new one, of the masks; None where none are drawn one after the other."""
        return self.merged[0].method.generator() if self.merged and self.merged[0].method else None

    @property
    def merged(self) -> list[Step]:
        return [step for step in self.steps if step.method is not None]

    @property
    def nbytes_read(self) -> int:
        """What is decided over the whole model takes a read of its own, unless `reads_once`."""
        twice = self.recipe.scope == "model" and not self.reads_once
        return sum(step.nbytes_read for step in self.steps + (self.merged if twice else []))

    @property
    def reads_once(self) -> bool:
        """Whether limits over the whole model are expected from a sample, and corrected at the end.

        So they are where the memory does not hold what was read: a second read would be from the disk.
        """
        steps = self.merged
        if self.recipe.scope != "model" or not steps or steps[0].method is None or not steps[0].method.expects:
            return False
        num_tasks = len(steps[0].experts)
        return (
            sum(step.nbytes_read for step in steps) > memory_bytes()
            and all(step.has_base and all(map(step.takes_as_it_is, step.inputs)) for step in steps)
            and all(len(step.experts) == num_tasks for step in steps)
            and all(self.layout.places[step.name].strides is None for step in steps)  # amended where it lies
            and 0 not in steps[0].method.ranks(sum(step.numel for step in steps), num_tasks)
        )

    @property
    def nbytes_scratch(self) -> int:
        """Of temporary files, at most."""
        of_steps = [step.nbytes_scratch for step in self.steps]
        if self.reads_once:
            return round(MOST_NEAR * sum(step.nbytes_read + POSITION_BYTES * step.numel for step in self.merged))
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
                [step.name, str(step.dtype), str(step.method), [i.identity for i in (step.first, *step.experts)]]
                for step in self.steps
            ],
            "tokenizer": {name: str(content) for name, content in self.vocabularies.files.items()},
            "files": [[shard.file, shard.header.hex()] for shard in self.layout.shards],
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
    results: Mapping[str, Path] | None = None,
    lora_merge_dtype: str | None = None,
    allow: Collection[str] = (),
    nonfinite: str = "error",
    random_seed: int | None = None,
    stream: str | None = None,
    merge_computed: bool = False,
    moe_layout: str | None = None,
    moe_decisions: str = "matrix",
    unsafe_truncate_embeddings: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> Plan:
    """Opens the checkpoints of a recipe and decides what happens to every tensor.

    Args:
        recipe: From `load_recipe`.
        results: Folders of models that the recipe names otherwise: those of earlier documents.
        lora_merge_dtype: Of models with an adapter, what the adapter changes, by its name such as "float32"; None: that
            of the recipe, or else that of the model.
        allow: Which differences between the checkpoints are accepted: "missing" tensors and those of another "shape"
            are stood in for by the base's, "extra" ones are left out, of a "vocabulary" of another size the common rows
            are merged, of a "buffer" (integers) that differs the base's is kept.
        nonfinite: What NaN or infinity in a tensor does when the merge gets there: "error", "propagate" or "drop", as
            in `surgery_kernels.ties_merge`.
        random_seed: Of methods that draw masks, any integer of 64 bits. Given, masks are those of mergekit's
            ``--random-seed``; None: seed 0, and every entry is drawn by its own counter, which is faster.
        stream: "counter" or "mergekit": how masks are drawn, whether there is a seed or not.
        merge_computed: Merge also the floating-point tensors that models compute and do not learn, such as inv_freq or
            position_ids; else those of the donor are kept.
        moe_layout: Of experts in the result: "fused", all of a layer in two tensors, or "split"; None: the donor's.
            Models of both are merged with one another, matrix by matrix.
        moe_decisions: What a method decides over a tensor it decides of experts over each "matrix", or as mergekit
            0.1.5 over a fused "tensor", all matrices of that kind in a layer; then the result has them fused.
        unsafe_truncate_embeddings: As mergekit's: without a tokenizer in the recipe, of vocabularies of several sizes
            the rows that all have are merged, tensor by tensor, and config.json stays as it is.
        max_shard_bytes: Of tensors in one file, at least 1; a larger tensor has a file of its own.

    Raises:
        ValueError, TypeError, FileNotFoundError: the recipe and the checkpoints do not fit together; every difference
            that is not allowed is named.
    """
    for kind in allow:
        arguments.check_one_of("allow", kind, tuple(ALLOWABLE))
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    if moe_layout is not None:
        arguments.check_one_of("moe_layout", moe_layout, LAYOUTS)
    arguments.check_one_of("moe_decisions", moe_decisions, DECISIONS)
    if moe_decisions == "tensor":
        if moe_layout == "split":
            raise ValueError("moe_layout must be 'fused' where moe_decisions is 'tensor', got 'split'")
        moe_layout = "fused"
    if lora_merge_dtype is not None:
        arguments.check_one_of("lora_merge_dtype", lora_merge_dtype, tuple(DTYPES))
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_size must be at least 1 byte, got {max_shard_bytes}")
    sources: dict[ModelReference, Source] = {}
    try:
        lora_dtype = recipe.dtype if lora_merge_dtype is None else DTYPES[lora_merge_dtype]
        for reference, source in _opened(recipe, results or {}, lora_dtype):
            sources[reference] = source
        return _plan(
            recipe,
            results or {},
            sources,
            {"nonfinite": nonfinite, "random_seed": random_seed, "stream": stream},
            allow=frozenset(allow),
            merge_computed=merge_computed,
            moe_layout=moe_layout,
            moe_decisions=moe_decisions,
            truncated=unsafe_truncate_embeddings,
            max_shard_bytes=max_shard_bytes,
        )
    except BaseException:
        for source in sources.values():
            source.close()
        raise


def _opened(
    recipe: Recipe, results: Mapping[str, Path], lora_dtype: torch.dtype | None
) -> Iterator[tuple[ModelReference, Source]]:
    """Every checkpoint once: the base first, adapters over the model they name or else over the base."""

    def opened(at: Location, below: Source | None = None) -> Source:
        source = open_checkpoint(str(results.get(at.path, at)), base=below, lora_dtype=lora_dtype)
        source.name = str(at)
        return source

    base: Source | None = None
    models: dict[str, Source] = {}
    for reference in sorted(recipe.references, key=lambda reference: reference != recipe.base_model):
        if reference.lora is None:
            source = models.get(str(reference)) or opened(reference.model, base)
        else:
            below = models.get(str(reference.model))
            if below is None:
                below = models[str(reference.model)] = opened(reference.model)
                yield replace(reference, lora=None), below  # to be closed with the others
            source = opened(reference.lora, below)
        models.setdefault(str(reference), source)
        if reference == recipe.base_model:
            base = source
        yield reference, source


def _plan(
    recipe: Recipe,
    results: Mapping[str, Path],
    sources: Mapping[ModelReference, Source],
    options: Mapping[str, Any],
    *,
    allow: frozenset[str],
    merge_computed: bool,
    moe_layout: str | None,
    moe_decisions: str,
    truncated: bool,
    max_shard_bytes: int,
) -> Plan:
    for source in sources.values():
        check_plain(source)
        if isinstance(source, LoraExpert):
            source.check_changes()
    donor = sources.get(replace(recipe.donor, lora=None), sources[recipe.donor])  # as its files are
    is_fused = (moe_layout or layout_of(donor)) == "fused"
    family = written_family(donor, sources.values())
    sources = in_one_layout(sources, moe_decisions)
    vocabularies = Vocabularies(
        recipe, sources, lambda model: results.get(model) or find_folder(model), truncated=truncated
    )
    differences: list[Difference] = []
    if recipe.mixture:
        output = output_of(recipe.mixture, donor)
        is_fused, family = (moe_layout or output.layout) == "fused", output.family
        steps = mixture_steps(recipe, recipe.mixture, sources, options, donor.folder)
    else:
        steps, differences = plan_steps(recipe, sources, vocabularies, options, merge_computed=merge_computed)
    check_allowed(differences, allow)
    if recipe.scope == "model" and len({step.dtype == torch.float64 for step in steps if step.method}) > 1:
        raise ValueError("scope must be 'tensor' for a model that mixes float64 with other dtypes, got 'model'")
    tensors = {step.name: (step.out_dtype, step.shape) for step in steps}
    written, pieces = fused_places(tensors, family) if is_fused else (tensors, {})
    layout = with_parts(lay_out(written, max_shard_bytes, sources[recipe.donor].anatomy.stems), pieces)
    return Plan(recipe, sources, steps, layout, differences, options["nonfinite"], vocabularies, tuple(results))
