"""The TIES merge of the experiment, timed: native against eager PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..merging import merge_state_dicts
from ..ops import ties_merge
from . import eager

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Timing:
    """Medians in seconds, and how far native and eager results are apart."""

    num_experts: int
    num_tensors: int
    num_params: int
    num_threads: int
    repeats: int
    eager: float
    op: float
    state_dicts: float
    largest_difference: float

    def __str__(self) -> str:
        lines = [
            f"TIES merge of {self.num_experts} experts, {self.num_params:,} parameters each "
            f"({self.num_threads} threads, median of {self.repeats} runs)",
            f"  eager PyTorch, flattened model {1e3 * self.eager:9.2f} ms",
            self._line("ties_merge, flattened model", self.op),
            self._line(f"merge_state_dicts, {self.num_tensors} tensors", self.state_dicts),
        ]
        if self.state_dicts > 2 * self.op:
            lines.append("  Tensors this small take longer to check than to merge; bench/ has models of real size.")
        if self.largest_difference:
            lines.append(f"  The merged parameters differ by {self.largest_difference:.1e} at most.")
        else:
            lines.append("  All three give the same parameters, bit for bit.")
        return "\n".join(lines)

    def _line(self, name: str, seconds: float) -> str:
        return f"  {name:30} {1e3 * seconds:9.2f} ms, {self.eager / seconds:.1f} times faster"


def time_ties(base: StateDict, experts: list[StateDict], *, density: float, lam: float, repeats: int = 15) -> Timing:
    """The three run in turn, so that each meets the same other load on the machine; flattening is not counted."""
    flat_base, flat_experts = flatten(base, base), torch.stack([flatten(expert, base) for expert in experts])

    def run_eager() -> Tensor:
        return eager.ties_merge(flat_base, flat_experts, density, lam)

    def run_op() -> Tensor:
        return ties_merge(flat_base, flat_experts, density=density, lam=lam, reduce="sum")

    def run_state_dicts() -> StateDict:
        return merge_state_dicts(base, experts, method="ties", density=density, lam=lam, reduce="sum")

    expected = run_eager()
    difference = max((merged - expected).abs().max().item() for merged in (run_op(), flatten(run_state_dicts(), base)))
    rounds = [[seconds(run) for run in (run_eager, run_op, run_state_dicts)] for _ in range(repeats)]
    eager_median, op_median, state_dicts_median = map(statistics.median, zip(*rounds, strict=True))
    return Timing(
        num_experts=len(experts),
        num_tensors=len(base),
        num_params=flat_base.numel(),
        num_threads=torch.get_num_threads(),
        repeats=repeats,
        eager=eager_median,
        op=op_median,
        state_dicts=state_dicts_median,
        largest_difference=difference,
    )


def flatten(state: StateDict, order: StateDict) -> Tensor:
    return torch.cat([state[name].flatten() for name in order])


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
