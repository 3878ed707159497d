"""What is learned by gradients of an objective, and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = "surgery_kernels.learned"  # of the metadata
SEED = "surgery_kernels.seed"

# The merged floating-point tensors by name (of tied ones the first) and the step, to a scalar that is to fall.
Objective = Callable[[dict[str, Tensor], int], Tensor]


@dataclass(frozen=True)
class Learned:
    """What was found, and can be merged with again: ``initial=learned, steps=0``."""

    names: list[str]  # of the merged tensors
    # [num_tasks, num_tensors], or [num_tasks, 1] for granularity="task"; of groups [num_tasks, ..., num_groups]
    coefficients: Tensor
    losses: Tensor  # [steps], of what was learned before each step
    mask_logits: Tensor | None = None  # [num_params], of the tensors one after the other
    seed: int = 0  # of what is drawn: groups and masks

    def save(self, path: str | os.PathLike[str]) -> None:
        """As a safetensors file."""
        from safetensors.torch import save_file

        tensors = {"coefficients": self.coefficients, "losses": self.losses, "mask_logits": self.mask_logits}
        found = {name: x.cpu().contiguous() for name, x in tensors.items() if x is not None}
        save_file(found, path, {NAMES: json.dumps(self.names), SEED: str(self.seed)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Learned:
        """
        Raises:
            ValueError: the file is not one of `save`.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if NAMES not in metadata:
                raise ValueError(f"path must be a file of learned coefficients, got {os.fspath(path)!r}")
            logits = file.get_tensor("mask_logits") if "mask_logits" in file.keys() else None  # noqa: SIM118
            coefficients, losses = file.get_tensor("coefficients"), file.get_tensor("losses")
            return cls(json.loads(metadata[NAMES]), coefficients, losses, logits, int(metadata.get(SEED, 0)))

    def check_names(self, argument: str, names: list[str]) -> None:
        if self.names != names:
            other = next(iter(set(self.names) ^ set(names)), "another order")
            raise ValueError(f"{argument} must have been learned for the tensors of these models, got {other!r}")


def loss_of(objective: Objective, merged: dict[str, Tensor], step: int) -> Tensor:
    """Raises TypeError or RuntimeError for what gives no gradient."""
    loss = objective(merged, step)
    if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
        raise TypeError(f"objective must return a scalar tensor that depends on the merged ones, got {loss}")
    if not loss.isfinite():
        raise RuntimeError(f"objective must return a finite number, got {loss.item()} at step {step}")
    return loss


def gradient_of(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def descend(
    optimizer: torch.optim.Optimizer,
    leaf: Tensor,
    steps: int,
    loss_of_step: Callable[[int], Tensor],
    before_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Moves `leaf` against the gradients of the losses, and gives the losses: float64 [steps].

    before_step: May change the gradient in ``leaf.grad``, and the optimizer's rate.
    """
    losses = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        loss = loss_of_step(step)
        leaf.grad = gradient_of(loss, leaf)
        before_step(step)
        optimizer.step()
        losses[step] = loss.detach()
    leaf.grad = None
    return losses


def check_callable(argument: str, value: object, *, optional: bool = False) -> None:
    if not (callable(value) or (optional and value is None)):
        raise TypeError(f"{argument} must be callable{' or None' if optional else ''}, got {type(value).__name__}")
