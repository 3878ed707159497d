"""Models side by side: a base and task vectors as flat tensors, for what merges a whole model at every step."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..scope import Scope


class FlatModels:
    """The tensors of a scope one after the other, in the widest dtype among them: as much memory again as they take."""

    def __init__(self, scope: Scope) -> None:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in scope.base))
        self.names, self.like = scope.names, scope.base
        self.sizes = [x.numel() for x in scope.base]
        self.base = _side_by_side(scope.base, dtype)
        experts = zip(*scope.experts, strict=True)
        self.task_vectors = [_side_by_side(tensors, dtype).sub_(self.base) for tensors in experts]

    @property
    def compute(self) -> torch.dtype:
        return torch.promote_types(self.base.dtype, torch.float32)

    def block_offsets(self, granularity: str) -> Tensor:
        """A block for every tensor ("layer"), or one of the model ("task")."""
        blocks = self.sizes if granularity == "layer" else [sum(self.sizes)]
        return torch.tensor([0, *blocks]).cumsum(0).to(self.base.device)

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors of a model that lies flat, in their own shapes and dtypes."""
        parts = zip(self.names, self.like, flat.split(self.sizes), strict=True)
        return {name: part.view(like.shape).to(like.dtype) for name, like, part in parts}

    def store(self, flat: Tensor, scope: Scope) -> None:
        for out, part in zip(scope.out, self.parts(flat).values(), strict=True):
            out.copy_(part)


def _side_by_side(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    flat = torch.empty(sum(x.numel() for x in tensors), dtype=dtype, device=tensors[0].device)
    for part, tensor in zip(flat.split([x.numel() for x in tensors]), tensors, strict=True):
        part.view(tensor.shape).copy_(tensor)
    return flat
