"""The command `mergekit-yaml`, on machines without a GPU too."""

from __future__ import annotations

import torch

try:  # transformers looks for it; its wheels for CUDA lack two operators where there is no GPU
    import torchvision  # noqa: F401
except RuntimeError:
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from mergekit.scripts.run_yaml import main

if __name__ == "__main__":
    main()
