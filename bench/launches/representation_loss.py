"""What is compiled ahead of time of representation_loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton import representation_loss as loss

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16):
        features = torch.zeros(8, 64, 768, dtype=dtype)

        def both(features: torch.Tensor = features) -> None:
            means, signs = loss.representation_loss(features, features, True)
            loss.representation_loss_backward(means, signs, features.dtype)

        yield Launch(str(dtype).removeprefix("torch."), both, ("_loss_kernel", "_gradient_kernel"))
