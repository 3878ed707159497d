"""The objective of AdaMerging: the entropy of a model's predictions on unlabeled inputs of every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..calling import call_with
from .adamerging import Objective


class Dataset(Protocol):
    """Map-style: an entry is an input, or a tuple or list that begins with one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def entropy_objective(
    model: nn.Module,
    inputs: Mapping[str, Tensor | Dataset],
    classify: Callable[[Tensor, str], Tensor] = lambda outputs, task: outputs,
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> Objective:
    """``sum_task mean_input entropy(softmax(classify(model(input), task)))`` on a batch of every task, anew each step.

    Args:
        model: In evaluation mode. Runs with the merged tensors in place of its own of the same name, which stay as
            they are. Buffers (running means) get no gradient: their coefficients stay where they start.
        inputs: Unlabeled inputs by task: a tensor [num_inputs, ...] or a map-style dataset, whose labels are ignored.
        classify: Gives the logits [batch, classes] of a task from the model's outputs; every task has its own head.
        batch_size: Inputs of each task and step, drawn without repetition; all of them where there are fewer.
        seed: Of the draws, which depend on it and on the step alone.

    Returns:
        An objective for ``merge_state_dicts(..., method="adamerging")``.

    Raises:
        ValueError: the model is in training mode, there are no inputs, or batch_size is below 1.

    Source: AdaMerging (arXiv 2310.02575), section 3.2.
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode")
    if not inputs:
        raise ValueError("inputs must be of at least one task, got none")
    for task, of_task in inputs.items():
        if len(of_task) == 0:
            raise ValueError(f"inputs[{task!r}] must be at least one input, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or greater, got {batch_size}")

    buffers = {name for name, _ in model.named_buffers()}

    def objective(merged: dict[str, Tensor], step: int) -> Tensor:
        merged = {name: x.detach() if name in buffers else x for name, x in merged.items()}
        generator = np.random.default_rng((seed, step))
        entropies = []
        for task, of_task in inputs.items():
            drawn = generator.choice(len(of_task), min(batch_size, len(of_task)), replace=False)
            logits = classify(call_with(model, merged, _batch(of_task, drawn)), task)
            log_p = logits.log_softmax(dim=-1)
            entropies.append(-(log_p.exp() * log_p).sum(dim=-1).mean())
        return torch.stack(entropies).sum()

    return objective


def _batch(inputs: Tensor | Dataset, drawn: np.ndarray) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs[torch.from_numpy(drawn)]
    entries = [inputs[i] for i in drawn.tolist()]
    return torch.stack([entry[0] if isinstance(entry, (tuple, list)) else entry for entry in entries])
