"""A small vision transformer: `embed`, a list of `blocks`, the final `projection`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, normalised before each."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # [batch, num_heads, length, width / num_heads]
        attention = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out(attention.transpose(1, 2).reshape(batch, length, width))
        return tokens + self.contract(F.gelu(self.expand(self.norm2(tokens))))


class VisionTransformer(nn.Module):
    """Encodes grey images into features, as CLIP's image encoder does: the projected class token."""

    def __init__(
        self,
        *,
        image_size: int = 8,
        patch_size: int = 2,
        width: int = 64,
        depth: int = 6,
        num_heads: int = 4,
        num_features: int = 32,
    ) -> None:
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patches = nn.Conv2d(1, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.randn(width))
        self.positions = nn.Parameter(torch.randn(num_patches + 1, width))
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, num_features, bias=False)

    def embed(self, images: Tensor) -> Tensor:
        """Images [batch, image_size, image_size] to tokens [batch, 1 + num_patches, width], the class token first."""
        patches = self.patches(images.unsqueeze(1)).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(len(images), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.positions

    def forward(self, images: Tensor) -> Tensor:
        """Images [batch, image_size, image_size] to features [batch, num_features]."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.projection(self.norm(tokens[:, 0]))
