"""Task vectors of adapters: products of two thin matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """``up @ down``: what a LoRA, scaled, adds to a weight [outputs, inputs]."""

    up: Tensor  # [outputs, rank]
    down: Tensor  # [rank, inputs]
    transposed: bool = False  # the weight itself is [inputs, outputs], as in an embedding

    def __post_init__(self) -> None:
        if self.up.dim() != 2 or self.down.dim() != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"up and down must be [outputs, rank] and [rank, inputs], got {tuple(self.up.shape)} and "
                f"{tuple(self.down.shape)}"
            )

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """[outputs, inputs]"""
        return self.up.shape[0], self.down.shape[1]

    @property
    def product(self) -> Tensor:
        """In the layout of the weight."""
        product = self.up @ self.down
        return product.mT if self.transposed else product

    def to(self, *args: object) -> LowRank:
        """As `Tensor.to`."""
        return replace(self, up=self.up.to(*args), down=self.down.to(*args))  # type: ignore[call-overload]

    def finite_only(self) -> LowRank:
        """Without what makes entries of the product NaN or infinite: those are 0."""
        up = torch.where(self.up.isfinite().all(1, keepdim=True), self.up, 0.0)
        down = torch.where(self.down.isfinite().all(0, keepdim=True), self.down, 0.0)
        return replace(self, up=up, down=down)

    @property
    def is_finite(self) -> bool:
        return bool(self.up.isfinite().all() and self.down.isfinite().all())

    def truncated(self, rank: int) -> LowRank:
        """The nearest product of that rank or less, from factors alone."""
        if rank >= self.rank:
            return self
        left, upper = torch.linalg.qr(self.up.double())
        right, lower = torch.linalg.qr(self.down.double().mT)
        u, s, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        root = s[:rank].sqrt()
        up, down = left @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ right.mT
        return replace(self, up=up.to(self.up.dtype), down=down.to(self.down.dtype))
