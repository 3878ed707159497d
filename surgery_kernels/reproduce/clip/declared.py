"""Every declared method on CLIP's encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ...merging import Objective, diagonal_fisher, gram_matrices
from ..declared import rows, settings
from ..errors import InputError
from ..zero_shot import cosines
from .methods import MERGES, METHODS
from .models import StateDict, VisionEncoder

GRAM_BATCH = 16  # images in one pass


def names() -> list[str]:
    """Besides those that are repaired."""
    repaired = [options["method"] for options in MERGES.values()]
    return [name for name in settings.names(from_inputs=True) if name not in repaired]


def chosen(methods: Sequence[str]) -> tuple[str, ...]:
    """
    Raises:
        InputError: one is not known.
    """
    known = (*METHODS, *names())
    for name in methods:
        if name not in known and list(methods) != ["all"]:
            raise InputError(f"--methods must be all, or of {', '.join(known)}, got {name}")
    return known if list(methods) == ["all"] else tuple(methods)


@dataclass(frozen=True)
class ClipInputs:
    """What unlabeled images say of the experts."""

    encoder: VisionEncoder
    experts: Callable[[], Iterator[tuple[str, StateDict]]]  # by task
    images: Mapping[str, Tensor]  # some of each task
    heads: Mapping[str, Tensor]
    logit_scale: float
    entropy: Callable[[], Objective]
    autocast: Callable[[], AbstractContextManager[object]]
    steps: int

    def objective(self) -> Objective:
        return self.entropy()

    def fishers(self) -> list[Mapping[str, Tensor]]:
        found: list[Mapping[str, Tensor]] = []
        for task, state in self.experts():
            self.encoder.load_state_dict(state)
            classify = partial(self._logits, self.heads[task])
            with self.autocast():
                found.append(diagonal_fisher(self.encoder, self.images[task], classify))
        return found

    def grams(self) -> list[Mapping[str, Tensor]]:
        found: list[Mapping[str, Tensor]] = []
        for task, state in self.experts():
            self.encoder.load_state_dict(state)
            with self.autocast():
                found.append(gram_matrices(self.encoder, self.images[task].split(GRAM_BATCH)))
        return found

    def _logits(self, head: Tensor, features: Tensor) -> Tensor:
        return self.logit_scale * cosines(features, head)


def models(base: StateDict, experts: Sequence[StateDict], name: str, inputs: ClipInputs) -> list[StateDict]:
    """A model for each task, most often the same."""
    return rows.merged(base, experts, name, settings.options(name, len(experts), inputs))
