"""A digits experiment that trains for a moment."""

from __future__ import annotations

from pathlib import Path

from surgery_kernels.reproduce.digits.experts import Config
from surgery_kernels.reproduce.digits.tasks import TASKS

TINY = Config(width=8, depth=2, num_heads=2, num_features=6, pretrain_steps=2, expert_steps=2, multi_task_steps=2)
CHECKPOINTS = {"pretrained", "multi-task", *(f"expert-{name}" for name in TASKS)}


def saved(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.safetensors")}
