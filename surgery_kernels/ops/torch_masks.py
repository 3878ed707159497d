"""Masks as mergekit draws them: from torch's own generator on the CPU, one number after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts, PerExpert
from .masks import RULES, check_epsilon, pack

MOST_DRAWS = 1 << 20  # at a time


def torch_masks(
    base: Tensor | None,
    experts: Experts,
    *,
    density: PerExpert,
    rule: str = "random",
    epsilon: PerExpert | None = None,
    generator: torch.Generator | None = None,
    most_draws: int = MOST_DRAWS,
) -> Tensor:
    """The masks that mergekit's random methods draw: ``keep = u < p``, u the next number of the generator.

    Expert after expert, an entry of a tensor after the other; an expert that keeps all draws nothing. p is rounded to
    bfloat16 for bfloat16 tensors and to float32 for all others; under "della" every step of its formula is. Equal
    magnitudes of a row rank as torch.argsort orders them.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None when `experts` already are
            task vectors.
        experts: List of num_tasks tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        density: Probability p of keeping an entry, in (0, 1]; one number or one per expert.
        rule: "random" (DARE) or "della": see `masks`. Rows, and with three dimensions and more all rows of an entry of
            the first, are ranked at once.
        epsilon: "della" only: see `masks`.
        generator: Of the CPU; torch's own where not given. It is left as mergekit leaves it.
        most_draws: Numbers in memory at a time.

    Returns:
        uint8 [num_tasks, ceil(numel / 8)] as `masks` returns them, on the device of the experts.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.

    Source: mergekit 0.1.5, `dare_linear`, `dare_ties`, `della_linear`, `della`.
    """
    base, experts = arguments.check_experts(base, experts)
    arguments.check_one_of("rule", rule, RULES)
    densities = arguments.check_density(density, len(experts))
    epsilons = check_epsilon(epsilon, densities, rule)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got {generator.device}")
    if most_draws < 8:
        raise ValueError(f"most_draws must be 8 or more, got {most_draws}")
    first = experts[0]
    bits = torch.empty(len(experts), -(-first.numel() // 8), dtype=torch.uint8, device="cpu")
    for t, expert in enumerate(experts):
        if densities[t] >= 1:
            bits[t] = pack(torch.ones(1, first.numel(), dtype=torch.bool, device="cpu"))[0]
            continue
        begin, epsilon_t = 0, None if epsilons is None else epsilons[t]
        for piece in _probabilities(base, expert, densities[t], epsilon_t, most_draws // 8 * 8):
            drawn = torch.rand(piece.numel(), generator=generator, dtype=torch.float32, device="cpu") < piece.float()
            packed = pack(drawn[None])[0]
            bits[t, begin : begin + len(packed)] = packed
            begin += len(packed)
    return bits.to(first.device)


def _probabilities(
    base: Tensor | None, expert: Tensor, density: float, epsilon: float | None, most: int
) -> Iterator[Tensor]:
    """Of the entries in flat order, in pieces of a multiple of 8, at most `most`; the last may be any shorter one."""
    work = torch.bfloat16 if expert.dtype == torch.bfloat16 else torch.float32
    if epsilon is None:
        yield from torch.tensor(density, dtype=work, device="cpu").expand(expert.numel()).split(most)
        return
    if expert.numel() == 0:
        return
    view = (1, -1) if expert.dim() < 2 else expert.shape  # ranks run along the second dimension
    expert, base = expert.reshape(view), None if base is None else base.reshape(view)
    of_rank = _probability_of_rank(expert.shape[1], density, epsilon, work)
    slab = expert[0].numel()
    step = 8 // math.gcd(8, slab)
    slabs = step * max(1, most // (slab * step))
    for begin in range(0, len(expert), slabs):
        task_vectors = expert[begin : begin + slabs].cpu()
        if base is not None:
            task_vectors = task_vectors - base[begin : begin + slabs].cpu()
        order = task_vectors.abs().contiguous().argsort(dim=1)
        placed = of_rank.view(1, -1, *[1] * (order.dim() - 2)).expand_as(order)
        probability = torch.empty(order.shape, dtype=work, device="cpu").scatter_(1, order, placed)
        yield from probability.view(-1).split(most)


def _probability_of_rank(size: int, density: float, epsilon: float, work: torch.dtype) -> Tensor:
    """Of the entries of a row by ascending magnitude, every step rounded to `work`: in bfloat16 ranks collapse."""
    if size == 1:
        return torch.tensor([density], dtype=work, device="cpu")
    ranks = torch.arange(size, device="cpu").to(work) + 1
    share = ((ranks - ranks[0]) / (ranks[-1] - ranks[0])).clamp(0, 1)
    return (density - epsilon) + share * 2 * epsilon
