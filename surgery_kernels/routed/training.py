"""What is trained of routed models: their routers, from unlabeled inputs or from a few whose task is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..merging.methods.objectives import entropy_objective
from ..merging.progress import counting_bar
from ..modules.device import device_of
from ..modules.frozen import frozen
from ..modules.inputs import to_device
from ..modules.outputs import logits_of
from ..modules.pools import Batches, batches_of
from ..ops import arguments
from .twin import TwinMerging
from .wemoe import WEMoE


@torch.inference_mode(False)  # gradients must work wherever the caller is
def fit_by_entropy(
    model: WEMoE,
    inputs: Mapping[str, Batches],
    classify: Callable[[Any, str], Tensor] = lambda outputs, task: logits_of(outputs),
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    batch_size: int = 16,
    per_sample: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """Adam on the routers, so that predictions on unlabeled inputs of every task become certain.

    Args:
        model: In evaluation mode.
        inputs: Unlabeled inputs by task, in every form that `entropy_objective` takes.
        classify: Gives the logits [batch, classes] of a task from the model's outputs.
        steps: 1 or more.
        lr: Adam's learning rate, greater than 0.
        batch_size: Inputs of each task and step.
        per_sample: Merge for every sample, as the model does when it is used; else once for a task's batch, with the
            mean of its weights, which takes far less time.
        seed: Of the draws.
        progress: A bar on stderr: True, False, or None for one that appears after two seconds.

    Returns:
        The entropy before every step, summed over the tasks.  # float64 [steps]

    Raises:
        ValueError, TypeError: an argument is outside its range, or the model is in training mode.
        RuntimeError: the entropy is not finite.

    Source: WEMoE (arXiv 2402.00433), section 3.3; AdaMerging (arXiv 2310.02575), section 3.2.
    """
    arguments.check_count("steps", steps)
    check_rate(lr)
    objective = entropy_objective(model, inputs, classify, batch_size=batch_size, seed=seed)
    parameters = [parameter for router in model.routers for parameter in router.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses = torch.zeros(steps, dtype=torch.float64)
    merged_once = nullcontext() if per_sample else model.one_merge_a_batch()
    with torch.enable_grad(), merged_once, counting_bar(steps, "routers", "step", progress) as bar:
        for step in range(steps):
            loss = objective({}, step)
            if not loss.isfinite():
                raise RuntimeError(f"entropy must be finite, got {loss.item()} at step {step}")
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
            losses[step] = loss.detach()
            bar.update()
    optimizer.zero_grad()
    return losses


@torch.inference_mode(False)
def fit_router(
    model: TwinMerging,
    inputs: Mapping[str, Batches],
    *,
    hidden: int | None = None,
    steps: int = 200,
    lr: float = 5e-4,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool | None = None,
) -> Tensor:
    """A new router for the model, which learns by Adam on the cross-entropy which task a sample is of.

    The shared model runs once over all samples; the steps see its features alone. A few dozen samples of each task do.

    Args:
        model: Its router, if it has one, is replaced.
        inputs: By name of the task, for all tasks of the model: samples without labels, in every form that `fit` of
            surgery takes.
        hidden: Width of the router's layers; None: twice that of the features.
        steps: 1 or more.
        lr: Adam's learning rate, greater than 0.
        batch_size: Samples of a step, of all tasks together, 2 or more; all of them where there are fewer.
        seed: Of the router's start, its dropout, and the order of the samples.
        progress: A bar on stderr: True, False, or None for one that appears after two seconds.

    Returns:
        The cross-entropy before every step.  # float64 [steps]

    Raises:
        ValueError, TypeError: an argument is outside its range, or a task lacks samples.

    Source: Twin-Merging (arXiv 2406.15479), section 3.3.
    """
    arguments.check_count("steps", steps)
    arguments.check_count("batch_size", batch_size, least=2)
    check_rate(lr)
    if set(inputs) != set(model.tasks):
        raise ValueError(f"inputs must have samples for the tasks {list(model.tasks)}, got {list(inputs)}")
    device = device_of(model.model)
    features, labels = [], []
    with frozen(model), torch.no_grad():
        for number, task in enumerate(model.tasks):
            for batch in batches_of(f"inputs[{task!r}]", inputs[task]):
                features.append(model.features(to_device(batch, device)))
                labels += [number] * len(features[-1])
    if len(set(labels)) < len(model.tasks) or len(labels) < 2:
        raise ValueError("inputs must hold at least one sample of every task and two in all, got fewer")
    rows, truth = torch.cat(features), torch.tensor(labels, device=device)
    hidden = 2 * rows.shape[1] if hidden is None else hidden
    arguments.check_count("hidden", hidden)
    losses = torch.zeros(steps, dtype=torch.float64)
    with torch.enable_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        router = model.put_router(rows.shape[1], hidden).train()
        rows = rows.to(next(router.parameters()).dtype)
        optimizer = torch.optim.Adam(router.parameters(), lr=lr)
        with counting_bar(steps, "router", "step", progress) as bar:
            for step in range(steps):
                drawn = torch.randperm(len(rows), device=device)[:batch_size]
                loss = torch.nn.functional.cross_entropy(router(rows[drawn]), truth[drawn])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[step] = loss.detach()
                bar.update()
    router.requires_grad_(False).train(model.training)
    return losses


def check_rate(lr: float) -> None:
    if not 0 < arguments.number("lr", lr) < math.inf:
        raise ValueError(f"lr must be finite and greater than 0, got {lr}")
