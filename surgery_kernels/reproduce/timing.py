"""The TIES merge of the experiment, timed: the native op on state dicts against eager PyTorch on flattened models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merging import merge_state_dicts
from . import eager

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Timing:
    num_experts: int
    num_params: int
    num_threads: int
    repeats: int
    eager_seconds: float
    native_seconds: float
    largest_difference: float

    def __str__(self) -> str:
        if self.largest_difference:
            agreement = f"the merged parameters differ by {self.largest_difference:.1e} at most"
        else:
            agreement = "the merged parameters are the same bit for bit"
        return (
            f"The TIES merge of {self.num_experts} experts, {self.num_params:,} parameters each, "
            f"{self.num_threads} threads, median of {self.repeats} runs:\n"
            f"  eager PyTorch {1e3 * self.eager_seconds:.1f} ms, native op {1e3 * self.native_seconds:.2f} ms: "
            f"{self.eager_seconds / self.native_seconds:.1f} times faster; {agreement}\n"
            "  Calls this short are mostly overhead, larger models gain more: see bench/."
        )


def flatten(state: StateDict) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def time_ties(base: StateDict, experts: list[StateDict], *, density: float, lam: float, repeats: int = 15) -> Timing:
    """Both run in turn, so that both meet the same other load on the machine; flattening is not counted."""
    flat_base, flat_experts = flatten(base), torch.stack([flatten(expert) for expert in experts])

    def run_eager() -> Tensor:
        return eager.ties_merge(flat_base, flat_experts, density, lam)

    def run_native() -> StateDict:
        return merge_state_dicts(base, experts, method="ties", density=density, lam=lam, reduce="sum")

    difference = (flatten(run_native()) - run_eager()).abs().max().item()
    pairs = [(seconds(run_eager), seconds(run_native)) for _ in range(repeats)]
    eager_seconds, native_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Timing(
        num_experts=len(experts),
        num_params=flat_base.numel(),
        num_threads=torch.get_num_threads(),
        repeats=repeats,
        eager_seconds=eager_seconds,
        native_seconds=native_seconds,
        largest_difference=difference,
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
