"""Models read once beside one another."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import TypeVar

from torch import Tensor

from ..checkpoint.differences import ALLOWABLE, Difference
from ..checkpoint.loader import Loader
from ..checkpoint.memory import Releasing, Scratch
from ..checkpoint.plan import Plan, plan_merge
from ..checkpoint.reading.mapped_file import many_files_open
from ..checkpoint.reading.read_ahead import ReadAhead
from ..checkpoint.steps import Step
from ..merging.progress import counting_bar
from ..merging.scope import Scope
from ..ops import arguments
from ..ops.gram import gram
from ..recipes import load_recipe
from .numbers import Numbers, Spectrum, measure, spectrum, total
from .places import kind_of, layer_of
from .result import ResultNumbers, measure_result

Place = TypeVar("Place", bound=Hashable)


@dataclass(frozen=True)
class TensorNumbers:
    """One tensor of all models."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numbers: Numbers
    quantiles: list[list[float]]  # [num_tasks][QUANTILES]
    spectra: list[Spectrum] = field(default_factory=list)  # of the experts, where asked for and it is a matrix
    result: ResultNumbers | None = None  # of a merge

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def kind(self) -> str:
        return kind_of(self.name)


@dataclass(frozen=True)
class Inspection:
    """What several models are to the base that their task vectors are taken from."""

    base: str
    experts: list[str]
    density: float  # at which TIES was asked what it keeps, tensor by tensor
    tensors: list[TensorNumbers]
    differences: list[Difference]  # tensors that only one has, of other shapes and dtypes
    notices: list[str]

    @property
    def labels(self) -> list[str]:
        """Of the experts, for where there is little room."""
        return [f"{t + 1} {short(name)}" for t, name in enumerate(self.experts)]

    @cached_property
    def whole(self) -> Numbers:
        return total(tensor.numbers for tensor in self.tensors)

    @cached_property
    def result(self) -> ResultNumbers | None:
        """Of a merge, all that was merged."""
        found = [tensor.result for tensor in self.tensors if tensor.result is not None]
        return total(found) if found else None

    @cached_property
    def by_layer(self) -> dict[int, Numbers]:
        """In order; what lies in no layer is left out."""
        found = self._by(lambda tensor: tensor.layer)
        return {layer: found[layer] for layer in sorted(layer for layer in found if layer is not None)}

    @cached_property
    def by_kind(self) -> dict[str, Numbers]:
        """The largest change first."""
        found = self._by(lambda tensor: tensor.kind)
        return dict(sorted(found.items(), key=lambda of: -of[1].products.trace().item()))

    def _by(self, place: Callable[[TensorNumbers], Place]) -> dict[Place, Numbers]:
        groups: dict[Place, list[Numbers]] = defaultdict(list)
        for tensor in self.tensors:
            groups[place(tensor)].append(tensor.numbers)
        return {of: total(numbers) for of, numbers in groups.items()}


def short(name: str) -> str:
    """The last part of a path or an id."""
    return PurePath(name).name or name


def inspect_models(
    models: Sequence[str],
    base: str | None = None,
    *,
    density: float = 0.2,
    spectra: bool = False,
    progress: bool | None = None,
) -> Inspection:
    """Reads models once and says what they are to the base and to one another.

    Args:
        models: Checkpoints as recipes name them: folders, files, adapters, ids of the Hub. One or more beside a base.
        base: What they were tuned from; None: the first of the models, of which there must be two then.
        density: In (0, 1], of the TIES whose trimming is tried on every tensor.
        spectra: Also the stable rank and the leading directions of every matrix, by a randomised decomposition.
        progress: A bar on stderr: True, False, or None for one that appears after two seconds.

    Raises:
        ValueError, TypeError, FileNotFoundError: a model cannot be read, or has nothing in common with the base.
    """
    given = list(models)
    if base is None:
        if len(given) < 2:
            raise ValueError(f"models must be two at least without a base, got {len(given)}")
        base, *given = given
    if not given:
        raise ValueError("models must be one at least, got none")
    if not 0 < arguments.number("density", density) <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    recipe = load_recipe(
        {
            "merge_method": "task_arithmetic",
            "base_model": base,
            "models": [{"model": model, "parameters": {"weight": 1}} for model in given],
        }
    )
    with plan_merge(recipe, allow=tuple(ALLOWABLE), nonfinite="propagate") as plan:
        observer = Observer(plan, density, spectra=spectra)
        read(plan, observer, progress)
        return observer.inspection


class Observer:
    """Collects the numbers of the tensors it is shown."""

    def __init__(self, plan: Plan, density: float, *, spectra: bool = False) -> None:
        self._density, self._spectra = density, spectra
        self.inspection = Inspection(
            str(plan.recipe.base),
            [str(model) for model in plan.recipe.experts],
            density,
            [],
            list(plan.differences),
            list(plan.notices),
        )

    def see(
        self,
        step: Step,
        base: Tensor,
        experts: Sequence[Tensor],
        products: Tensor | None = None,
        result: ResultNumbers | None = None,
    ) -> None:
        """Takes a tensor of all models; what is known of it already need not be computed again."""
        numbers, quantiles = measure(base, experts, self._density, products)
        matrices = self._spectra and base.dim() > 1 and base.numel() > 0
        found = [spectrum(base, expert) for expert in experts] if matrices else []
        dtype = str(step.dtype).removeprefix("torch.")
        self.inspection.tensors.append(TensorNumbers(step.name, step.shape, dtype, numbers, quantiles, found, result))

    def see_merged(self, step: Step, scope: Scope, written: Tensor) -> None:
        """A tensor that was merged, as `checkpoint.run` tells of it; one without a base is passed over."""
        if scope.base:
            base, experts, merged = scope.base[0], scope.experts[0], scope.out[0]
            stored = written.to(merged)  # itself, where nothing is cast
            products = gram(base, [*experts, stored], nonfinite="drop")
            self.see(step, base, experts, products[:-1, :-1], measure_result(base, merged, stored, products))


def read(plan: Plan, observer: Observer, progress: bool | None) -> None:
    """Shows an observer every tensor that would be merged, from one read of the models."""
    steps = [step for step in plan.merged if step.has_base]
    total_bytes = sum(step.nbytes_read for step in steps)
    with tempfile.TemporaryDirectory() as folder, many_files_open():
        scratch = Scratch(Path(folder))
        loader = Loader(scratch)
        releases = [source.release for source in plan.sources.values()]
        with (
            Releasing([*releases, scratch.release]),
            counting_bar(total_bytes, "inspecting", "B", progress) as bar,
            ReadAhead(step.spans for step in steps) as ahead,
        ):
            for number, step in enumerate(steps):
                ahead.wait_for(number)
                experts = [loader.load(expert, step) for expert in step.experts]
                observer.see(step, loader.load(step.first, step), experts)
                bar.update(step.nbytes_read)
