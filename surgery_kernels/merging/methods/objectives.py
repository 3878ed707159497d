"""Objectives of what is learned: a model's predictions on inputs of every task, by their entropy or by labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...modules.calling import call_with
from ...modules.device import device_of
from ...modules.inputs import to_device
from ...modules.outputs import logits_of
from ...modules.pools import Batches, Lazy, Pool, pool_of
from ...ops import arguments
from .learned import Objective


def entropy_objective(
    model: nn.Module,
    inputs: Mapping[str, Batches],
    classify: Callable[[Any, str], Tensor] = lambda outputs, task: logits_of(outputs),
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> Objective:
    """``sum_task mean_input entropy(softmax(classify(model(input), task)))`` on a batch of every task, anew each step.

    Args:
        model: In evaluation mode. Runs with the merged tensors in place of its own of the same name, which stay as
            they are. Buffers (running means) get no gradient: their coefficients stay where they start.
        inputs: Unlabeled inputs by task, in every form that `fit` takes: a tensor [num_inputs, ...], a mapping of such
            tensors (the keyword arguments of the model), a map-style dataset, or an iterable of batches, which is read
            to its end and kept; but a list is a dataset, of single inputs. Of tuples the first item is used, of
            mappings all tensors but labels.
        classify: Gives the logits [batch, classes] of a task from the model's outputs; every task has its own head.
            By default the outputs themselves, or their `logits`.
        batch_size: Inputs of each task and step, drawn without repetition; all of them where there are fewer.
        seed: Of the draws, which depend on it and on the step alone.

    Returns:
        An objective for ``merge_state_dicts(..., method="adamerging")``.

    Raises:
        ValueError: the model is in training mode, there are no inputs, or batch_size is below 1.

    Source: AdaMerging (arXiv 2310.02575), section 3.2.
    """

    def entropy(logits: Tensor, task: str, drawn: Tensor) -> Tensor:
        log_p = logits.log_softmax(dim=-1)
        return -(log_p.exp() * log_p).sum(dim=-1).mean()

    return _objective(model, inputs, classify, entropy, batch_size, seed)


def cross_entropy_objective(
    model: nn.Module,
    inputs: Mapping[str, Batches],
    labels: Mapping[str, Tensor],
    classify: Callable[[Any, str], Tensor] = lambda outputs, task: logits_of(outputs),
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> Objective:
    """``sum_task cross_entropy(classify(model(input), task), label)`` on a batch of every task, anew each step.

    Of few inputs, all of which are in every batch, this is aTLAS' few-shot learning.

    Args:
        labels: The class of every input, whole numbers [num_inputs], by task.
        model, inputs, classify, batch_size, seed: As for `entropy_objective`.

    Returns:
        An objective for ``merge_state_dicts(..., method="atlas")``, or any method that learns.

    Raises:
        ValueError: as `entropy_objective`, or labels are of other tasks or of another number of inputs.

    Source: aTLAS (arXiv 2407.02880), section 4.
    """
    if set(labels) != set(inputs):
        raise ValueError(f"labels must be of the tasks of inputs, {', '.join(inputs)}, got {', '.join(labels)}")

    def cross_entropy(logits: Tensor, task: str, drawn: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels[task][drawn].long().to(logits.device))

    return _objective(model, inputs, classify, cross_entropy, batch_size, seed, labels)


def _objective(
    model: nn.Module,
    inputs: Mapping[str, Batches],
    classify: Callable[[Any, str], Tensor],
    loss_of: Callable[[Tensor, str, Tensor], Tensor],
    batch_size: int,
    seed: int,
    labels: Mapping[str, Tensor] | None = None,
) -> Objective:
    """The sum over tasks of ``loss_of(logits, task, which inputs were drawn)``."""
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode")
    if not inputs:
        raise ValueError("inputs must be of at least one task, got none")
    pools = {task: _pool(f"inputs[{task!r}]", of_task) for task, of_task in inputs.items()}
    for task, of_task in (labels or {}).items():
        if of_task.shape != (len(pools[task]),):
            raise ValueError(f"labels[{task!r}] must have shape ({len(pools[task])},), got {tuple(of_task.shape)}")
    arguments.check_count("batch_size", batch_size)

    device = device_of(model)
    buffers = {name for name, _ in model.named_buffers()}

    def objective(merged: dict[str, Tensor], step: int) -> Tensor:
        merged = {name: x.detach() if name in buffers else x for name, x in merged.items()}
        generator = np.random.default_rng((seed, step))
        losses = []
        for task, pool in pools.items():
            drawn = torch.from_numpy(generator.choice(len(pool), min(batch_size, len(pool)), replace=False))
            batch = next(pool.stream([drawn]))
            logits = classify(call_with(model, merged, to_device(batch, device)), task)
            losses.append(loss_of(logits, task, drawn))
        return torch.stack(losses).sum()

    return objective


def _pool(argument: str, inputs: Batches) -> Pool:
    is_list = isinstance(inputs, (list, tuple)) and len(inputs) > 0
    return Lazy(inputs, 0, argument) if is_list else pool_of(argument, inputs)
