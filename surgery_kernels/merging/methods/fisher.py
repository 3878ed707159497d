"""Fisher merging: every parameter is averaged with the certainty of each expert about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from ...modules.calling import call_with
from ...modules.device import device_of
from ...modules.inputs import batch_size, select, to_device
from ...modules.outputs import logits_of
from ...modules.pools import Batches, batches_of
from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.steps import Steps
from ..method import ABOVE_0, AT_LEAST_0, Method, per_model, shared
from ..scope import Scope

PIECE = 1 << 20  # entries that are widened at a time, where experts are stored in 16 bits


@dataclass(frozen=True)
class Fisher(Method):
    """Averages every parameter with the certainty of each expert about it. The base is not read.

    Args:
        fishers: For each expert the diagonal of its Fisher information by the names of the tensors, in their shapes,
            0 or greater, as `diagonal_fisher` gives it. A tensor that no expert has one for (a buffer) is averaged.
            Those of one tensor are held at a time: a mapping may read them from disk.
        weights: 0 or greater, one number or one per expert.
        floor: Smaller entries count as this, so that a parameter no expert is certain about is averaged; above 0.
    """

    name = "fisher"
    title = "Fisher merging"
    formula = "sum_t weights[t] * F_t * expert_t / sum_t weights[t] * F_t"
    source = "Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832)"
    base = "none"
    decides = "model"
    in_recipes = False

    fishers: Sequence[Mapping[str, Tensor]] = shared((), kind=object, meaning="Fisher information of each expert")
    weights: PerExpert = per_model(1.0, range=AT_LEAST_0, meaning="weight of each expert")
    floor: float = shared(1e-6, range=ABOVE_0, meaning="smaller entries of the information count as this")

    @property
    def reads(self) -> int:
        return 1

    def check(self, num_tasks: int) -> None:
        if len(self.fishers) != num_tasks:
            raise ValueError(f"fishers must be one mapping per expert ({num_tasks}), got {len(self.fishers)}")
        super().check(num_tasks)
        if sum(arguments.per_expert("weights", self.weights, num_tasks)) == 0:
            raise ValueError(f"weights must have a sum above 0, got {self.weights}")

    def merge(self, scope: Scope) -> None:
        known = scope.check_by_name("fishers", self.fishers)
        weights = arguments.per_expert("weights", self.weights, len(self.fishers))
        for part in scope.parts():
            (name,) = part.names
            if name in known:
                fishers = [of_expert[known[name]] for of_expert in self.fishers]
                self._merge_tensor(part, fishers, weights, known[name])
            else:
                part.mix(weights, divisor=sum(weights), task_vectors=False)

    def _merge_tensor(self, scope: Scope, fishers: Sequence[Tensor], weights: Sequence[float], known: str) -> None:
        """One read of experts and Fisher information, whose sums show what is not finite or negative."""
        (experts,), (out,) = scope.experts, scope.out
        steps, sums, numel = _weighted(len(experts)), [], out.numel()
        size = numel if out.dtype == scope.compute else PIECE
        for begin in range(0, numel, max(1, size)):
            inputs, merged = (
                [x.reshape(-1)[begin : begin + size].to(out.device, scope.compute) for x in tensors]
                for tensors in ((*experts, *fishers), [out])
            )
            sums.append(steps.run(inputs, [self.floor, *weights], out=merged))
            if out.dtype != scope.compute:
                out.view(-1)[begin : begin + size] = merged[0]
        found = torch.cat(sums).sum(dim=0).cpu().tolist() if sums else []
        if not all(map(math.isfinite, found)):
            scope.check_finite(task_vectors=False)
        for t, (total, negative) in enumerate(zip(found[1::2], found[2::2], strict=True)):
            if negative or not (math.isfinite(total) or fishers[t].isfinite().all()):
                raise ValueError(f"fishers[{t}][{known!r}] must be finite and 0 or greater, got other values")


@cache
def _weighted(num_tasks: int) -> Steps:
    """The mean of the first inputs by the others, each at least number 0 and times a number of its own.

    Sums: of all first inputs together; then of every other one, and how many of its entries are negative.
    """
    steps = Steps(2 * num_tasks)
    with steps.exact():
        experts, fishers = ([steps.load(first + t) for t in range(num_tasks)] for first in (0, num_tasks))
        certain = [fisher.maximum(steps.number(0)) * steps.number(1 + t) for t, fisher in enumerate(fishers)]
        terms = [x * certainty for x, certainty in zip(experts, certain, strict=True)]
        steps.store(reduce(add, terms) / reduce(add, certain))
        steps.sum(reduce(add, experts))
        for fisher in fishers:
            steps.sum(fisher)
            steps.sum(fisher < 0.0)
    return steps


@torch.inference_mode(False)  # gradients must work wherever the caller is
def diagonal_fisher(
    model: nn.Module,
    batches: Batches,
    classify: Callable[[Any], Tensor] = logits_of,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """``mean_input (d log p(label | input) / d parameter)^2``, the label drawn from the model's own prediction.

    Args:
        model: In evaluation mode; its parameters need not require gradients. It sees one input at a time.
        batches: Unlabeled inputs in every form that `fit` takes; of an iterable of batches one is held at a time.
        classify: Gives the logits [1, classes] from the model's outputs; by default these, or their `logits`.
        seed: Of the draws.

    Returns:
        The diagonal of the Fisher information by the names of ``model.named_parameters()``, float32 (float64 for
        float64 parameters).

    Raises:
        ValueError: the model is in training mode, or there are no inputs.

    Source: Merging Models with Fisher-Weighted Averaging (arXiv 2111.09832).
    """
    if model.training:
        raise ValueError("model must be in evaluation mode, got training mode")
    parameters = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    fisher = {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        for name, p in parameters.items()
    }
    generator, count = torch.Generator().manual_seed(seed), 0
    for batch in batches_of("batches", batches):
        for row in torch.arange(batch_size(batch)).split(1):
            x = to_device(select(batch, row), device_of(model))
            log_p = classify(call_with(model, parameters, x)).log_softmax(dim=-1).flatten()
            label = torch.multinomial(log_p.detach().float().exp().cpu(), 1, generator=generator).item()
            gradients = torch.autograd.grad(log_p[int(label)], list(parameters.values()), allow_unused=True)
            for total, gradient in zip(fisher.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.to(total.dtype).square()
            count += 1
    if count == 0:
        raise ValueError("batches must hold at least one input, got none")
    return {name: total / count for name, total in fisher.items()}
