"""Concrete subspace learning: one random mask that all experts share, learned by gradients of an objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.combine import combine
from ..method import ABOVE_0, AT_LEAST_0, FINITE, Method, Range, shared
from ..scope import Scope
from .adamerging import GRANULARITIES
from .flat import FlatModels
from .learned import Learned, Objective, check_callable, descend, gradient_of, loss_of

MASKS = ("continuous", "discrete", "probabilities", "hard")


class Draw(NamedTuple):
    """Of a mask; without a seed it has no noise."""

    temperature: float
    seed: int | None


@dataclass(frozen=True)
class ConcreteTaskArithmetic(Method):
    """Task arithmetic under one shared mask whose logits, one for every parameter, Adam learns on unlabeled inputs.

    Args:
        objective: Gives a scalar for merged tensors and a step, 0 to steps - 1; `entropy_objective` is the paper's.
        lam: Scale of the sum of the task vectors.
        initial: Logits to start from: a number for all of them, or what was learned.
        lr: Learning rate of Adam on the logits, above 0.
        steps: 0 or more; 0 merges with the initial logits.
        temperature: Of the masks that are drawn while learning, above 0.
        mask: Of the result. "continuous": one more of those; "discrete": zeros and ones, drawn too; "probabilities":
            the sigmoid of the logits; "hard": whether it is above 1/2.
        seed: 0 to 2**31 - 1. Step s draws its mask under seed * 2**32 + s; the result's follows that of the last step.
        receive: Called once with what was learned.

    A mask is divided by its mean in every tensor, and drawn from a counter wherever it is needed, never stored: a step
    is one `combine` under a mask, forward and backward. Every floating-point tensor is masked, buffers too, as in the
    authors' code; FusionBench 0.2.33 masks what requires a gradient, and fails where something does not. A tensor of
    one entry is scaled by 1. Beside the models as for AdaMerging, logits and Adam take four tensors of a model's size.
    """

    name = "concrete_task_arithmetic"
    title = "Concrete task arithmetic"
    formula = "base + mask / mean(mask) * lam * sum_t (expert_t - base)"
    source = "Concrete Subspace Learning (arXiv 2312.06173), algorithm 1"
    decides = "model"
    in_recipes = False
    from_inputs = True

    objective: Objective | None = shared(None, kind=object, meaning="what is to fall")
    lam: float = shared(0.3, range=FINITE, meaning="scale of the sum of task vectors")
    initial: float | Learned = shared(0.0, kind=object, meaning="logits to start from")
    lr: float = shared(1e-3, range=ABOVE_0, meaning="learning rate of Adam on the logits")
    steps: int = shared(2000, kind=int, range=AT_LEAST_0, meaning="steps of Adam on the logits")
    temperature: float = shared(0.5, range=ABOVE_0, meaning="temperature of the masks drawn while learning")
    mask: str = shared("continuous", choices=MASKS, meaning="what mask the result has")
    seed: int = shared(0, kind=int, range=Range(0, 2**31 - 1), meaning="seed of the masks")
    receive: Callable[[Learned], None] | None = shared(None, kind=object, meaning="is called with what was learned")

    @property
    def reads(self) -> int:
        return 2 * self.steps + 1

    @property
    def asks(self) -> int:
        return self.steps

    def check(self, num_tasks: int) -> None:
        check_callable("objective", self.objective)
        check_callable("receive", self.receive, optional=True)
        super().check(num_tasks)
        if not isinstance(self.initial, (int, float, Learned)):
            raise TypeError(f"initial must be a number or what was learned, got {type(self.initial).__name__}")

    @property
    def randomness(self) -> str:
        return f"masks drawn by counter from seed {self.seed}"

    def merge(self, scope: Scope) -> None:
        scope.check_finite()
        with torch.inference_mode(False):  # gradients must work wherever the caller is, also through these tensors
            models = FlatModels(scope)
            masked = Masked(models, self._logits(models), self.temperature, self.seed)
            coefficients = torch.full((scope.num_tasks, 1), self.lam, device=models.base.device)
            losses = masked.learn(
                self.lr, self.steps, lambda step: self._loss(masked, coefficients, step, masked.draw(step))
            )
        with torch.no_grad():
            models.store(masked.merged(coefficients, self._final(masked)), scope)
        if self.receive is not None:
            self.receive(Learned(scope.names, coefficients, losses, masked.logits.detach(), self.seed))

    def _logits(self, models: FlatModels) -> Tensor:
        given = self.initial
        if not isinstance(given, Learned):
            return torch.full_like(models.base, float(given), dtype=models.compute)
        given.check_names("initial", models.names)
        if given.mask_logits is None or given.mask_logits.numel() != models.base.numel():
            raise ValueError(f"initial must have {models.base.numel()} mask_logits, got none or others")
        return given.mask_logits.detach().to(models.base.device, models.compute, copy=True)

    def _loss(self, masked: Masked, coefficients: Tensor, step: int, draw: Draw | None = None) -> Tensor:
        assert self.objective is not None
        return loss_of(self.objective, masked.models.parts(masked.merged(coefficients, draw)), step)

    def _final(self, masked: Masked) -> Draw:
        """The mask of the result."""
        last = masked.draw(self.steps)
        if self.mask == "continuous":
            return last
        if self.mask == "discrete":
            return Draw(0.0, last.seed)
        return Draw(1.0 if self.mask == "probabilities" else 0.0, None)


@dataclass(frozen=True)
class ConcreteAdaMerging(ConcreteTaskArithmetic):
    """AdaMerging under one shared mask, learned first: each of its steps looks one step of the coefficients ahead.

    Args:
        granularity: "layer": one coefficient per expert and tensor; "task": one per expert.
        lam: Every coefficient to start from, before every step of the mask and before AdaMerging.
        steps: Of the mask. Each sets the coefficients back to `lam`, moves them by one step of Adam, whose moments
            stay, and then the logits; no gradient goes through the former. Step s asks the objective twice, as steps
            2 s and 2 s + 1.
        inner_lr: Learning rate of those steps of the coefficients, above 0: 1, which is far, is the authors'.
        adamerging_lr, adamerging_steps: Of AdaMerging under the mask of the result, whose steps follow by number. Its
            coefficients are not limited to [0, 1].

    Everything else as for Concrete task arithmetic. One mask is drawn for each step. The authors' code and FusionBench
    0.2.33 take the coefficients' gradient at those of the step before, since they merge before they set them back;
    here it is taken at `lam`, as the algorithm says.
    """

    name = "concrete_adamerging"
    title = "Concrete AdaMerging"
    formula = "base + mask / mean(mask) * sum_t coefficients[t, tensor] * (expert_t - base)"
    source = "Concrete Subspace Learning (arXiv 2312.06173), algorithm 1; AdaMerging (arXiv 2310.02575)"

    steps: int = shared(1000, kind=int, range=AT_LEAST_0, meaning="steps of Adam on the logits")
    granularity: str = shared("layer", choices=GRANULARITIES, meaning="what has a coefficient of its own")
    inner_lr: float = shared(1.0, range=ABOVE_0, meaning="learning rate of the coefficients' steps ahead")
    adamerging_lr: float = shared(1e-3, range=ABOVE_0, meaning="learning rate of Adam on the coefficients")
    adamerging_steps: int = shared(1000, kind=int, range=AT_LEAST_0, meaning="steps of Adam on the coefficients")

    @property
    def reads(self) -> int:
        return 4 * self.steps + 2 * self.adamerging_steps + 1

    @property
    def asks(self) -> int:
        return 2 * self.steps + self.adamerging_steps

    def merge(self, scope: Scope) -> None:
        scope.check_finite()
        with torch.inference_mode(False):
            models = FlatModels(scope)
            masked = Masked(models, self._logits(models), self.temperature, self.seed)
            start, ahead = self._start(models, scope.num_tasks)
            inner = torch.optim.Adam([ahead], lr=self.inner_lr)

            def step_ahead(step: int) -> Tensor:
                draw = masked.draw(step)
                ahead.data.copy_(start)
                ahead.grad = gradient_of(self._loss(masked, ahead, 2 * step, draw), ahead)
                inner.step()
                return self._loss(masked, ahead.detach(), 2 * step + 1, draw)

            losses = [masked.learn(self.lr, self.steps, step_ahead)]
            masked.fix(self._final(masked))
            coefficients = self._start_of_result(start).requires_grad_()
            losses.append(self._adamerging(masked, coefficients))
        with torch.no_grad():
            models.store(masked.merged(coefficients), scope)
        if self.receive is not None:
            found = coefficients.detach()
            self.receive(Learned(scope.names, found, torch.cat(losses), masked.logits.detach(), self.seed))

    def _start(self, models: FlatModels, num_tasks: int) -> tuple[Tensor, Tensor]:
        """`lam` for every coefficient, and those of the steps ahead."""
        shape = num_tasks, len(models.block_offsets(self.granularity)) - 1
        start = torch.full(shape, self.lam, device=models.base.device)
        return start, start.clone().requires_grad_()

    def _start_of_result(self, start: Tensor) -> Tensor:
        given = self.initial.coefficients if isinstance(self.initial, Learned) else start
        if given.shape != start.shape:
            raise ValueError(f"initial must have coefficients of shape {tuple(start.shape)}, got {tuple(given.shape)}")
        return given.detach().to(start.device, copy=True)

    def _adamerging(self, masked: Masked, coefficients: Tensor) -> Tensor:
        def loss_of_step(step: int) -> Tensor:
            return self._loss(masked, coefficients, 2 * self.steps + step)

        optimizer = torch.optim.Adam([coefficients], lr=self.adamerging_lr)
        return descend(optimizer, coefficients, self.adamerging_steps, loss_of_step)


class Masked:
    """Models under a mask of all their entries, which is learned and then fixed."""

    def __init__(self, models: FlatModels, logits: Tensor, temperature: float, seed: int) -> None:
        self.models, self.logits = models, logits.requires_grad_()
        self.temperature, self.seed = temperature, seed
        self.block_offsets = models.block_offsets("layer")  # of the mask's means

    def draw(self, step: int) -> Draw:
        return Draw(self.temperature, self.seed * 2**32 + step)

    def merged(self, coefficients: Tensor, draw: Draw | None = None) -> Tensor:
        """Flat; once the mask is fixed, without one.  # coefficients: [num_tasks, num_tensors or 1]"""
        models, coefficients = self.models, coefficients.expand(-1, len(self.block_offsets) - 1)
        noise = {} if draw is None else {"mask_logits": self.logits, **draw._asdict()}
        return combine(models.base, models.task_vectors, coefficients, self.block_offsets, **noise)

    def learn(self, lr: float, steps: int, loss_of_step: Callable[[int], Tensor]) -> Tensor:
        """The losses before each step of Adam on the logits."""
        optimizer = torch.optim.Adam([self.logits], lr=lr, fused=self.logits.numel() > 0)
        return descend(optimizer, self.logits, steps, loss_of_step)

    @torch.no_grad()
    def fix(self, draw: Draw) -> None:
        """From here on the task vectors are masked, and the mask is drawn no more."""
        vectors, ones = self.models.task_vectors, torch.ones(1, len(self.block_offsets) - 1, device=self.logits.device)
        for t, vector in enumerate(vectors):
            zeros, noise = torch.zeros_like(vector), draw._asdict()
            vectors[t] = combine(zeros, [vector], ones, self.block_offsets, mask_logits=self.logits, **noise)
