"""Weighted means on CUDA tensors: by importance that is given, and by PCB's scores.

Bound: base, experts and importance are read once, the result is written once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import arguments, looks
from ..ops.weighted_merge import INTER
from .addresses import BASE, CHUNK, EXPERTS, OUT, TYPES, Group, Scope, divide, load, locate, store, upload, whole_blocks
from .finite import INFINITY_STORED, FiniteCheck, is_finite, is_finite_key, key_of
from .weighted_merge_limits import limits_of
from .weighted_merge_scores import (
    NUMBERS,
    OF_USE,
    change,
    constants_of,
    rate_of,
    score,
    sums_over_experts,
    with_sign_of,
)

BLOCK = 512
ALIGNED, FIRST = tl.constexpr(0), tl.constexpr(1)  # of a tensor's importance, int64: whether 16 bytes at a time; where


@triton.jit
def _mean(
    table, num_parts, columns, importance, num_tasks, weights, nonfinite, amiss,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, GIVEN: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    LOOK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weights: the floor, and that of every expert. LOOK: the key from which on an expert is not finite, or 0."""
    part, row, begin, count = locate(table, num_parts, columns, CHUNK)
    given = importance + part * (num_tasks + FIRST)
    whole = tl.where(tl.load(given + ALIGNED) != 0, whole_blocks(row, count, BLOCK), 0)
    largest, wrong = key_of(tl.zeros([BLOCK], COMPUTE)), tl.zeros([BLOCK], tl.int32)
    for at in range(0, whole, BLOCK):
        largest, wrong = _mean_block(
            row, begin + at, BLOCK, given, num_tasks, weights, largest, wrong,
            STORED, COMPUTE, GIVEN, HAS_BASE, DROP, True, BLOCK,
        )  # fmt: skip
    for at in range(whole, count, BLOCK):
        largest, wrong = _mean_block(
            row, begin + at, count - at, given, num_tasks, weights, largest, wrong,
            STORED, COMPUTE, GIVEN, HAS_BASE, DROP, False, BLOCK,
        )  # fmt: skip
    if LOOK:  # noqa: SIM102  # there is no pointer to add to otherwise
        if tl.max(largest) >= LOOK:
            tl.atomic_add(nonfinite, tl.full([], 1, tl.int64), sem="relaxed")
    if tl.max(wrong) > 0:
        tl.atomic_add(amiss, tl.full([], 1, tl.int64), sem="relaxed")


@triton.jit
def _mean_block(
    row, at, left, given, num_tasks, weights, largest, wrong,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, GIVEN: tl.constexpr, HAS_BASE: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Returns the larger keys of what was averaged, and where importance is negative or not finite."""
    lanes = tl.arange(0, BLOCK)
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, WHOLE)
    total, mass = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    floor = tl.load(weights).to(COMPUTE)
    for t in tl.range(num_tasks, loop_unroll_factor=2):
        x = load(tl.load(row + EXPERTS + t), at, lanes, left, STORED, COMPUTE, WHOLE)
        importance = load(tl.load(given + FIRST + t), at, lanes, left, GIVEN, COMPUTE, WHOLE)
        if HAS_BASE:
            x = x - base
        if DROP:
            x = tl.where(is_finite(x), x, 0.0)
        largest = tl.maximum(largest, key_of(x))
        wrong = wrong | ((importance < 0.0) | ~is_finite_key(key_of(importance))).to(tl.int32)
        certainty = tl.where(floor > importance, floor, importance) * tl.load(weights + 1 + t).to(COMPUTE)
        mass = mass + certainty
        total = total + x * certainty
    merged = divide(total, mass)
    if HAS_BASE:
        merged = base + merged
    store(merged, tl.load(row + OUT), at, lanes, left, STORED, WHOLE)
    return largest, wrong


@triton.jit
def _merge_scored(
    table, num_parts, columns, num_tasks, numbers, rate,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, POWER: tl.constexpr, TANH: tl.constexpr, HAS_BASE: tl.constexpr,
    INTER: tl.constexpr, DROP: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, row, begin, count = locate(table, num_parts, columns, CHUNK)
    whole = whole_blocks(row, count, BLOCK)
    for at in range(0, whole, BLOCK):
        _merge_scored_block(
            row, begin + at, BLOCK, num_tasks, numbers, rate,
            STORED, COMPUTE, POWER, TANH, HAS_BASE, INTER, DROP, True, BLOCK,
        )  # fmt: skip
    for at in range(whole, count, BLOCK):
        _merge_scored_block(
            row, begin + at, count - at, num_tasks, numbers, rate,
            STORED, COMPUTE, POWER, TANH, HAS_BASE, INTER, DROP, False, BLOCK,
        )  # fmt: skip


@triton.jit
def _merge_scored_block(
    row, at, left, num_tasks, numbers, rate,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, POWER: tl.constexpr, TANH: tl.constexpr, HAS_BASE: tl.constexpr,
    INTER: tl.constexpr, DROP: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK)
    base = tl.zeros([BLOCK], COMPUTE)
    if HAS_BASE:
        base = load(tl.load(row + BASE), at, lanes, left, STORED, COMPUTE, WHOLE)
    of_one = tl.load(rate).to(COMPUTE)
    sums = sums_over_experts(
        row, num_tasks, base, at, lanes, left, numbers, STORED, COMPUTE, TANH, INTER, DROP, WHOLE
    )  # fmt: skip
    total, mass = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    for t in tl.range(num_tasks):
        x, a, s = change(row, t, base, at, lanes, left, numbers, STORED, COMPUTE, DROP, WHOLE)
        live = numbers + t * NUMBERS + OF_USE
        threshold, factor = tl.load(live).to(COMPUTE), tl.load(live + 2).to(COMPUTE)
        height = tl.load(live + 1).to(COMPUTE) + tl.zeros([BLOCK], COMPUTE)
        found = score(x, s, sums, of_one, POWER, TANH, INTER)
        weight = divide(tl.where(found > threshold, found - threshold, 0.0), height)
        mass = mass + weight
        total = total + weight * factor * tl.where(x == 0.0, 0.0, with_sign_of(x, a))
    least = tl.full([BLOCK], 1e-12, COMPUTE)
    merged = base + divide(total, tl.where(mass > least, mass, least))
    store(merged, tl.load(row + OUT), at, lanes, left, STORED, WHOLE)


def weighted_merge_out(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    importance: Sequence[Tensor],
    weights: Sequence[float],
    floor: float = 0.0,
    nonfinite: str = "error",
    names: Sequence[str] | None = None,
    called: str = "importance",
    *,
    out: Sequence[Tensor],
) -> None:
    scope = Scope(base, experts, len(weights), out)
    finite = FiniteCheck(scope, nonfinite, names)
    _check_importance(importance, scope)
    numbers = upload(torch.tensor([floor, *weights], dtype=torch.float64), scope.device)
    amiss = torch.zeros(1, dtype=torch.int64, device=scope.device)
    for group in scope.groups:
        addresses, given = _importance_of(group, importance, scope)
        _mean[(group.num_chunks,)](
            *group.place, addresses, scope.num_tasks, numbers, finite.found, amiss, **group.dtypes, GIVEN=TYPES[given],
            HAS_BASE=scope.has_base, DROP=nonfinite == "drop",
            LOOK=INFINITY_STORED[group.dtype] if finite.wanted else 0,
            CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    finite.look()
    seen, known = list(importance), list(names or [])
    looks.look(amiss, lambda: _tell(called, seen, len(weights), known), at_once=scope.delivers)
    scope.deliver()


def _check_importance(importance: Sequence[Tensor], scope: Scope) -> None:
    if len(importance) != len(scope.experts):
        raise RuntimeError(
            f"importance must be one tensor for every expert and merged tensor ({len(scope.experts)}), "
            f"got {len(importance)}"
        )
    for i, (given, expert) in enumerate(zip(importance, scope.experts, strict=True)):
        first = importance[i - i % scope.num_tasks]
        if given.device != expert.device:
            raise RuntimeError("importance must be on the device of the experts, got another")
        if given.shape != expert.shape:
            raise RuntimeError("importance must have the shape of the experts, got another")
        if given.dtype not in (expert.dtype, arguments.compute_dtype(expert)) or given.dtype != first.dtype:
            raise RuntimeError(
                "importance must have the dtype of the experts or the one that is computed in, got another"
            )


def _importance_of(group: Group, importance: Sequence[Tensor], scope: Scope) -> tuple[Tensor, torch.dtype]:
    """Where it is, as `_mean` reads it, and its dtype: that of the experts where all of it has that."""
    chosen = [importance[part * scope.num_tasks : (part + 1) * scope.num_tasks] for part in scope.parts_of(group)]
    stored = all(given[0].dtype == group.dtype for given in chosen)
    dtype = group.dtype if stored else scope.compute
    held = [[given.to(dtype).contiguous() for given in of_tensor] for of_tensor in chosen]
    scope.hold([given for of_tensor in held for given in of_tensor])
    rows = []
    for of_tensor in held:
        addresses = [given.data_ptr() for given in of_tensor]
        rows += [int(not any(address % 16 for address in addresses)), *addresses]
    return upload(torch.tensor(rows, dtype=torch.int64), scope.device), dtype


def _tell(called: str, importance: Sequence[Tensor], num_tasks: int, names: Sequence[str]) -> None:
    """Raises for the first that is not finite and 0 or greater."""
    for i, given in enumerate(importance):
        if count := int((~((given >= 0) & given.isfinite())).sum()):
            part = i // num_tasks
            where = f" in tensor {names[part]!r}" if part < len(names) else ""
            raise RuntimeError(
                f"{called}[{i % num_tasks}] must be finite and 0 or greater, got {count} other values{where}"
            )


def weighted_merge_scored_out(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    clipping: Tensor,
    limits: Tensor,
    inter: str = "paper",
    drop: bool = False,
    *,
    out: Sequence[Tensor],
) -> None:
    arguments.check_one_of("inter", inter, INTER)
    _check_numbers("clipping", clipping)
    _check_numbers("limits", limits)
    if len(limits) != len(clipping):
        raise RuntimeError(f"limits must be of as many experts as clipping ({len(clipping)}), got {len(limits)}")
    scope = Scope(base, experts, len(clipping), out)
    numbers = upload(torch.cat([clipping, limits], dim=1), scope.device)
    rate = rate_of(scope)
    for group in scope.groups:
        _merge_scored[(group.num_chunks,)](
            *group.place, scope.num_tasks, numbers, rate, **group.dtypes,
            **constants_of(scope, inter, drop), CHUNK=CHUNK, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    scope.deliver()


def weighted_merge_limits(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    clipping: Tensor,
    ranks: Sequence[int],
    inter: str = "paper",
    drop: bool = False,
) -> Tensor:
    arguments.check_one_of("inter", inter, INTER)
    _check_numbers("clipping", clipping)
    scope = Scope(base, experts, len(clipping))
    if len(ranks) != scope.num_tasks:
        raise RuntimeError(f"ranks must be one for every expert ({scope.num_tasks}), got {len(ranks)}")
    for rank in ranks:
        if not 0 < rank <= scope.numel:
            raise RuntimeError(f"ranks must be in [1, {scope.numel}], the number of entries, got {rank}")
    numbers = upload(torch.nn.functional.pad(clipping, (0, 3)), scope.device)
    return limits_of(scope, numbers, ranks, inter, drop)


def _check_numbers(argument: str, table: Tensor) -> None:
    if table.device.type != "cpu" or table.dtype != torch.float64 or table.dim() != 2 or table.shape[1] != 3:
        raise RuntimeError(f"{argument} must be float64 [num_tasks, 3] on the CPU, got another dtype, shape or device")
