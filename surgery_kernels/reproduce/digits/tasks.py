"""Eight tasks from scikit-learn's handwritten digits: the same digits, seen by each task through its own transform.

A stroke of one task is background or another digit's shape in the next, so the experts pull the shared weights apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

NUM_CLASSES = 10
PATCH_ORDER = (9, 2, 14, 5, 0, 11, 7, 12, 3, 15, 6, 1, 10, 4, 13, 8)


def shuffle_patches(images: Tensor) -> Tensor:
    """Reorders the sixteen 2x2 patches of each 8x8 image, the same way for every image."""
    patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 2, 2)
    return patches[:, PATCH_ORDER].reshape(-1, 4, 4, 2, 2).transpose(2, 3).reshape(images.shape)


# Each takes and returns images [num_images, 8, 8] with grey values in [-1, 1].
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda images: images,
    "rot90": lambda images: images.rot90(1, (1, 2)),
    "invert": lambda images: -images,
    "transpose": lambda images: images.transpose(1, 2),
    "rot180": lambda images: images.rot90(2, (1, 2)),
    "flip": lambda images: images.flip(2),
    "shuffle": shuffle_patches,
    "invert+rot270": lambda images: -images.rot90(3, (1, 2)),
}
TASKS = tuple(TRANSFORMS)


@dataclass(frozen=True)
class Split:
    """The images of every task, in the order of `TASKS`; the labels are the same for all."""

    images: Tensor  # [num_tasks, num_images, 8, 8]
    labels: Tensor  # [num_images]


def load_splits(seed: int, test_fraction: float) -> tuple[Split, Split]:
    """Training and test split of the 1797 digits, each class equally frequent in both."""
    digits = load_digits()
    train_pixels, test_pixels, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=test_fraction, stratify=digits.target, random_state=seed
    )
    return make_split(train_pixels, train_labels), make_split(test_pixels, test_labels)


def make_split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    images = torch.as_tensor(pixels, dtype=torch.float32) / 8 - 1  # scikit-learn's grey values are 0 to 16
    return Split(
        torch.stack([transform(images) for transform in TRANSFORMS.values()]),
        torch.as_tensor(labels, dtype=torch.int64),
    )
