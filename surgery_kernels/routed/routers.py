"""What weighs the experts: from a layer's tokens, or from a model's features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenRouter(nn.Module):
    """Weights of the experts from the tokens that come into a layer, averaged over each sample's.

    Args:
        dim: Width of the tokens.
        num_tasks: Experts.
        initial: What every weight begins near: the coefficient of task arithmetic.
        depth: Linear layers: 2, with a relu between them; 1; or 0, for weights that are the same for all samples.

    Source: WEMoE (arXiv 2402.00433), section 3.2, with FusionBench's initial values.
    """

    def __init__(self, dim: int, num_tasks: int, initial: float, depth: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        widths = {0: [], 1: [dim, num_tasks], 2: [dim, dim, num_tasks]}[depth]
        linear = [nn.Linear(*pair, dtype=dtype) for pair in zip(widths, widths[1:], strict=False)]
        for layer in linear:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        if linear:
            nn.init.constant_(linear[-1].bias, initial)
        else:
            self.weights = nn.Parameter(torch.full((num_tasks,), initial, dtype=dtype))
        self.layers = nn.Sequential(*linear[:1], *(layer for last in linear[1:] for layer in (nn.ReLU(), last)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, num_tokens, dim] to weights [batch, num_tasks], or [1, num_tasks] of depth 0."""
        return self.layers(tokens.to(self.dtype)).mean(dim=1) if len(self.layers) else self.weights[None]


class FeatureRouter(nn.Sequential):
    """Which task a sample is of, from its features [batch, dim]: logits [batch, num_tasks].

    Three linear layers with normalisation over the batch and dropout between them, as the authors have it.

    Source: Twin-Merging (arXiv 2406.15479), section 3.3.
    """

    def __init__(self, dim: int, num_tasks: int, hidden: int) -> None:
        layers: list[nn.Module] = []
        for width in (dim, hidden):
            layers += [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(), nn.Dropout(0.5)]
        super().__init__(*layers, nn.Linear(hidden, num_tasks))
