"""AdaMerging and aTLAS: the coefficients of task arithmetic, learned by gradients of an objective."""

from __future__ import annotations

import functools
import json
import os
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
NAMES = "surgery_kernels.learned"  # of the metadata

# The merged floating-point tensors by name (of tied ones the first) and the step, to a scalar that is to fall.
Objective = Callable[[dict[str, Tensor], int], Tensor]


@dataclass(frozen=True)
class Learned:
    """What was found, and can be merged with again: ``initial=learned, steps=0``."""

    names: list[str]  # of the merged tensors
    coefficients: Tensor  # [num_tasks, num_tensors], or [num_tasks, 1] for granularity="task"
    losses: Tensor  # [steps], of the coefficients before each step

    def save(self, path: str | os.PathLike[str]) -> None:
        """As a safetensors file."""
        from safetensors.torch import save_file

        tensors = {"coefficients": self.coefficients.cpu().contiguous(), "losses": self.losses.cpu().contiguous()}
        save_file(tensors, path, {NAMES: json.dumps(self.names)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Learned:
        """
        Raises:
            ValueError: the file is not one of `save`.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            names = (file.metadata() or {}).get(NAMES)
            if names is None:
                raise ValueError(f"path must be a file of learned coefficients, got {os.fspath(path)!r}")
            return cls(json.loads(names), file.get_tensor("coefficients"), file.get_tensor("losses"))


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

    def check(self, num_tasks: int) -> None:
        if not callable(self.objective):
            raise TypeError(f"objective must be callable, got {type(self.objective).__name__}")
        if self.receive is not None and not callable(self.receive):
            raise TypeError(f"receive must be callable or None, got {type(self.receive).__name__}")
        super().check(num_tasks)
        if not isinstance(self.initial, (Tensor, Learned)):
            arguments.per_expert("initial", arguments.number("initial", self.initial), num_tasks)

    def merge(self, scope: Scope) -> None:
        sizes = [x.numel() for x in scope.base]
        num_blocks = 1 if self.granularity == "task" else len(sizes)
        scope.check_finite()
        blocks = sizes if self.granularity == "layer" else [sum(sizes)]
        with torch.inference_mode(False):  # its tensors take no part in gradients
            base, task_vectors = self._flatten(scope)
            raw = self._start(scope, num_blocks, base.device).requires_grad_()
            block_offsets = torch.tensor([0, *blocks]).cumsum(0).to(base.device)

        def merged() -> dict[str, Tensor]:
            flat = combine(base, task_vectors, self._used(raw), block_offsets)
            parts = zip(scope.names, scope.base, flat.split(sizes), strict=True)
            return {name: part.view(like.shape).to(like.dtype) for name, like, part in parts}

        with torch.inference_mode(False):  # gradients must work wherever the caller is
            losses = self._learn(raw, merged)
        with torch.no_grad():
            for out, part in zip(scope.out, merged().values(), strict=True):
                out.copy_(part)
        if self.receive is not None:
            self.receive(Learned(scope.names, self._used(raw.detach()), losses))

    def _used(self, raw: Tensor) -> Tensor:
        """The coefficients that what is learned stands for."""
        return raw.clamp(0, 1)

    def _optimizer(self, raw: Tensor) -> torch.optim.Optimizer:
        return torch.optim.Adam([raw], lr=self.lr)

    def _start(self, scope: Scope, num_blocks: int, device: torch.device) -> Tensor:
        shape, given = (scope.num_tasks, num_blocks), self.initial
        if isinstance(given, Learned):
            if given.names != scope.names:
                other = next(iter(set(given.names) ^ set(scope.names)), "another order")
                raise ValueError(f"initial must have been learned for the tensors of these models, got {other!r}")
            given = given.coefficients
        if not isinstance(given, Tensor):
            return torch.full(shape, float(given), device=device)
        if given.shape != shape:
            raise ValueError(f"initial must be a number or have shape {shape}, got {tuple(given.shape)}")
        return given.detach().to(device, torch.float32, copy=True)

    def _flatten(self, scope: Scope) -> tuple[Tensor, list[Tensor]]:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in scope.base))
        base = _side_by_side(scope.base, dtype)
        task_vectors = [_side_by_side(tensors, dtype).sub_(base) for tensors in zip(*scope.experts, strict=True)]
        if self.density is not None:
            task_vectors = list(ties_split(None, task_vectors, density=self.density))
        return base, task_vectors

    def _learn(self, raw: Tensor, merged: Callable[[], dict[str, Tensor]]) -> Tensor:
        assert self.objective is not None
        optimizer = self._optimizer(raw)
        losses = torch.zeros(self.steps, dtype=torch.float64)
        for step in range(self.steps):
            loss = self.objective(merged(), step)
            if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
                raise TypeError(f"objective must return a scalar tensor that depends on the merged ones, got {loss}")
            if not loss.isfinite():
                raise RuntimeError(f"objective must return a finite number, got {loss.item()} at step {step}")
            (raw.grad,) = torch.autograd.grad(loss, raw)
            self._limit(raw.grad)
            optimizer.step()
            losses[step] = loss.detach()
        return losses

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

    Everything else as for AdaMerging. Coefficients start at 0, which is the base.
    """

    name = "atlas"
    title = "aTLAS"
    formula = "base + sum_t coefficients[t, tensor] * (expert_t - base)"
    source = "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling (arXiv 2407.02880), section 3"

    initial: float | Tensor | Learned = shared(0.0, kind=object, meaning="coefficients to start from")
    weight_decay: float = shared(0.1, range=AT_LEAST_0, meaning="weight decay of AdamW")
    clip: float = shared(1.0, range=ABOVE_0, meaning="length that longer gradients are shortened to")

    def _used(self, raw: Tensor) -> Tensor:
        return raw

    def _optimizer(self, raw: Tensor) -> torch.optim.Optimizer:
        return torch.optim.AdamW([raw], lr=self.lr, weight_decay=self.weight_decay)

    def _limit(self, gradient: Tensor) -> None:
        gradient.mul_(self.clip / gradient.norm().clamp(min=self.clip))


def _side_by_side(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    flat = torch.empty(sum(x.numel() for x in tensors), dtype=dtype, device=tensors[0].device)
    for part, tensor in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True):
        part.view(tensor.shape).copy_(tensor)
    return flat
