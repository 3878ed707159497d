"""What transformers, timm, open_clip and FusionBench look for: torchvision's wheels for CUDA lack two operators where
there is no GPU. To be imported before these."""

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
