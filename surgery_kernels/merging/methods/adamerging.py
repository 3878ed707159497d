"""AdaMerging and aTLAS: the coefficients of task arithmetic, learned by gradients of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import arguments
from ...ops.arguments import PerExpert
from ...ops.combine import MOST_GROUPS, combine
from ...ops.ties_merge import ties_split
from ..method import ABOVE_0, AT_LEAST_0, SHARE_ABOVE_0, Method, Range, per_model, shared
from ..scope import Scope
from .flat import FlatModels
from .learned import Learned, Objective, check_callable, descend, loss_of

GRANULARITIES = ("layer", "task")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class AdaMerging(Method):
    """Task arithmetic with coefficients that Adam learns on unlabeled inputs.

    Args:
        objective: Gives a scalar for merged tensors and a step, 0 to steps - 1; `entropy_objective` is the paper's.
        granularity: "layer": one coefficient per expert and tensor; "task": one per expert.
        density: In (0, 1], one number or one per expert: AdaMerging++, which combines the entries that TIES would keep
            and whose sign it would elect over the whole model. None: all entries.
        initial: Coefficients to start from: one number, a tensor like `Learned.coefficients`, or what was learned.
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
    from_inputs = True

    objective: Objective | None = shared(None, kind=object, meaning="what is to fall")
    granularity: str = shared("layer", choices=GRANULARITIES, meaning="what has a coefficient of its own")
    density: PerExpert | None = per_model(None, range=SHARE_ABOVE_0, meaning="share that TIES keeps first; None: all")
    initial: float | Tensor | Learned = shared(0.3, kind=object, meaning="coefficients to start from")
    lr: float = shared(1e-3, range=ABOVE_0, meaning="learning rate of Adam")
    steps: int = shared(500, kind=int, range=AT_LEAST_0, meaning="steps of Adam")
    receive: Callable[[Learned], None] | None = shared(None, kind=object, meaning="is called with what was learned")

    @property
    def reads(self) -> int:
        return 2 * self.steps + 1  # forward, backward, and the result

    @property
    def asks(self) -> int:
        return self.steps

    def check(self, num_tasks: int) -> None:
        check_callable("objective", self.objective)
        check_callable("receive", self.receive, optional=True)
        super().check(num_tasks)
        if not isinstance(self.initial, (Tensor, Learned)):
            arguments.per_expert("initial", arguments.number("initial", self.initial), num_tasks)

    def merge(self, scope: Scope) -> None:
        scope.check_finite()
        with torch.inference_mode(False):  # gradients must work wherever the caller is, also through these tensors
            models = FlatModels(scope)
            if self.density is not None:
                models.task_vectors = list(ties_split(None, models.task_vectors, density=self.density))
            block_offsets = models.block_offsets(self.granularity)
            raw = self._start(scope, len(block_offsets) - 1, block_offsets.device).requires_grad_()

            def merged() -> Tensor:
                return combine(models.base, models.task_vectors, self._used(raw), block_offsets, seed=self._seed)

            losses = self._learn(raw, lambda: models.parts(merged()))
        with torch.no_grad():
            models.store(merged(), scope)
        if self.receive is not None:
            self.receive(Learned(scope.names, self._used(raw.detach()), losses, seed=self._seed))

    @property
    def _seed(self) -> int:
        """Of groups, where coefficients have some."""
        return 0

    def _shape(self, num_tasks: int, num_blocks: int) -> tuple[int, ...]:
        return num_tasks, num_blocks

    def _used(self, raw: Tensor) -> Tensor:
        """The coefficients that what is learned stands for."""
        return raw.clamp(0, 1)

    def _optimizer(self, raw: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([raw], lr=self.lr)

    def _start(self, scope: Scope, num_blocks: int, device: torch.device) -> Tensor:
        shape, given = self._shape(scope.num_tasks, num_blocks), self.initial
        if isinstance(given, Learned):
            given.check_names("initial", scope.names)
            if len(shape) == 3 and given.seed != self._seed:
                raise ValueError(f"initial must have been learned with seed {self._seed}, got {given.seed}")
            given = given.coefficients
        if not isinstance(given, Tensor):
            return torch.full(shape, float(given), device=device)
        if given.shape != shape:
            raise ValueError(f"initial must be a number or have shape {shape}, got {tuple(given.shape)}")
        return given.detach().to(device, torch.float32, copy=True)

    def _learn(self, raw: Tensor, merged: Callable[[], dict[str, Tensor]]) -> Tensor:
        objective = self.objective
        assert objective is not None
        optimizer = self._optimizer(raw)

        def before_step(step: int) -> None:
            assert raw.grad is not None
            self._limit(raw.grad)
            for group in optimizer.param_groups:
                group["lr"] = self._rate(step)

        return descend(optimizer, raw, self.steps, lambda step: loss_of(objective, merged(), step), before_step)

    def _rate(self, step: int) -> float:
        return self.lr

    def _limit(self, gradient: Tensor) -> None:
        """In place, before a step."""


@dataclass(frozen=True)
class Atlas(AdaMerging):
    """Anisotropic scaling: any coefficients, negative ones too, that AdamW learns from what an objective is given.

    Args:
        objective: Gives a scalar for merged tensors and a step: the cross-entropy of labeled inputs (few of them or
            all), the entropy of unlabeled ones, or for negation the control's loss less the target's.
        granularity: "layer": one coefficient per expert and tensor; "task": the isotropic variant, one per expert.
        weight_decay: Of AdamW, 0 or more.
        clip: Longer gradients are shortened to this, above 0.
        groups: aTLAS x K: so many coefficients, 1 to 256, per expert and tensor, each of about as many of its entries,
            which are drawn at random by a counter and take no memory. The authors' code leaves every tensor but
            matrices as in the base then, and gives all matrices of one shape the same groups.
        seed: Of the groups, any integer of 64 bits.
        schedule: "constant", or "cosine": the learning rate falls to 0 along a cosine, as for few examples.

    Everything else as for AdaMerging. Coefficients start at 0, which is the base.
    """

    name = "atlas"
    title = "aTLAS"
    formula = "base + sum_t coefficients[t, tensor] * (expert_t - base)"
    source = "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (arXiv 2407.02880), section 3"

    initial: float | Tensor | Learned = shared(0.0, kind=object, meaning="coefficients to start from")
    weight_decay: float = shared(0.1, range=AT_LEAST_0, meaning="weight decay of AdamW")
    clip: float = shared(1.0, range=ABOVE_0, meaning="length that longer gradients are shortened to")

    groups: int = shared(1, kind=int, range=Range(1, MOST_GROUPS), meaning="coefficients per expert and tensor")
    seed: int = shared(0, kind=int, meaning="seed of the groups")
    schedule: str = shared("constant", choices=SCHEDULES, meaning="how the learning rate goes on")

    @property
    def randomness(self) -> str:
        return f"groups drawn by counter from seed {self.seed}" if self.groups > 1 else ""

    @property
    def _seed(self) -> int:
        return self.seed

    def _shape(self, num_tasks: int, num_blocks: int) -> tuple[int, ...]:
        return (num_tasks, num_blocks) if self.groups == 1 else (num_tasks, num_blocks, self.groups)

    def _used(self, raw: Tensor) -> Tensor:
        return raw

    def _optimizer(self, raw: Tensor) -> torch.optim.Optimizer:
        return torch.optim.AdamW([raw], lr=self.lr, weight_decay=self.weight_decay)

    def _rate(self, step: int) -> float:
        return self.lr if self.schedule == "constant" else self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2

    def _limit(self, gradient: Tensor) -> None:
        gradient.mul_(self.clip / gradient.norm().clamp(min=self.clip))
