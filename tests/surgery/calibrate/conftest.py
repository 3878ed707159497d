from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.reproduce.digits.vit import VisionTransformer
from tests.encoders import samples
from tests.surgery.calibrate.models import family

Models = tuple[nn.Module, nn.Module, dict[str, nn.Module], dict[str, Tensor]]


@pytest.fixture(scope="package")
def models() -> Models:
    """merged, base, experts and batches, of different sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = VisionTransformer(patch_size=4, width=8, depth=2, num_heads=2, num_features=5).double().eval()
    return *family(base), {"a": samples(7, 8, 8).double(), "b": samples(4, 8, 8, seed=1).double()}
