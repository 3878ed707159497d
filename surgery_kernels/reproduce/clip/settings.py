"""What the user decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .methods import IMAGES, METHODS, RANK, SURGERY


@dataclass(frozen=True)
class Settings:
    """The options of the command; results depend on all but the last two."""

    model_dir: Path
    data_dir: Path
    pretrained: str = "pretrained"
    tasks: Sequence[str] | None = None  # None: all that have an expert and images
    heads: Path | None = None  # None: from the text encoder
    templates: Path | None = None
    methods: Sequence[str] = METHODS
    surgery: Sequence[str] = tuple(SURGERY)
    rank: int = RANK
    v2_rank: int | None = None  # None: the paper's for the architecture
    images: int = IMAGES  # of a task, where there are no steps
    steps: int = 1000
    adamerging_steps: int = 500
    batch_size: int = 16  # images of a task in a step
    adapt_split: str = "test"
    max_images: int | None = None
    device: str = "cpu"
    autocast: str | None = None
    seed: int = 0
    test_batch_size: int = 128
    workers: int = 0

    @property
    def splits(self) -> tuple[str, ...]:
        return ("test",) if self.adapt_split == "test" else ("test", self.adapt_split)

    def as_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
