"""What is left of two networks in one: of the same task, and of tasks with other classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...matching import Matching, Merged, find_symmetries, match_activations, match_weights, pleas
from ..digits.tasks import load_splits
from ..report import say, table
from .networks import NETWORKS, trained

BUDGETS = (1.0, 1.25, 2.0)
TEST_FRACTION = 0.3

Logits = Callable[[Tensor], Tensor]


def run(out: Path, *, seed: int, steps: int) -> None:
    """Prints both tables, and writes them to ``matching.txt``."""
    (images, labels), test = (
        (split.images[0], split.labels) for split in load_splits(seed=seed, test_fraction=TEST_FRACTION)
    )
    same: dict[str, list[float]] = {}
    apart: dict[str, list[float]] = {}
    for number, (name, (make, head)) in enumerate(NETWORKS.items()):
        say(f"{name}: training four networks")
        seeds = [100 * seed + 10 * number + i for i in range(4)]
        pair = [trained(make, images, labels, steps=steps, seed=of_one) for of_one in seeds[:2]]
        for row, merged in merges(pair[0], pair[1], images, heads=()):
            same.setdefault(row, []).append(accuracy(merged.model, *test))
        alone = [accuracy(model, *test) for model in pair]
        same.setdefault("the networks alone", []).append(sum(alone) / 2)
        same.setdefault("mean of both outputs", []).append(accuracy(mean_of(pair[0], pair[1]), *test))

        halves = [labels < 5, labels >= 5]
        of_half = [
            trained(make, images[rows], labels[rows], steps=steps, seed=of_one)
            for rows, of_one in zip(halves, seeds[2:], strict=True)
        ]
        test_halves = [tuple(part[rows] for part in test) for rows in (test[1] < 5, test[1] >= 5)]
        for row, merged in merges(of_half[0], of_half[1], images, heads=(head,)):
            right = [accuracy(merged.use_heads(which), *test_halves[which]) for which in (0, 1)]
            apart.setdefault(row, []).append(sum(right) / 2)
        alone = [accuracy(model, *half) for model, half in zip(of_half, test_halves, strict=True)]
        apart.setdefault("the networks alone", []).append(sum(alone) / 2)
    parts = []
    for title, rows in (
        ("Both networks were trained on all digits", same),
        ("One was trained on 0 to 4, the other on 5 to 9; each keeps its classifier", apart),
    ):
        parts += ["", title, "", table(rows, list(NETWORKS))]
    say("\n".join(parts))
    (out / "matching.txt").write_text("\n".join(parts[1:]) + "\n", encoding="utf-8")


def merges(first: nn.Module, second: nn.Module, images: Tensor, heads: tuple[str, ...]) -> Iterator[tuple[str, Merged]]:
    """Every way to one model, by its name; batch norms take their statistics from the images in each."""
    symmetries = find_symmetries(first, images, heads=heads)
    unmatched = Matching({group.name: torch.arange(group.size).expand(group.shape) for group in symmetries.groups})
    by_activations = match_activations(symmetries, first, second, images)
    for name, matching in (
        ("average", unmatched),
        ("Git Re-Basin, by weights", match_weights(symmetries, first, second)),
        ("matched by activations", by_activations),
    ):
        yield name, pleas(first, second, images, match=matching, heads=heads, least_squares=False)
    for order, title in (("model", "PLeaS"), ("layer", "PLeaS by layers")):
        for budget in BUDGETS:
            merged = pleas(first, second, images, match=by_activations, budget=budget, heads=heads, order=order)
            yield f"{title}, {budget:g} x the parameters", merged


@torch.no_grad()
def accuracy(model: Logits, images: Tensor, labels: Tensor) -> float:
    """In %."""
    return 100 * float((model(images).argmax(-1) == labels).double().mean())


def mean_of(first: nn.Module, second: nn.Module) -> Logits:
    return lambda images: (first(images) + second(images)) / 2
