"""The TIES merge and surgery of the experiment, timed: native against eager PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ...merging import merge_state_dicts
from ...ops import ties_merge
from ...surgery import SurgeryAdapters, find_sites
from ...surgery.batches import sample_order
from . import eager
from .experts import Experts
from .tasks import TASKS

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class Timing:
    """Seconds of each run, and how far the native results are from the eager one."""

    num_experts: int
    num_tensors: int
    num_params: int
    num_threads: int
    eager: list[float]
    op: list[float]
    state_dicts: list[float]
    largest_difference: float

    def __str__(self) -> str:
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        lines = [
            f"TIES merge of {self.num_experts} experts, {self.num_params:,} parameters each; "
            f"{threads}, {len(self.eager)} runs",
            f"  {'':30}     median     fastest",
            self._line("eager PyTorch, flattened model", self.eager),
            self._line("ties_merge, flattened model", self.op),
            self._line(f"merge_state_dicts, {self.num_tensors} tensors", self.state_dicts),
        ]
        if median(self.state_dicts) > 2 * median(self.op):
            lines.append("  The last handles small tensors more than it merges; bench/ measures models of real size.")
        if self.largest_difference:
            lines.append(f"  The merged parameters differ by {self.largest_difference:.1e} at most.")
        else:
            lines.append("  All three give the same parameters, bit for bit.")
        return "\n".join(lines)

    def _line(self, name: str, seconds: list[float]) -> str:
        line = f"  {name:30}{1e3 * median(seconds):8.2f} ms {1e3 * min(seconds):8.2f} ms"
        return line if seconds is self.eager else f"{line}   {median(self.eager) / median(seconds):5.1f} times faster"


def time_ties(base: StateDict, experts: list[StateDict], *, density: float, lam: float, repeats: int = 21) -> Timing:
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
    eager_runs, op_runs, state_dicts_runs = map(list, zip(*rounds, strict=True))
    return Timing(
        num_experts=len(experts),
        num_tensors=len(base),
        num_params=flat_base.numel(),
        num_threads=torch.get_num_threads(),
        eager=eager_runs,
        op=op_runs,
        state_dicts=state_dicts_runs,
        largest_difference=difference,
    )


@dataclass(frozen=True)
class SurgeryTiming:
    """Seconds of a processor: of a fit, and of the published way, `steps` steps for every task, timed on a few."""

    method: str
    steps: int
    seconds: float
    eager_steps: int
    eager_seconds: float

    @property
    def speedup(self) -> float:
        return self.eager_seconds / self.eager_steps * self.steps / self.seconds

    def __str__(self) -> str:
        whole = self.eager_seconds / self.eager_steps * self.steps
        return f"  {self.method:30}{self.seconds:8.2f} s {whole:8.0f} s   {self.speedup:5.0f} times faster"


def time_surgery(
    experts: Experts, method: str, mode: str, rank: int, *, lam: float, steps: int, ours: float, eager_steps: int
) -> SurgeryTiming:
    """`eager.surgery` on task arithmetic for `eager_steps` steps of `steps`, after a first one, beside a fit that took
    `ours` seconds of a processor."""
    encoder = experts.config.encoder(experts.pretrained)
    images, adapters = published_setting(experts, mode, rank, 1 + eager_steps)
    eager.surgery(encoder, experts.pretrained, experts.experts, lam, images[:1], adapters, lr=1e-3)
    start = time.process_time()
    eager.surgery(encoder, experts.pretrained, experts.experts, lam, images[1:], adapters, lr=1e-3)
    return SurgeryTiming(method, steps, ours, eager_steps, time.process_time() - start)


def published_setting(
    experts: Experts, mode: str, rank: int, steps: int
) -> tuple[Tensor, list[list[eager.Adapter | None]]]:
    """Images [steps, num_tasks, 16, 8, 8] and initial adapters of every task: those that `fit` takes."""
    config = experts.config
    sites = find_sites(config.encoder(), mode).names
    widths = dict.fromkeys(sites[:-1], config.width) | {sites[-1]: config.num_features}
    initial = SurgeryAdapters(len(TASKS), widths, rank, tasks=TASKS, seed=config.seed)
    num_images = len(experts.test.labels)
    images = torch.stack(
        [
            experts.test.images[task][sample_order(config.seed, name, num_images, steps, 16)]
            for task, name in enumerate(TASKS)
        ],
        dim=1,
    )
    left_alone: list[eager.Adapter | None] = [None] * (config.depth + 1 - len(sites))
    factors = zip(initial.down, initial.up, strict=True)
    of_sites = [(down.detach(), up.detach()) for down, up in factors]
    return images, [
        left_alone + [(down[task].clone(), up[task].clone()) for down, up in of_sites] for task in range(len(TASKS))
    ]


def flatten(state: StateDict, order: StateDict) -> Tensor:
    return torch.cat([state[name].flatten() for name in order])


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
