"""Adapters without gradients: at every site, block after block, the linear map that brings the merged model's tokens to
the expert's as well as one of its rank can."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...modules.device import device_of
from ...modules.inputs import Inputs
from ...modules.pools import Batches, Pool
from ...modules.runner import BlockRunner, Started, read_weights, row_weights
from ...modules.sites import Sites
from ...ops import arguments
from ..adapters import Rank, SurgeryAdapters
from ..attach import attach
from ..batches import TaskData
from ..bias import representation_bias
from ..cache import fingerprint
from ..experts import Expert, load_expert
from ..features import Recorder, check_finite
from ..progress import progress_bar
from ..seeds import generator
from ..store import FeatureStore
from .maps import Map, Moments, map_of_few

RowWeights = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Run:
    """What one call of `fit` is about."""

    merged: nn.Module
    experts: Mapping[str, Expert]
    pools: Mapping[str, Pool]
    sites: Sites
    rank: Rank
    batch_size: int
    cache: str | PathLike[str]
    autocast: torch.dtype | None
    num_workers: int
    progress: bool | None


@dataclass(frozen=True)
class ClosedForm:
    """Repair by ridge regression, for ``fit(..., solver=ClosedForm(...))``.

    Args:
        ridge: What is added to the variances of a block's tokens, as a share of their mean; greater than 0.
        final_ridge: The same for the final representation, of which there is one row per sample. None: `ridge` where
            blocks were corrected before and samples outnumber ranks; else the one whose predictions are best for
            samples that were left out, from 1e-3 to 1e3: greater for fewer samples.
        unread_weight: In [0, 1]: what a token of the last block counts if the final representation is not made of it,
            as are all but the class token.
        row_weights: From a batch of inputs the weights [batch, tokens] of the blocks' tokens, 0 or greater; None: their
            attention mask where they have one, so that padding takes no part.
    """

    ridge: float = 1e-2
    final_ridge: float | None = None
    unread_weight: float = 0.01
    row_weights: RowWeights | None = None

    def __post_init__(self) -> None:
        for name, ridge in {"ridge": self.ridge, "final_ridge": self.final_ridge}.items():
            if ridge is not None and not 0 < arguments.number(name, ridge) < math.inf:
                raise ValueError(f"{name} must be finite and greater than 0, got {ridge}")
        if not 0 <= arguments.number("unread_weight", self.unread_weight) <= 1:
            raise ValueError(f"unread_weight must be in [0, 1], got {self.unread_weight}")

    def solve(self, run: Run, holdout: Mapping[str, Batches] | None) -> tuple[SurgeryAdapters, Tensor, Tensor | None]:
        """Adapters of all tasks, one task after another; the bias before and after each site's own, and that of samples
        held out before and after all of them.  # [2, num_tasks, num_sites]"""
        held = {} if holdout is None else dict(holdout)
        for task in (*held, *run.experts) if held else ():
            if (task in held) != (task in run.experts):
                raise ValueError(f"holdout must have samples for the tasks of experts, got {list(held)}")
        with Recorder(run.merged, run.sites, run.autocast, token_mean=False) as record:
            probe = record(next(next(iter(run.pools.values())).stream([torch.zeros(1, dtype=torch.int64)])))
        store = FeatureStore.like(probe, run.sites, run.cache, run.batch_size, run.autocast)
        widths = dict(zip(run.sites.names, store.widths, strict=True))
        adapters = SurgeryAdapters(
            len(run.pools), widths, run.rank, tasks=tuple(run.pools), dtype=probe[-1].dtype, kind="linear", seed=0
        ).to(device_of(run.merged))
        bias, held_out = [], []
        with progress_bar(2 * sum(map(len, run.pools.values())), "surgery", "sample", run.progress) as bar:
            for task, pool in run.pools.items():
                expert = load_expert(task, run.experts[task], run.merged, run.sites)
                bias.append(TaskSolver(self, run, store, adapters, task, bar).solve(expert, pool))
                if held:
                    held_out.append(self._held_out(run, adapters, task, expert, held[task]))
        return adapters, torch.stack(bias, dim=1), torch.stack(held_out, dim=1) if held else None

    def _held_out(self, run: Run, adapters: SurgeryAdapters, task: str, expert: nn.Module, samples: Batches) -> Tensor:
        size, workers = run.batch_size, run.num_workers
        of_merged = representation_bias(run.merged, expert, samples, run.sites, batch_size=size, num_workers=workers)
        with attach(run.merged, adapters, run.sites) as surgery:
            repaired = representation_bias(
                surgery, expert, samples, run.sites, task, batch_size=size, num_workers=workers
            )
        return torch.tensor([list(of_merged.values()), list(repaired.values())])


class TaskSolver:
    """All sites of one task after another; the corrected tokens feed the next block."""

    def __init__(
        self, how: ClosedForm, run: Run, store: FeatureStore, adapters: SurgeryAdapters, task: str, bar: tqdm
    ) -> None:
        self._how, self._run, self._store, self._adapters, self._task, self._bar = how, run, store, adapters, task, bar
        self._number = adapters.tasks.index(task)
        self._last = len(run.sites.blocks) - 1

    @torch.no_grad()
    def solve(self, expert: nn.Module, pool: Pool) -> Tensor:
        """Fills in the adapters; the bias before and after each of them.  # [2, num_sites]"""
        everything = torch.arange(len(pool))
        data = TaskData(self._task, pool, everything[None], everything, everything[None])
        targets = self._features("targets", expert, data)
        bias: list[list[float]] = []
        if self._run.sites.blocks:
            with BlockRunner("merged", self._run.merged, self._run.sites, self._run.autocast) as runner:
                begun = [runner.start(inputs) for inputs in pool.stream(everything.split(self._run.batch_size))]
                streams = [batch.stream for batch in begun]
                for site in range(self._last + 1):
                    wanted = [of_batch[site] for of_batch in targets]
                    streams, of_site = self._block(runner, begun, site, streams, wanted)
                    bias.append(of_site)
                features = [runner.finish(batch, stream) for batch, stream in zip(begun, streams, strict=True)]
            self._bar.update(len(pool))
        else:
            features = [of_batch[-1] for of_batch in self._features("features", self._run.merged, data)]
        bias.append(self._final(torch.cat(features), torch.cat([of_batch[-1] for of_batch in targets])))
        return torch.tensor(bias).T

    def _features(self, what: str, model: nn.Module, data: TaskData) -> list[list[Tensor]]:
        """Of every batch those of all sites."""
        identity = "" if self._store.folder is None else fingerprint([model.state_dict()])
        return self._store.by_batch(self._store.features(what, model, identity, data, self._bar))

    def _block(
        self,
        runner: BlockRunner,
        begun: Sequence[Started],
        site: int,
        streams: Sequence[Tensor],
        targets: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[float]]:
        """The corrected streams behind a block, and the bias before and after the correction."""
        streams = [runner.run(batch, site, stream) for batch, stream in zip(begun, streams, strict=True)]
        features = [runner.batch_first(stream) for stream in streams]
        moments = Moments()
        for batch, stream, x, target in zip(begun, streams, features, targets, strict=True):
            self._check_pair(site, x, target)
            weights = self._weights(batch, x)
            if site == self._last:
                weights = self._read_weights(runner, batch, stream, weights)
            u = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
            moments.add(u, u - target.to(u).flatten(0, 1), None if weights is None else weights.flatten())
        if moments.weight == 0:
            raise ValueError(f"row_weights of task {self._task!r} must leave tokens, got 0 for all of them")
        self._put(site, moments.solve(self._rank(site), self._how.ridge))
        corrected = [self._corrected(site, x) for x in features]
        return [runner.batch_first(x) for x in corrected], [_bias(features, targets), _bias(corrected, targets)]

    def _final(self, features: Tensor, targets: Tensor) -> list[float]:
        """The same of the final representation."""
        site = self._last + 1
        self._check_pair(site, features, targets)
        x = features.to(self._adapters.down[site].device, torch.promote_types(features.dtype, torch.float32))
        ridge, rank = self._how.final_ridge, self._rank(site)
        if ridge is None and self._run.sites.blocks and rank < len(x):
            ridge = self._how.ridge
        self._put(site, map_of_few(x, x - targets.to(x), rank, ridge))
        return [_bias([x], [targets]), _bias([self._corrected(site, x)], [targets])]

    def _rank(self, site: int) -> int:
        return self._adapters.down[site].shape[1]

    def _put(self, site: int, solved: Map) -> None:
        adapters = self._adapters
        for factor, found in (
            (adapters.down[site], solved.down),
            (adapters.up[site], solved.up),
            (adapters.bias[site], solved.shift),
        ):
            factor[self._number] = found.to(factor)

    def _corrected(self, site: int, features: Tensor) -> Tensor:
        return self._adapters(site, features, slice(self._number, self._number + 1))

    def _weights(self, batch: Started, features: Tensor) -> Tensor | None:
        if self._how.row_weights is None:
            return row_weights(batch.inputs, features)
        weights, shape = self._how.row_weights(batch.inputs), list(features.shape[:2])
        if not isinstance(weights, Tensor) or list(weights.shape) != shape:
            got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"row_weights must give [batch, tokens] of the blocks, {shape}, got {got}")
        if not (weights >= 0).all() or not weights.isfinite().all():
            raise ValueError("row_weights must be finite and 0 or greater, got others")
        return weights.to(features.device, torch.float32)

    @torch.enable_grad()
    def _read_weights(
        self, runner: BlockRunner, batch: Started, stream: Tensor, weights: Tensor | None
    ) -> Tensor | None:
        """Weights where tokens from which the final representation has no gradient count less."""
        leaf = stream.detach().requires_grad_()
        final = runner.finish(batch, leaf)
        if not final.requires_grad:
            return weights
        # along one direction, for the sum of a normalised representation has no gradient at all
        direction = torch.randn(final.shape, generator=generator("read")).to(final)
        (gradient,) = torch.autograd.grad((final * direction).sum(), leaf)
        read = runner.batch_first(gradient).abs().amax(dim=-1) > 0
        of_tokens = read_weights(read, self._how.unread_weight)
        return of_tokens if weights is None else weights * of_tokens

    def _check_pair(self, site: int, features: Tensor, targets: Tensor) -> None:
        of_site = f"task {self._task!r} at site {self._run.sites.names[site]!r}"
        check_finite(f"features of {of_site}", features)
        for dim, what in ((-1, "width"), (1, "number of tokens")):
            if targets.shape[dim] != features.shape[dim]:
                raise ValueError(
                    f"targets of {of_site} must have the {what} of the merged model, {features.shape[dim]}, "
                    f"got {targets.shape[dim]}"
                )


def _bias(features: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """mean |features - targets|, of tokens that of their means."""
    total, count = 0.0, 0
    for x, target in zip(features, targets, strict=True):
        distance = x.to(torch.promote_types(x.dtype, torch.float32)) - target.to(x.device)
        distance = distance.mean(dim=1) if distance.dim() == 3 else distance
        total += float(distance.abs().mean(dim=1).sum())
        count += len(x)
    return total / count
