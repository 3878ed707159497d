"""Exact thresholds on CUDA tensors by radix selection on magnitudes: no sort, no luck needed, no look by the host.

A range of keys per expert, for large scopes from a sample, is narrowed to the keep-th largest key by rounds that count
keys in a histogram. For float32 and float64 the one read of the tensors lists the few keys in the range, and the rounds
read those lists; for 16 bits, where many keys share a value, one round over the tensors suffices. A range that the
sample missed is corrected by what was counted, and narrowed by rounds over the tensors. Rounds that find nothing open
have few programs and return at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..ops import arguments
from ..ops.trim import keep_count
from .addresses import Scope, upload
from .finite import FiniteCheck
from .trim_cut import cut_ties
from .trim_lists import list_keys
from .trim_rounds import BIN_BITS, BUDGET, COPIES, CUT, LARGEST, THRESHOLD, TIES, narrow
from .trim_sample import start_from_sample

DIRECT = 1 << 16  # elements up to which every key is counted from the first round on
INFINITY = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
SPARE_BITS = {torch.bfloat16: 16, torch.float16: 13}  # low bits of a key that are always 0

# scope, state, histogram, nonfinite, finite: the keys of every range, by the one read of wide tensors
Read = Callable[[Scope, Tensor, Tensor, str, FiniteCheck], Tensor]


def trim(
    scope: Scope,
    density: Sequence[float],
    semantics: str,
    nonfinite: str,
    finite: FiniteCheck,
    read: Read | None = None,
) -> Tensor:
    """The limits of every expert: thresholds and cuts in columns THRESHOLD and CUT.  # int64 [num_tasks, FIELDS]"""
    keep = [keep_count(scope.numel, d, semantics) for d in density]
    keep = [k if k < scope.numel else scope.numel + 1 for k in keep]
    return find_limits(scope, keep, nonfinite, finite, cuts=semantics != "paper", read=read)


def find_limits(
    scope: Scope,
    keep: Sequence[int],
    nonfinite: str,
    finite: FiniteCheck,
    cuts: bool = True,
    from_smallest: Sequence[bool] = (),
    read: Read | None = None,
) -> Tensor:
    """Of the keep-th largest key of every expert; one above the number of entries keeps all and looks for nothing.

    from_smallest: whose cut ends the ties of the smallest entries, of which there are as many as leave keep - 1.
    """
    state = upload(torch.tensor([_start(k, scope) for k in keep], dtype=torch.int64), scope.device)
    if scope.numel == 0:
        return state
    if all(k in (0, scope.numel + 1) for k in keep):
        finite.count()
        return state
    spare = min(SPARE_BITS.get(group.dtype, 0) for group in scope.groups)
    bits = 63 if scope.wide else 31
    rounds = -(-(bits - spare) // BIN_BITS)
    histogram = torch.zeros(COPIES * scope.num_tasks << BIN_BITS, dtype=torch.int64, device=scope.device)
    lists = None
    if scope.numel > DIRECT:
        start_from_sample(scope, state, nonfinite, bits, spare, spare == 0)
        if spare == 0:
            lists = (read or list_keys)(scope, state, histogram, nonfinite, finite)
        else:  # few values that many keys share: a range of them is narrowed by one read, and no list would hold them
            rounds += 1
    for i in range(rounds):
        narrow(scope, state, histogram, lists, nonfinite, spare, finite, first=lists is None and i == 0)
    if any(from_smallest):
        reversed = upload(torch.tensor(from_smallest), scope.device)
        ties, budget = state[:, TIES.value], state[:, BUDGET.value]
        budget.copy_(torch.where(reversed, ties + 1 - budget, budget))
    if cuts:
        cut_ties(scope, state, nonfinite)
    return state


def _start(keep: int, scope: Scope) -> list[int]:
    if keep > scope.numel:
        threshold, cut, last = 0, scope.numel, 0
    elif keep == 0:
        threshold, cut, last = INFINITY[scope.compute], 0, INFINITY[scope.compute]
    else:
        threshold, cut, last = 0, scope.numel, LARGEST[scope.compute]
    shift = max(0, last.bit_length() - BIN_BITS)
    return [threshold, cut, last, shift, keep, 0, 0, 0, -1]


def trim_thresholds(
    base: Tensor | None,
    experts: Sequence[Tensor],
    density: Sequence[float],
    semantics: str = "paper",
    nonfinite: str = "error",
) -> Tensor:
    check_one_tensor(experts, density)
    return trim_limits([] if base is None else [base], experts, density, semantics, nonfinite)[0]


def trim_limits(
    base: Sequence[Tensor],
    experts: Sequence[Tensor],
    density: Sequence[float],
    semantics: str = "paper",
    nonfinite: str = "error",
    names: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    arguments.check_one_of("semantics", semantics, arguments.SEMANTICS)
    num_tasks = len(density)
    scope = Scope(base, experts, num_tasks)
    finite = FiniteCheck(scope, nonfinite, names)
    if ranks is None:
        state = trim(scope, density, semantics, nonfinite, finite)
    else:
        keep = [scope.numel + 1 + rank if rank < 0 else rank for rank in _checked(ranks, scope)]
        # an expert stands beside itself for every rank: what one reads, the next finds in the cache
        beside = [x for expert in map(Tensor.contiguous, experts) for x in [expert] * (len(ranks) // num_tasks)]
        state = find_limits(
            Scope(base, beside, len(ranks)), keep, nonfinite, finite, from_smallest=[rank < 0 for rank in ranks]
        )
    finite.look()
    keys, cuts = state[:, THRESHOLD.value], state[:, CUT.value]
    return keys.to(torch.int64 if scope.wide else torch.int32, copy=True).view(scope.compute), cuts.clone()


def _checked(ranks: Sequence[int], scope: Scope) -> Sequence[int]:
    if not ranks or len(ranks) % scope.num_tasks:
        raise RuntimeError(f"ranks must be as many for every expert ({scope.num_tasks}), got {len(ranks)}")
    for rank in ranks:
        if not -scope.numel <= rank <= scope.numel:
            raise RuntimeError(f"ranks must be in [-{scope.numel}, {scope.numel}], the number of entries, got {rank}")
    return ranks


def check_one_tensor(experts: Sequence[Tensor], density: Sequence[float]) -> None:
    """An op on one tensor takes its experts and nothing else."""
    if not experts:
        raise RuntimeError("experts must be at least one tensor, got none")
    if len(experts) != len(density):
        raise RuntimeError(f"density must be one number per expert ({len(experts)}), got {len(density)}")
