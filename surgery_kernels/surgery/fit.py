"""Fitting adapters to unlabeled samples, so that a merged model's features become those of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ..modules.hooks import is_hooked
from ..modules.pools import Batches, pool_of
from ..modules.sites import MODES, Sites, check_sites, find_sites
from ..ops import arguments
from .adapters import Rank, SurgeryAdapters, check_rank
from .closed_form import ClosedForm, solve_closed_form
from .experts import Expert
from .gradient.solver import Gradient
from .measure import Measure
from .refine import refine
from .run import Run

SOLVERS = {
    "gradient": None,
    "closed_form": ClosedForm(),
    "closed_form+gradient": ClosedForm(refine=True),
}
STEPS, LR = 1000, 1e-3


@dataclass(frozen=True)
class Log:
    """How far the features were from the experts': before every step, or, where none is taken, before and after the
    closed form of each site."""

    bias: Tensor  # float32 [steps or 2, num_tasks, num_sites]: mean |features - targets| of the step's or all samples
    tasks: tuple[str, ...]
    sites: tuple[str, ...]
    held_out: Tensor | None = None  # float32 [2, num_tasks, num_sites]: of the merged model and of the repaired one
    closed_form: Tensor | None = None  # float32 [2, num_tasks, num_sites]: of the start of the steps, before and after
    kept: tuple[str, ...] | None = None  # by task, "closed_form" or "gradient": which of them is in the adapters


@dataclass(frozen=True)
class Fit:
    """Fitted adapters, on the device of the merged model, and how the fit went."""

    adapters: SurgeryAdapters
    log: Log


@torch.inference_mode(False)  # gradients must work wherever the caller is
def fit(
    merged: nn.Module,
    experts: Mapping[str, Expert],
    batches: Mapping[str, Batches],
    mode: str = "v1",
    *,
    solver: str | ClosedForm = "gradient",
    rank: Rank = 16,
    steps: int = STEPS,
    batch_size: int = 16,
    lr: float = LR,
    legacy_zero_grad: bool = False,
    detach_layers: bool = False,
    seed: int = 0,
    sites: Sites | None = None,
    cache: str | PathLike[str] = "memory",
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
    holdout: Mapping[str, Batches] | None = None,
    progress: bool | None = None,
) -> Fit:
    """Adam on ``sum over tasks and sites of mean |features - targets|``, with the experts' features as targets.

    "v1" corrects the final representation, from cached features: no model takes part in its steps. "v2" corrects
    every token after every block and compares token means there; the corrected tokens feed the next block and
    gradients flow across all of them, while the merged model itself is a constant. Each expert runs once over the
    samples that the steps will use. What a task learns does not depend on the other tasks of the call.

    ``solver="closed_form"`` takes no steps. It looks at every sample once, and block after block finds the linear map
    of `rank` that best predicts how far each token of the merged model is from the expert's, by ridge regression: few
    samples and seconds do for what the gradient needs many and minutes for. What corrects a block is solved for tokens
    that were corrected before it; at last the same is done to the final representation ("v1": that alone).

    Args:
        merged: Any module; its training mode and its parameters' requires_grad are as before afterwards.
        experts: By name of the task: a module, a state dict (loaded into a copy of `merged`), or a function that
            gives either when the expert's turn comes.
        batches: By name of the task, unlabeled: a tensor [samples, ...], a mapping of such tensors (the keyword
            arguments of the model), a map-style dataset, or an iterable of batches, which is read to its end and kept.
            Of tuples the first item is used, of mappings all tensors but labels.
        mode: "v1" or "v2".
        solver: "gradient", "closed_form", "closed_form+gradient" or a `ClosedForm` with options of its own. The closed
            form alone has no use for `steps`, `lr`, `legacy_zero_grad`, `detach_layers` and `seed`.
        rank: 1 or more; from the closed form on also "full".
        steps: Steps of every task, 1 or more.
        batch_size: Samples of every task in each step, 1 or more; of the closed form those in one forward pass.
        lr: Adam's learning rate, greater than 0; betas are 0.9 and 0.999.
        legacy_zero_grad: After each step another num_tasks - 1 with gradient zero: tasks that take turns under
            torch < 2, which zeroed gradients instead of dropping them, were moved on momentum at each other's turn.
            The published numbers come from there; it acts like a learning rate about sqrt(num_tasks) times as high.
        detach_layers: "v2" only: no gradient across blocks. An approximation that needs no backward pass through the
            model, and corrects less.
        seed: Of the adapters' start and the order of the samples; V1 and V2 see the same order.
        sites: Where `find_sites` is wrong.
        cache: "memory", or a folder for memory-mapped files that a later call with the same models and samples reads
            instead of running them. A change is recognised by the models' parameters, the samples' numbers and the
            contents of a few of them. The closed form keeps every token of the experts there, and those of the merged
            model as long as it takes.
        checkpoint: File that the state is written to, every `checkpoint_every` steps and at the end; of the closed form
            after every site. With steps after it, those have the file, and the closed form one that ends in
            ".closed_form".
        resume: Go on from `checkpoint` where it exists, with the same result bit for bit; more `steps` than it was
            written for continue it. It is refused for other models, tasks, numbers of samples or options. False starts
            anew.
        autocast: bfloat16 or float16 for the models; the adapters stay float32.
        num_workers: Processes that read a dataset.
        holdout: From the closed form on: by name of the task, samples that the fit does not see, for `Log.held_out`.
        progress: Bars on stderr: True, False, or None for ones that appear after two seconds.

    Returns:
        The adapters, ready for `attach`, and the log.

    Raises:
        ValueError, TypeError: an argument is outside its range, a task lacks expert or samples, features differ in
            width from the merged model's or are not finite.

    Source: Representation Surgery (arXiv 2402.02705); SurgeryV2 (arXiv 2410.14389). The closed form is this library's.
    """
    if not isinstance(solver, ClosedForm):
        arguments.check_one_of("solver", solver, tuple(SOLVERS))
    closed = solver if isinstance(solver, ClosedForm) else SOLVERS[solver]
    check_rank(rank, "relu" if closed is None else "linear")
    _check_options(mode, steps, batch_size, lr, detach_layers, checkpoint_every, autocast)
    _check_tasks(experts, batches)
    if closed is None and holdout is not None:
        raise ValueError("holdout must be None with solver='gradient', got samples")
    if closed is not None and not closed.refine:
        given = {"steps": steps != STEPS, "lr": lr != LR, "legacy_zero_grad": legacy_zero_grad}
        given |= {"detach_layers": detach_layers}
        for option in (name for name, there in given.items() if there):
            raise ValueError(f"{option} must be left out with solver='closed_form', got another than its default")
    held_out = {} if holdout is None else dict(holdout)
    if held_out and set(held_out) != set(experts):
        raise ValueError(f"holdout must have samples for the tasks of experts, got {list(held_out)}")
    run = Run(
        merged=merged,
        experts=experts,
        pools={task: pool_of(f"batches[{task!r}]", batches[task], num_workers) for task in experts},
        sites=_sites(merged, mode, sites),
        mode=mode,
        rank=rank,
        batch_size=batch_size,
        cache=cache,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        resume=resume,
        autocast=autocast,
        progress=progress,
    )
    gradient = Gradient(steps, lr, legacy_zero_grad, detach_layers, seed, checkpoint_every)
    if closed is None:
        adapters, bias = gradient.solve(run)
        return Fit(adapters, Log(bias, adapters.tasks, adapters.sites))
    held = {task: pool_of(f"holdout[{task!r}]", samples, num_workers) for task, samples in held_out.items()}
    measure = Measure("holdout" if held else "batches", run, held or run.pools) if held or closed.refine else None
    adapters, bias = solve_closed_form(closed, run, measure)
    log = Log(bias, adapters.tasks, adapters.sites)
    if closed.refine:
        assert measure is not None
        refined = refine(run, adapters, gradient, measure)
        adapters, log = refined.adapters, replace(log, bias=refined.bias, closed_form=bias, kept=refined.kept)
    if held:
        assert measure is not None
        log = replace(log, held_out=torch.stack([measure.of_merged(), measure.of(adapters)]))
    return Fit(adapters, log)


def _sites(merged: nn.Module, mode: str, sites: Sites | None) -> Sites:
    if is_hooked(merged):
        raise ValueError("merged must be without adapters, got one with adapters attached: detach them first")
    if sites is None:
        return find_sites(merged, mode)
    check_sites("merged", merged, sites)
    if bool(sites.blocks) != (mode == "v2"):
        wanted = "at least one block" if mode == "v2" else "no blocks"
        raise ValueError(f"sites must have {wanted} with mode={mode!r}, got {len(sites.blocks)}")
    return sites


def _check_tasks(experts: Mapping[str, Expert], batches: Mapping[str, Batches]) -> None:
    for argument, by_task in {"experts": experts, "batches": batches}.items():
        if not isinstance(by_task, Mapping) or not all(isinstance(task, str) for task in by_task):
            got = list(by_task) if isinstance(by_task, Mapping) else type(by_task).__name__
            raise TypeError(f"{argument} must be a mapping from names of tasks, got {got}")
    if not experts:
        raise ValueError("experts must be of at least one task, got none")
    for task in batches:
        if task not in experts:
            raise ValueError(f"experts must have one for every task of batches, got none for {task!r}")
    for task in experts:
        if task not in batches:
            raise ValueError(f"batches must have samples for every task of experts, got none for {task!r}")


def _check_options(
    mode: str,
    steps: int,
    batch_size: int,
    lr: float,
    detach_layers: bool,
    checkpoint_every: int,
    autocast: torch.dtype | None,
) -> None:
    arguments.check_one_of("mode", mode, MODES)
    arguments.check_count("steps", steps)
    arguments.check_count("batch_size", batch_size)
    arguments.check_count("checkpoint_every", checkpoint_every)
    if not 0 < arguments.number("lr", lr) < math.inf:
        raise ValueError(f"lr must be finite and greater than 0, got {lr}")
    if detach_layers and mode == "v1":
        raise ValueError("detach_layers must be False with mode='v1', got True")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast must be bfloat16, float16 or None, got {autocast!r}")
