"""Small networks of every kind that units are matched in, with parameters of which no two are alike."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from surgery_kernels.matching import Symmetries


class ResNet(nn.Module):
    """A stream that a block adds to, with batch norms.  # images [batch, 1, 8, 8]"""

    def __init__(self, width: int = 8, hidden: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.outer = nn.Conv2d(hidden, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.stem(images)).relu()
        x = (x + self.norm2(self.outer(self.norm1(self.inner(x)).relu()))).relu()
        return self.fc(x.mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5))


def with_flattened_channels() -> nn.Module:
    """A channel is four inputs of the last layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )


def with_depthwise() -> nn.Module:
    """Channels that are groups of a convolution."""
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), depthwise, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(2),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def with_groups() -> nn.Module:
    """A convolution whose groups change places as wholes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def with_normed_weight() -> nn.Module:
    """A weight that is computed: a length and a direction."""
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 12))
    return nn.Sequential(nn.Flatten(), normed, nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))


def vit_of_torchvision() -> nn.Module:
    """Attention packed in nn.MultiheadAttention, and a stream that all blocks add to."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=24, num_classes=5
    )


def vit_of_digits() -> nn.Module:
    """Attention with shapes in the module's own code."""
    from surgery_kernels.reproduce.digits.vit import VisionTransformer

    return VisionTransformer(width=16, depth=2, num_features=5)


def resnet_of_torchvision() -> nn.Module:
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as OfTorchvision

    model = OfTorchvision(BasicBlock, [1, 1, 1, 1], num_classes=5)
    return model


IMAGES = {"vit_of_torchvision": (3, 8, 8), "vit_of_digits": (8, 8), "resnet_of_torchvision": (3, 32, 32)}
SMALL = [
    ResNet, mlp, with_flattened_channels, with_depthwise, with_groups, with_normed_weight, vit_of_torchvision,
    vit_of_digits,
]  # fmt: skip


def made(kind: Callable[[], nn.Module], seed: int) -> nn.Module:
    """In evaluation mode; biases, norms and statistics are not what they start from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind().eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point() and tensor.dim() < 2:
                    noise = 0.2 * torch.randn_like(tensor)
                    tensor += noise.abs() if name.endswith("running_var") else noise
            if isinstance(getattr(model, "heads", None), nn.Module):  # which torchvision starts at 0
                nn.init.normal_(model.heads.head.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    return model


def images(kind: Callable[[], nn.Module], count: int = 48, seed: int = 0) -> Tensor:
    shape = IMAGES.get(kind.__name__, (1, 8, 8))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def shuffled(model: nn.Module, symmetries: Symmetries, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same model with all units in a random order, and that."""
    generator = torch.Generator().manual_seed(seed)
    orders = {group.name: torch.rand(group.shape, generator=generator).argsort() for group in symmetries.groups}
    other = copy.deepcopy(model)
    other.load_state_dict(symmetries.permuted(model.state_dict(), orders))
    return other, orders
