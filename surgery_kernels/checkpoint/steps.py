"""What a merge is made of: for every tensor of the result its inputs, method and dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import torch

from ..merging import Method
from ..merging.depths import num_layers
from ..ops import arguments
from ..recipes import Recipe
from ..recipes.model_reference import ModelReference
from ..recipes.parameters import resolve_methods
from ..recipes.slices import Output, Slice
from .computed import is_computed
from .differences import Difference, Match, Pair, match, refuse_stranger, together
from .modules import names_of, slices_over
from .one_model import check_one_model
from .reading.read_ahead import Span
from .reading.source import Source, TensorInfo
from .vocabulary.rows import Rows
from .vocabulary.vocabularies import Vocabularies


@dataclass(frozen=True)
class Input:
    """A tensor of one checkpoint."""

    source: Source
    name: str
    rows: Rows | None = None  # how it is put together; None: it is as it is, or the first rows of it are

    @property
    def info(self) -> TensorInfo:
        return self.source.tensors[self.name]

    @property
    def identity(self) -> list[str | None]:
        return [self.source.name, self.name, str(self.info.dtype), None if self.rows is None else self.rows.identity]


@dataclass(frozen=True)
class Step:
    """One tensor of the result."""

    name: str
    shape: tuple[int, ...]
    first: Input  # the base where there is one; gives the rows that an expert has not
    experts: tuple[Input, ...]  # in the order of the recipe
    method: Method | None  # None: `first` is copied, or cast
    dtype: torch.dtype  # of the inputs of the merge
    out_dtype: torch.dtype
    has_base: bool = False  # `first` is what task vectors are taken from

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What goes into the method, the base first; what is copied where there is none."""
        return (self.first, *self.experts) if self.has_base or not self.experts else self.experts

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_exact(self) -> bool:
        """Whether it is a copy that no rounding can make infinite."""
        return self.method is None and self.dtype == self.out_dtype == self.first.info.dtype

    @property
    def num_draws(self) -> int:
        """Numbers of the plan's generator that it takes."""
        return self.method.num_draws(self.numel, len(self.experts)) if self.method else 0

    @property
    def order_of_draws(self) -> str:
        """By what mergekit sorts tensors before it draws their masks: the last of the names of all inputs.

        Where two have the same, of a layer that is used twice, the first of the result is drawn first; that is
        mergekit's order only as a rule: it leaves it to Python's sets.
        """
        return max(tensor.name for tensor in self.inputs)

    @property
    def nbytes_scratch(self) -> int:
        """Of the inputs, and of a result to be cast, that do not lie in a file as the kernels want them."""
        loaded = [i for i in (self.first, *self.experts) if not self.takes_as_it_is(i)]
        return (len(loaded) + (self.dtype != self.out_dtype)) * self.numel * self.dtype.itemsize

    def takes_as_it_is(self, tensor: Input) -> bool:
        info = tensor.info
        aligned = info.offset is not None and info.offset % info.dtype.itemsize == 0 and info.strides is None
        return aligned and tensor.rows is None and info.dtype == self.dtype  # or its first rows are

    @property
    def spans(self) -> list[Span]:
        """What is read from disk."""
        infos = {id(info): info for info in (self.first.info, *(expert.info for expert in self.experts))}
        return [Span(info.file, info.offset or 0, info.nbytes) for info in infos.values() if info.file is not None]

    @property
    def nbytes_read(self) -> int:
        return sum(span.nbytes for span in self.spans)


def plan_steps(
    recipe: Recipe,
    sources: Mapping[ModelReference, Source],
    vocabularies: Vocabularies,
    options: Mapping[str, Any],
    *,
    merge_computed: bool = False,
) -> tuple[list[Step], list[Difference]]:
    """The steps of all slices, and in what their models differ.

    `merge_computed`: What models compute and do not learn is merged too, where it is floating-point.

    Raises:
        ValueError: a model has nothing to merge, or not what the recipe asks of it.
    """
    check_one_model(recipe, sources)
    steps: list[Step] = []
    differences: list[Difference] = []
    compared: list[tuple[Source, Source, Match]] = []
    slices = slices_over(recipe, sources)
    for part in slices:
        of_part = _SliceOf(recipe, part, sources, vocabularies, merge_computed)
        compared += of_part.compared
        differences += of_part.differences
        steps += of_part.steps(options)
    taking_part = {model.name for _, model, found in compared if found.names}
    for first, model, _ in compared:
        if model.name not in taking_part:
            refuse_stranger(first, model)
    if recipe.origins or len(slices) > 1:
        steps.sort(key=lambda step: step.name)  # as safetensors files have them, whichever slice they are of
    return steps, together(differences)


class _SliceOf:
    """One slice over the checkpoints that it names."""

    def __init__(
        self,
        recipe: Recipe,
        part: Slice,
        sources: Mapping[ModelReference, Source],
        vocabularies: Vocabularies,
        merge_computed: bool,
    ) -> None:
        self._recipe, self._part, self._vocabularies = recipe, part, vocabularies
        self._first = sources[part.first.model]
        self._experts = [sources[expert.model] for expert in part.experts]
        names = names_of(self._first, part.module)
        # of a module only its names tell: a configuration counts the layers of each by another key
        whole = len(names) == len(self._first.tensors)
        self._outputs = part.outputs(names, num_layers(self._first.config or {}) if whole else None)
        self._merged = {output.name for output in self._outputs if self._is_merged(output, merge_computed)}
        if not self._merged and part.experts:
            raise ValueError(f"{self._first.name} must have floating-point tensors to merge, got none")
        self._vocabularies.check(self._first, [self._kept(output).name for output in self._outputs])
        self._matches = self._matched()
        self.compared = [(self._first, model, found) for model, found in zip(self._experts, self._matches, strict=True)]
        self.differences = [difference for found in self._matches for difference in found.differences]

    def steps(self, options: Mapping[str, Any]) -> list[Step]:
        outputs = [output for output in self._outputs if output.name in self._merged]
        methods: dict[str, Method | None] = dict.fromkeys(self._merged)
        if not self._part.is_base_alone:
            methods |= resolve_methods(self._recipe, self._part, outputs, **options)
        return [
            self._merging(output, methods[output.name]) if output.name in methods else self._copying(output)
            for output in self._outputs
        ]

    def _is_merged(self, output: Output, merge_computed: bool) -> bool:
        kept = self._kept(output)
        return kept.info.dtype.is_floating_point and (merge_computed or not is_computed(kept.name, kept.info))

    def _kept(self, output: Output) -> Input:
        return Input(self._first, self._part.first.own_name(output))

    def _matched(self) -> list[Match]:
        found = []
        for expert, source in zip(self._part.experts, self._experts, strict=True):
            pairs = [
                Pair(self._part.first.own_name(output), expert.own_name(output), output.name in self._merged)
                for output in self._outputs
            ]
            belonging = self._part.names(expert, names_of(source, self._part.module)).values()
            casts, of_other_sizes = self._recipe.dtype is not None, self._vocabularies.of_other_sizes
            found.append(match(self._first, source, pairs, belonging, casts=casts, of_other_sizes=of_other_sizes))
        return found

    def _copying(self, output: Output) -> Step:
        kept = self._kept(output)
        return Step(output.name, kept.info.shape, kept, (), None, kept.info.dtype, kept.info.dtype)

    def _merging(self, output: Output, method: Method | None) -> Step:
        """`method`: None casts the base that nothing is merged into."""
        kept = self._kept(output)
        inputs = [kept]
        for source, matched in zip(self._experts, self._matches, strict=True):
            inputs.append(Input(source, matched.names[kept.name]) if kept.name in matched.names else kept)
        with_base = self._part.base is not None or self._part.first.model == self._recipe.base_model
        shape, rows = self._vocabularies.arranged(
            kept.name, [(of.source, of.name) for of in inputs], self._first if with_base else None
        )
        kept, *inputs = (replace(of, rows=own) for of, own in zip(inputs, rows, strict=True))
        has_base = self._part.base is not None
        dtype = self._recipe.dtype or _common_dtype([kept, *inputs] if has_base else inputs)
        return Step(
            output.name, shape, kept, tuple(inputs), method, dtype, self._recipe.out_dtype or dtype, has_base=has_base
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
