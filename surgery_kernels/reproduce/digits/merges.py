"""The merges of the digits experiment."""

from __future__ import annotations

from torch import Tensor

from ...merging import Objective, entropy_objective, merge_state_dicts
from ..methods import MERGES
from .experts import Experts, StateDict
from .tasks import TASKS
from .training import classify

ADAMERGING_STEPS = 500


def merge(experts: Experts, name: str, *, adamerging_steps: int = ADAMERGING_STEPS) -> StateDict:
    """One of `MERGES` of the eight experts; AdaMerging learns from the unlabeled test images, as in its paper."""
    options = MERGES[name]
    if options["method"] == "adamerging":
        options = options | {"objective": entropy(experts), "steps": adamerging_steps}
    return merge_state_dicts(experts.pretrained, experts.experts, **options)


def entropy(experts: Experts) -> Objective:
    def logits(features: Tensor, task: str) -> Tensor:
        return classify(features, experts.heads[TASKS.index(task)][None])

    encoder = experts.config.encoder().eval()
    images = dict(zip(TASKS, experts.test.images, strict=True))
    return entropy_objective(encoder, images, logits, seed=experts.config.seed)
