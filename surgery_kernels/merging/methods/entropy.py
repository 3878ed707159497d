"""The objective of AdaMerging: the entropy of a model's predictions on unlabeled inputs of every task."""

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
from .adamerging import Objective


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
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode")
    if not inputs:
        raise ValueError("inputs must be of at least one task, got none")
    pools = {task: _pool(f"inputs[{task!r}]", of_task) for task, of_task in inputs.items()}
    arguments.check_count("batch_size", batch_size)

    device = device_of(model)
    buffers = {name for name, _ in model.named_buffers()}

    def objective(merged: dict[str, Tensor], step: int) -> Tensor:
        merged = {name: x.detach() if name in buffers else x for name, x in merged.items()}
        generator = np.random.default_rng((seed, step))
        entropies = []
        for task, pool in pools.items():
            drawn = generator.choice(len(pool), min(batch_size, len(pool)), replace=False)
            batch = next(pool.stream([torch.from_numpy(drawn)]))
            logits = classify(call_with(model, merged, to_device(batch, device)), task)
            log_p = logits.log_softmax(dim=-1)
            entropies.append(-(log_p.exp() * log_p).sum(dim=-1).mean())
        return torch.stack(entropies).sum()

    return objective


def _pool(argument: str, inputs: Batches) -> Pool:
    is_list = isinstance(inputs, (list, tuple)) and len(inputs) > 0
    return Lazy(inputs, 0, argument) if is_list else pool_of(argument, inputs)
