"""Thresholds over a model that a sample tells before the model is read.

A merge goes by them and keeps what is near them aside; when all of the model was seen, that tells the exact thresholds,
by which it is merged once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops.steps import Steps
from .scope import Scope

BLOCK = 1 << 20  # bytes of bits looked at in one go
STANDARD_DEVIATIONS = 4  # by which a threshold may be off; beyond them the model is read twice


@dataclass(frozen=True)
class Sample:
    """Entries of a model, in clusters of neighbours spread evenly over it."""

    base: Tensor  # [num_entries]
    experts: list[Tensor]
    ends: Tensor  # int64 [num_clusters]: where each ends
    numel: int  # of the model


@dataclass(frozen=True)
class Expected:
    """Magnitudes between which the thresholds of experts lie, and where most likely."""

    low: list[float]
    middle: list[float]
    high: list[float]

    @classmethod
    def of(cls, sample: Sample, ranks: Sequence[int | None]) -> Expected:
        """ranks: how many entries of the model each expert keeps; None: all."""
        found = [
            (math.inf, 0.0, math.inf) if rank is None else _expected(sample, expert, rank)
            for expert, rank in zip(sample.experts, ranks, strict=True)
        ]
        low, middle, high = zip(*found, strict=True)
        return cls(list(low), list(middle), list(high))


def _expected(sample: Sample, expert: Tensor, rank: int) -> tuple[float, float, float]:
    keys = (expert - sample.base).abs()
    if keys.dtype.itemsize == 2:
        keys = keys.float()
    size, share = len(keys), rank / sample.numel

    def kth_largest(k: int) -> float:
        return float(keys.kthvalue(size - k + 1).values)

    centre = min(max(round(share * size), 1), size)
    middle = kth_largest(centre)
    above = (keys >= middle).cumsum(0)[sample.ends - 1].diff(prepend=sample.ends.new_zeros(1))
    # Neighbouring clusters differ by what is left to chance; those far apart are of other layers.
    variance = max(float((above.diff() ** 2).sum()) / 2, size * share * (1 - share))
    half_width = round(STANDARD_DEVIATIONS * math.sqrt(variance)) + 8
    low = 0.0 if centre + half_width > size else kth_largest(centre + half_width)
    high = math.inf if centre - half_width < 1 else kth_largest(centre - half_width)
    return low, middle, high


@dataclass(frozen=True)
class Near:
    """What one tensor has near the expected thresholds, and all that the rest of it says about the exact ones."""

    positions: Tensor  # int64 [count], ascending, in the flat tensor
    counts: Tensor  # float64 [num_tasks, 2]: magnitudes above the range of the expert, and within it


def near(scope: Scope, expected: Expected, most: float) -> Near | None:
    """The entries of a scope of one tensor at which any expert may be decided otherwise; None: more than `most`.

    Raises:
        RuntimeError: a task vector is not finite.
    """
    numel = scope.experts[0][0].numel()
    bits = torch.empty((numel + 7) // 8, dtype=torch.uint8)
    numbers = [bound for pair in zip(expected.low, expected.high, strict=True) for bound in pair]
    sums = _nearness(scope.num_tasks).run(scope.inputs, numbers, out=[bits]).view(scope.num_tasks, 3)
    if not bool(sums[:, 2].isfinite().all()):
        scope.check_finite()
        raise RuntimeError(f"experts must be finite, got overflows in tensor {scope.names[0]!r}")
    if float(sums[:, 1].sum()) > most:  # before memory is taken for them
        return None
    blocks = [_set(block) + 8 * BLOCK * i for i, block in enumerate(bits.split(BLOCK))]
    return Near(torch.cat(blocks), sums[:, :2])


def _set(bits: Tensor) -> Tensor:
    """Which bits of some bytes are set."""
    return torch.from_numpy(np.flatnonzero(np.unpackbits(bits.numpy(), bitorder="little")))


@cache
def _nearness(num_tasks: int) -> Steps:
    """Bits of the elements at which an expert's magnitude lies between its two numbers.

    Sums of every expert: how many are above, how many between, and the magnitudes.
    """
    steps = Steps(1 + num_tasks)
    between = []
    for t in range(num_tasks):
        magnitude = abs(steps.load(1 + t) - steps.load(0))
        above = magnitude > steps.number(2 * t + 1)
        between.append(above.where(0.0, magnitude >= steps.number(2 * t)))
        steps.sum(above)
        steps.sum(between[-1])
        steps.sum(magnitude)
    steps.store_bits(reduce(add, between))
    return steps


@dataclass(frozen=True)
class Settled:
    """The exact limits of a model: as `Method.decide` gives them, and with cuts that count the entries kept as near."""

    decided: dict[str, Any]
    among_near: dict[str, Any]


def settle(
    entries: Scope, found: Sequence[Near], expected: Expected, ranks: Sequence[int | None], offsets: Sequence[int]
) -> Settled | None:
    """None where a threshold lies outside its range.

    Args:
        entries: Those near the expected thresholds, a tensor of them for every one of the model.
        ranks: As in `Expected.of`.
        offsets: Elements of the model before each of its tensors.
    """
    above, within = torch.stack([of.counts for of in found]).sum(0).to(torch.int64).unbind(1)
    among = []
    for t, rank in enumerate(ranks):
        if rank is not None and not 1 <= rank - int(above[t]) <= int(within[t]):
            return None
        among.append(1 if rank is None else rank - int(above[t]) + _count_above(entries, t, expected.high[t]))
    thresholds, cuts = torch.ops.surgery_kernels.trim_limits(
        entries.base, entries.flat_experts, [1.0] * entries.num_tasks, ranks=among, nonfinite="propagate"
    )
    ends = torch.tensor([len(of.positions) for of in found]).cumsum(0)
    numel = offsets[-1]
    limits: list[tuple[float, int, int]] = []
    for threshold, cut, rank in zip(thresholds.tolist(), cuts.tolist(), ranks, strict=True):
        if rank is None:
            limits.append((0.0, numel, numel))
            continue
        tensor = int(torch.searchsorted(ends, cut))  # that of the last entry before the cut
        before = int(ends[tensor - 1]) if tensor else 0
        limits.append((threshold, cut, offsets[tensor] + int(found[tensor].positions[cut - 1 - before]) + 1))
    exact = [threshold for threshold, _, _ in limits]
    return Settled(
        {"thresholds": exact, "cuts": [cut for _, _, cut in limits]},
        {"thresholds": exact, "cuts": [cut for _, cut, _ in limits]},
    )


def _count_above(entries: Scope, task: int, high: float) -> int:
    pairs = zip(entries.base, entries.experts, strict=True)
    return sum(int(((experts[task] - base).abs() > high).sum()) for base, experts in pairs)


def taken(scope: Scope, positions: Tensor) -> list[Tensor]:
    """Base and experts of a scope of one tensor, at some of its entries."""
    return [tensor.reshape(-1)[positions] for tensor in scope.inputs]
