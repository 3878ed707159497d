"""AdaMerging: the coefficients of task arithmetic, learned on unlabeled inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.combine import combine
from ...ops.ties_merge import ties_split
from ..method import ABOVE_0, AT_LEAST_0, SHARE_ABOVE_0, Method, per_model, shared
from ..scope import Scope

GRANULARITIES = ("layer", "task")

# The merged floating-point tensors by name (of tied ones the first) and the step, to a scalar that is to fall.
Objective = Callable[[dict[str, Tensor], int], Tensor]


@dataclass(frozen=True)
class Learned:
    """What AdaMerging found."""

    names: list[str]  # of the merged tensors
    coefficients: Tensor  # [num_tasks, num_tensors], or [num_tasks, 1] for granularity="task"; in [0, 1]
    losses: Tensor  # [steps], of the coefficients before each step


@dataclass(frozen=True)
class AdaMerging(Method):
    """Task arithmetic with coefficients that Adam learns on unlabeled inputs.

    Args:
        objective: Gives a scalar for merged tensors and a step, 0 to steps - 1; `entropy_objective` is the paper's.
        granularity: "layer": one coefficient per expert and tensor; "task": one per expert.
        density: In (0, 1], one number or one per expert: AdaMerging++, which combines the entries that TIES would keep
            and whose sign it would elect over the whole model. None: all entries.
        initial: Coefficients to start from: one number, or a tensor like `Learned.coefficients`.
        lr: Learning rate of Adam, above 0.
        steps: 0 or more; 0 merges with the initial coefficients.
        receive: Called once with what was learned.

    Every step merges the whole model by one `combine`, forward and backward; only the objective may draw at random. The
    base and the task vectors are copied side by side in the widest dtype among the tensors: as much memory again as
    base and experts take, for AdaMerging++ twice that of the experts while it trims them.
    """

    name = "adamerging"
    title = "AdaMerging"
    formula = "base + sum_t clamp(coefficients[t, tensor], 0, 1) * (expert_t - base)"
    source = "AdaMerging (arXiv 2310.02575), section 3.2"
    decides = "model"
    in_recipes = False

    objective: Objective | None = shared(None, kind=object, meaning="what is to fall")
    granularity: str = shared("layer", choices=GRANULARITIES, meaning="what has a coefficient of its own")
    density: PerExpert | None = per_model(None, range=SHARE_ABOVE_0, meaning="share that TIES keeps first; None: all")
    initial: float | Tensor = shared(0.3, kind=object, meaning="coefficients to start from")
    lr: float = shared(1e-3, range=ABOVE_0, meaning="learning rate of Adam")
    steps: int = shared(500, kind=int, range=AT_LEAST_0, meaning="steps of Adam")
    receive: Callable[[Learned], None] | None = shared(None, kind=object, meaning="is called with what was learned")

    @property
    def reads(self) -> int:
        return 2 * self.steps + 1  # forward, backward, and the result

    def check(self, num_tasks: int) -> None:
        if not callable(self.objective):
            raise TypeError(f"objective must be callable, got {type(self.objective).__name__}")
        if self.receive is not None and not callable(self.receive):
            raise TypeError(f"receive must be callable or None, got {type(self.receive).__name__}")
        super().check(num_tasks)
        if not isinstance(self.initial, Tensor):
            arguments.per_expert("initial", arguments.number("initial", self.initial), num_tasks)

    def merge(self, scope: Scope) -> None:
        num_tasks, sizes = len(scope.experts[0]), [x.numel() for x in scope.base]
        num_blocks = 1 if self.granularity == "task" else len(sizes)
        scope.check_finite()
        blocks = sizes if self.granularity == "layer" else [sum(sizes)]
        with torch.inference_mode(False):  # its tensors take no part in gradients
            base, task_vectors = self._flatten(scope)
            raw = self._start(num_tasks, num_blocks, base.device).requires_grad_()
            block_offsets = torch.tensor([0, *blocks]).cumsum(0).to(base.device)

        def merged() -> dict[str, Tensor]:
            flat = combine(base, task_vectors, raw.clamp(0, 1), block_offsets)
            parts = zip(scope.names, scope.base, flat.split(sizes), strict=True)
            return {name: part.view(like.shape).to(like.dtype) for name, like, part in parts}

        with torch.inference_mode(False):  # gradients must work wherever the caller is
            losses = self._learn(raw, merged)
        with torch.no_grad():
            for out, part in zip(scope.out, merged().values(), strict=True):
                out.copy_(part)
        if self.receive is not None:
            self.receive(Learned(scope.names, raw.detach().clamp(0, 1), losses))

    def _start(self, num_tasks: int, num_blocks: int, device: torch.device) -> Tensor:
        if not isinstance(self.initial, Tensor):
            return torch.full((num_tasks, num_blocks), float(self.initial), device=device)
        if self.initial.shape != (num_tasks, num_blocks):
            shape = (num_tasks, num_blocks)
            raise ValueError(f"initial must be a number or have shape {shape}, got {tuple(self.initial.shape)}")
        return self.initial.detach().to(device, torch.float32, copy=True)

    def _flatten(self, scope: Scope) -> tuple[Tensor, list[Tensor]]:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in scope.base))
        base = _side_by_side(scope.base, dtype)
        task_vectors = [_side_by_side(tensors, dtype).sub_(base) for tensors in zip(*scope.experts, strict=True)]
        if self.density is not None:
            task_vectors = list(ties_split(None, task_vectors, density=self.density))
        return base, task_vectors

    def _learn(self, raw: Tensor, merged: Callable[[], dict[str, Tensor]]) -> Tensor:
        assert self.objective is not None
        optimizer = torch.optim.Adam([raw], lr=self.lr)
        losses = torch.zeros(self.steps, dtype=torch.float64)
        for step in range(self.steps):
            loss = self.objective(merged(), step)
            if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
                raise TypeError(f"objective must return a scalar tensor that depends on the merged ones, got {loss}")
            if not loss.isfinite():
                raise RuntimeError(f"objective must return a finite number, got {loss.item()} at step {step}")
            (raw.grad,) = torch.autograd.grad(loss, raw)
            optimizer.step()
            losses[step] = loss.detach()
        return losses


def _side_by_side(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    flat = torch.empty(sum(x.numel() for x in tensors), dtype=dtype, device=tensors[0].device)
    for part, tensor in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True):
        part.view(tensor.shape).copy_(tensor)
    return flat
