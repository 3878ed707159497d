"""Programs of element-wise steps on CUDA tensors, and exact order statistics of what they store.

For these the keys of one tensor at a time are in memory: to read them again takes less than to form them again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .steps_launch import Call
from .trim import trim_limits

SORTED = 1 << 22  # keys that are sorted together
LARGE = 1 << 16  # of a vector that is searched alone


def steps_out(
    inputs: Sequence[Tensor],
    num_inputs: int,
    program: Sequence[int],
    numbers: Tensor,
    axis: str = "tensor",
    wide: bool = False,
    *,
    out: Sequence[Tensor],
) -> Tensor:
    call = Call(inputs, num_inputs, program, numbers, axis, wide, out)
    if call.program.num_sums:
        sums = call.run_and_add()
    else:
        call.run()
        sums = call.numbers.new_empty((sum(call.counts), 0))
    call.scope.deliver()
    return sums


def steps_limits(
    inputs: Sequence[Tensor],
    num_inputs: int,
    program: Sequence[int],
    numbers: Tensor,
    ranks: Sequence[int],
    axis: str = "tensor",
    wide: bool = False,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    if not ranks:
        raise RuntimeError("ranks must be at least one, got none")
    if whole and axis == "column":
        raise RuntimeError("whole must be False by column, got True")
    call = Call(inputs, num_inputs, program, numbers, axis, wide)
    if (call.program.num_outputs, call.program.num_sums) != (1, 0) or call.program.packed:
        raise RuntimeError(
            "program must store its keys and nothing else, "
            f"got {call.program.num_outputs} outputs and {call.program.num_sums} sums"
        )
    found = []
    before = 0
    for part, (first, count) in enumerate(zip(call.firsts, call.counts, strict=True)):
        of_part = inputs[part * num_inputs : (part + 1) * num_inputs]
        of_blocks = call.numbers if call.shared else call.numbers[before : before + count]
        before += count
        keys = torch.empty(first.numel(), dtype=call.compute, device=first.device)
        Call(of_part, num_inputs, program, of_blocks, axis, wide, keys=keys).run()
        found.append(_of_tensor(keys, first.shape, *((1, "tensor") if whole else (count, axis)), ranks))
    return torch.cat([thresholds for thresholds, _ in found]), torch.cat([cuts for _, cuts in found])


def _of_tensor(
    keys: Tensor, shape: Sequence[int], count: int, axis: str, ranks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Both [count, num_ranks]."""
    by_column = axis == "column" and len(shape) > 1
    size = keys.numel() if axis == "tensor" or len(shape) < 2 else shape[0 if by_column else -1]
    for rank in ranks:
        if not -size <= rank <= size:
            raise RuntimeError(f"ranks must be in [-{size}, {size}], the number of entries, got {rank}")
    thresholds = keys.new_empty((count, len(ranks)))
    cuts = torch.empty((count, len(ranks)), dtype=torch.int64, device=keys.device)
    vectors = keys.view(size, count).T if by_column else keys.view(count, size)
    together = max(1, SORTED // max(1, size))
    for v in range(0, count, 1 if size > LARGE else together):
        if size > LARGE:
            of_vector = trim_limits([], [vectors[v]], [1.0], nonfinite="propagate", ranks=ranks)
            thresholds[v], cuts[v] = of_vector
        else:
            some = slice(v, min(count, v + together))
            _sort(vectors[some], ranks, thresholds[some], cuts[some])
    place = torch.arange(count, device=keys.device)[:, None]
    places = (cuts - 1) * count + place + 1 if by_column else place * size + cuts
    return thresholds, torch.where(cuts > 0, places, 0)


def _sort(vectors: Tensor, ranks: Sequence[int], thresholds: Tensor, cuts: Tensor) -> None:
    """Of vectors [count, size]: the last of those that a rank keeps ends the ties, since sorts are stable."""
    magnitudes = vectors.abs()
    for of_sign in (1, -1):
        wanted = [i for i, rank in enumerate(ranks) if rank * of_sign > 0]
        if wanted:
            keys, places = magnitudes.sort(dim=1, descending=of_sign > 0, stable=True)
            last = [abs(ranks[i]) - 1 for i in wanted]
            thresholds[:, wanted], cuts[:, wanted] = keys[:, last], places[:, last] + 1
    none = [i for i, rank in enumerate(ranks) if rank == 0]
    thresholds[:, none], cuts[:, none] = torch.inf, 0
