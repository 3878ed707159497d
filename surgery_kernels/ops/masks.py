"""Which entries every expert keeps, as packed bits: drawn by counter, so that no draw depends on another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts, PerExpert

_ops = torch.ops.surgery_kernels

RULES = ("random", "della")
MOST_IDS = 1 << 32


def masks(
    base: Tensor | None,
    experts: Experts,
    *,
    density: PerExpert,
    rule: str = "random",
    epsilon: PerExpert | None = None,
    seed: int = 0,
    tensor_id: int = 0,
    task_ids: Sequence[int] | None = None,
    nonfinite: str = "propagate",
) -> tuple[Tensor, Tensor]:
    """``keep = word < floor(p * 2**32)``, word i of Philox4x32-10 under (seed, tensor_id, task_id), and what it keeps.

    The key of the generator is the seed, low half first; its counter is (i // 4 low half, high half, tensor_id,
    task_id), and entry i takes word i % 4. The same bits on every instruction set, thread count and device. "random"
    reads the inputs once, "della" twice.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None when `experts` already are
            task vectors.
        experts: List of num_tasks tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        density: Probability p of keeping an entry, in (0, 1]; one number or one per expert; 1 keeps all.
        rule: "random": p is the density (DARE). "della": within a row of k entries, the one of rank r = 0 ... k - 1 by
            ascending magnitude, ties by index, has ``p = (density - epsilon) + 2 * epsilon * r / (k - 1)``, and p =
            density where k is 1. The rows of a tensor of two dimensions; a vector is one row; with more dimensions they
            run along the second, as in mergekit. Takes at most 32 MiB beside the result, for rows of any length.
        epsilon: "della" only, one number or one per expert: density - epsilon and density + epsilon lie in (0, 1)
            where the density is below 1.
        seed: Any integer of 64 bits.
        tensor_id: Of this tensor among those that share the seed, in [0, 2**32).
        task_ids: One for every expert, in [0, 2**32); 0, 1, ... where not given.
        nonfinite: What NaN or infinity in a task vector does: "error" raises, "propagate" ranks it as the largest and
            adds it to the norms, "drop" takes the entry as 0.

    Returns:
        uint8 [num_tasks, ceil(numel / 8)], least significant bit first, 0 after the last entry (see `unpack`); and
        float64 [num_tasks, 3]: the number of entries kept, the L1 norm of the task vector, and that of its kept
        entries, of task vectors as their dtype stores them. Zeros for empty inputs.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names the expert and how many.

    Source: DARE (arXiv 2311.03099), DELLA (arXiv 2406.11617) as in mergekit 0.1.5; Philox: Salmon et al., SC 2011.
    """
    base, experts = arguments.check_experts(base, experts)
    arguments.check_one_of("rule", rule, RULES)
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    densities = arguments.check_density(density, len(experts))
    bits, sums = _ops.masks(
        [] if base is None else [base],
        experts,
        densities,
        rule=rule,
        epsilon=check_epsilon(epsilon, densities, rule),
        seed=check_seed(seed),
        tensor_ids=check_ids("tensor_id", [tensor_id], 1),
        task_ids=None if task_ids is None else check_ids("task_ids", task_ids, len(experts)),
        nonfinite=nonfinite,
    )
    return bits[0], sums[0]


def pack(masks: Tensor) -> Tensor:
    """The packed bits of masks drawn elsewhere: bool [num_tasks, \\*shape] to uint8 [num_tasks, ceil(numel / 8)]."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.dim() == 0:
        got = f"{masks.dtype} {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise TypeError(f"masks must be a bool tensor [num_tasks, *shape], got {got}")
    flat = masks.reshape(len(masks), math.prod(masks.shape[1:]))
    bits = flat.new_zeros(len(flat), -(-flat.shape[1] // 8), dtype=torch.uint8)
    for place in range(8):
        column = flat[:, place::8]
        bits[:, : column.shape[1]] |= column.to(torch.uint8) << place
    return bits


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """uint8 [num_tasks, ceil(numel / 8)] to bool [num_tasks, \\*shape]."""
    count = math.prod(shape)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != -(-count // 8):
        got = f"{bits.dtype} {tuple(bits.shape)}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"bits must be uint8 [num_tasks, {-(-count // 8)}] for shape {tuple(shape)}, got {got}")
    flat = bits.new_empty(len(bits), count, dtype=torch.bool)
    for place in range(8):
        column = flat[:, place::8]
        column.copy_(bits[:, : column.shape[1]] >> place & 1)
    return flat.reshape(len(bits), *shape)


def check_epsilon(epsilon: PerExpert | None, densities: Sequence[float], rule: str) -> list[float] | None:
    if rule == "random":
        if epsilon is not None:
            raise ValueError(f"epsilon must be None with rule='random', got {epsilon}")
        return None
    if epsilon is None:
        raise ValueError("epsilon must be given with rule='della', got none")
    values = arguments.per_expert("epsilon", epsilon, len(densities))
    for density, value in zip(densities, values, strict=True):
        if density < 1 and not (density - abs(value) > 0 and density + abs(value) < 1):
            raise ValueError(
                "epsilon must keep density - epsilon and density + epsilon in (0, 1), "
                f"got {value} with density {density}"
            )
    return values


def check_seed(seed: int | None) -> int:
    """As the op takes it: the same 64 bits, with a sign."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must have 64 bits, got {seed}")
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def check_ids(argument: str, ids: Sequence[int], count: int) -> list[int]:
    if len(ids) != count:
        raise ValueError(f"{argument} must be one number for every expert ({count}), got {len(ids)}")
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            raise TypeError(f"{argument} must be an integer, got {i!r}")
        if not 0 <= i < MOST_IDS:
            raise ValueError(f"{argument} must be in [0, 2**32), got {i}")
    return list(ids)


@torch.library.register_fake("surgery_kernels::masks")
def _(
    base: Sequence[Tensor], experts: Sequence[Tensor], density: Sequence[float], *_: object, **__: object
) -> tuple[list[Tensor], Tensor]:
    num_tasks = len(density)
    firsts = experts[::num_tasks]
    bits = [first.new_empty(num_tasks, (first.numel() + 7) // 8, dtype=torch.uint8) for first in firsts]
    return bits, experts[0].new_empty(len(firsts), num_tasks, 3, dtype=torch.float64)
