"""TIES and surgery as their papers state them, in eager PyTorch: what the library is checked and timed against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .vit import VisionTransformer

StateDict = dict[str, Tensor]
Adapter = tuple[Tensor, Tensor]  # down [rank, dim], up [dim, rank]


def ties_merge(base: Tensor, experts: Tensor, density: float, lam: float) -> Tensor:
    """Disjoint sum of flattened models: base [num_params], experts [num_tasks, num_params] to merged [num_params]."""
    task_vectors = experts - base
    magnitudes = task_vectors.abs()
    num_params = base.numel()
    thresholds = magnitudes.kthvalue(num_params - int(density * num_params), dim=1, keepdim=True).values
    trimmed = task_vectors * (magnitudes >= thresholds)

    elected = trimmed.sum(0).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)
    agrees = torch.where(elected > 0, trimmed > 0, trimmed < 0)
    return base + lam * (trimmed * agrees).sum(0)


class Representations(nn.Module):
    """What surgery compares: the token mean after each block, and the final representation."""

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, adapters: Sequence[Adapter | None]) -> list[Tensor]:
        """Images [batch, 8, 8] to representations [batch, dim]; an adapter, or None, for each of them."""
        *of_blocks, of_final = adapters
        tokens, means = self.encoder.embed(images), []
        for block, adapter in zip(self.encoder.blocks, of_blocks, strict=True):
            tokens = correct(block(tokens), adapter)
            means.append(tokens.mean(dim=1))
        return [*means, correct(self.encoder.projection(self.encoder.norm(tokens[:, 0])), of_final)]


def correct(features: Tensor, adapter: Adapter | None) -> Tensor:
    if adapter is None:
        return features
    down, up = adapter
    return features - torch.relu(features @ down.T) @ up.T


def surgery(
    encoder: VisionTransformer,
    base: StateDict,
    experts: Sequence[StateDict],
    lam: float,
    images: Tensor,
    adapters: Sequence[Sequence[Adapter | None]],
    lr: float,
) -> Tensor:
    """Surgery on task arithmetic the way it was published: nothing is kept from one step to the next.

    Every step of every task merges all experts again, with gradients to their parameters, loads and runs the expert
    of the task, and moves its adapters, and those of the other tasks on momentum: until torch 2 `zero_grad` left
    gradients of zero, which Adam steps on.

    Args:
        encoder: Gives the architecture.
        base, experts: State dicts of the pretrained encoder and of num_tasks experts.
        lam: Scale of the sum of task vectors.
        images: [steps, num_tasks, batch, 8, 8].
        adapters: Of every task, for every block and the final representation: initial values, moved in place; None
            leaves a representation alone, in the model and in the loss.
        lr: Adam's learning rate.

    Returns:
        Losses [steps, num_tasks] before each step.
    """
    model = Representations(encoder)
    leaves = [{name: value.clone().requires_grad_() for name, value in state.items()} for state in (base, *experts)]
    moved = [factor.requires_grad_() for of_task in adapters for adapter in of_task for factor in adapter or ()]
    optimizer = torch.optim.Adam(moved, lr)
    losses = torch.zeros(images.shape[:2])
    for step, of_step in enumerate(images):
        for task, batch in enumerate(of_step):
            merged = {}
            for name, value in leaves[0].items():
                merged[name] = value + lam * torch.stack([leaf[name] - value for leaf in leaves[1:]]).sum(0)
            features = functional_call(model, prefixed(merged), (batch, adapters[task]))
            with torch.no_grad():
                encoder.load_state_dict(experts[task])
                targets = model(batch, [None] * len(features))
            compared = [adapter is not None for adapter in adapters[task]]
            biases = [(x - target).abs().mean() for x, target in zip(features, targets, strict=True)]
            loss = torch.stack([bias for bias, used in zip(biases, compared, strict=True) if used]).sum()
            losses[step, task] = loss.detach()
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
            for leaf in leaves:
                for value in leaf.values():
                    value.grad = None
    return losses


def prefixed(state: StateDict) -> StateDict:
    return {f"encoder.{name}": value for name, value in state.items()}
