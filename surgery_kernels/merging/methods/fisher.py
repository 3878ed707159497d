"""Fisher merging: every parameter is averaged with the certainty of each expert about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from ..method import ABOVE_0, AT_LEAST_0, Method, per_model, shared
from ..scope import Scope


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
    from_inputs = True

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
                self._merge_tensor(part, [of_expert[known[name]] for of_expert in self.fishers], weights)
            else:
                part.mix(weights, divisor=sum(weights), task_vectors=False)

    def _merge_tensor(self, scope: Scope, fishers: Sequence[Tensor], weights: Sequence[float]) -> None:
        (out,), dtypes = scope.out, {fisher.dtype for fisher in fishers}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= {out.dtype, scope.compute} else scope.compute
        torch.ops.surgery_kernels.weighted_merge_out(
            [],
            scope.flat_experts,
            [fisher.detach().to(out.device, dtype) for fisher in fishers],
            weights,
            self.floor,
            names=scope.names,
            called="fishers",
            out=scope.out,
        )


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
