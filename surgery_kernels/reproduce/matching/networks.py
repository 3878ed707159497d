"""A perceptron, a residual network with batch norms and a vision transformer, for images [batch, 8, 8]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..digits.vit import VisionTransformer

NUM_CLASSES = 10


def perceptron(hidden: int = 64) -> nn.Module:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
    return layers.append(nn.Linear(hidden, NUM_CLASSES))


class ResNet(nn.Module):
    """A stem and residual blocks of one width, the hidden channels twice as many."""

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.ReLU(),
                nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.unsqueeze(1)).relu()
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x.mean((2, 3)))


def transformer() -> nn.Module:
    return VisionTransformer(width=32, depth=2, num_features=NUM_CLASSES)


# By name: how to make one, and the name of its classifier.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "perceptron": (perceptron, "5"),
    "ResNet": (ResNet, "head"),
    "ViT": (transformer, "projection"),
}


def trained(make: Callable[[], nn.Module], images: Tensor, labels: Tensor, *, steps: int, seed: int) -> nn.Module:
    """From its own initialisation, by Adam with a linearly falling rate on batches of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            rows = torch.randint(len(images), (128,))
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
