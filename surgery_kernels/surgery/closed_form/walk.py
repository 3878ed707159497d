"""Tasks on their way through the blocks side by side: what corrects a block is solved for tokens that were corrected
before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...modules.runner import BlockRunner, Started, read_weights, row_weights
from ..adapters import SurgeryAdapters
from ..batches import TaskData
from ..features import check_finite
from ..run import Run
from ..seeds import generator
from ..storage.store import FeatureStore
from ..storage.streams import Streams
from .maps import Map, Moments, of_few, solve
from .options import ClosedForm

OfBatches = list[list[Tensor]]  # of every batch the features of all sites


class Targets:
    """What models give at every site, for all samples of a task."""

    def __init__(self, run: Run, store: FeatureStore, bar: tqdm) -> None:
        self._run, self._store, self._bar = run, store, bar

    def of(self, model: nn.Module, task: str, what: str = "targets") -> OfBatches:
        pool = self._run.pools[task]
        everything = torch.arange(len(pool))
        data = TaskData(task, pool, everything[None], everything, everything[None])
        identity = "" if self._store.folder is None else self._run.identity(model)
        return self._store.by_batch(self._store.features(what, model, identity, data, self._bar))


@dataclass(frozen=True)
class Way:
    """A task: its batches as the runner began them, their tokens behind the last block that ran, and the expert's."""

    task: str
    number: int
    begun: list[Started]
    streams: Streams
    targets: OfBatches


class Walk:
    """Fills in the adapters, site after site."""

    def __init__(self, how: ClosedForm, run: Run, adapters: SurgeryAdapters, bar: tqdm) -> None:
        self._how, self._run, self._adapters, self._bar = how, run, adapters, bar
        self._num_sites = len(adapters.sites)
        self._last = self._num_sites - 2  # of the blocks
        self._done = dict.fromkeys(adapters.tasks, 0)  # sites that are solved
        self.bias = torch.zeros(2, adapters.num_tasks, self._num_sites)  # before and after each site's correction
        self._interrupted = None
        if run.checkpoint is not None:
            self._interrupted = run.interrupted(
                1,
                suffix=".closed_form" if how.refine else "",
                solver="closed_form",
                ridge=how.ridge,
                final_ridge=how.final_ridge,
                unread_weight=how.unread_weight,
                row_weights=how.row_weights is not None,
                merged=run.identity(run.merged),
                **dict(run.identities()),
            )

    def resume(self) -> None:
        """From the checkpoint, where there is one."""
        state = self._interrupted.load() if self._interrupted is not None and self._run.resume else None
        if state is not None:
            self._adapters.load_state_dict(state["adapters"])
            self.bias.copy_(state["bias"])
            self._done.update(state["done"])

    def is_done(self, task: str) -> bool:
        return self._done[task] == self._num_sites

    @torch.no_grad()
    def go(self, targets: Mapping[str, OfBatches], features: Targets) -> None:
        """All sites of some tasks. What was solved before an interruption is applied alone."""
        if self._run.sites.blocks:
            with (
                BlockRunner("merged", self._run.merged, self._run.sites, self._run.autocast) as runner,
                ExitStack() as stack,
            ):
                ways = [self._start(runner, task, of_task, stack) for task, of_task in targets.items()]
                for site in range(self._last + 1):
                    self._again(runner, [way for way in ways if self._done[way.task] > site], site)
                    if left := [way for way in ways if self._done[way.task] <= site]:
                        self._block(runner, left, site)
                        self._solved([way.task for way in left], site)
                finals = [
                    torch.cat([runner.finish(*of_batch) for of_batch in zip(way.begun, way.streams, strict=True)])
                    for way in ways
                ]
            self._bar.update(sum(len(self._run.pools[task]) for task in targets))
        else:
            merged = (features.of(self._run.merged, task, "features") for task in targets)
            finals = [torch.cat([of_batch[-1] for of_batch in of_task]) for of_task in merged]
        self._final(targets, finals)
        self._solved(targets, self._last + 1)

    def _start(self, runner: BlockRunner, task: str, targets: OfBatches, stack: ExitStack) -> Way:
        pool = self._run.pools[task]
        streams = stack.enter_context(Streams(self._run.folder))
        way = Way(task, self._adapters.tasks.index(task), [], streams, targets)
        for inputs in pool.stream(torch.arange(len(pool)).split(self._run.batch_size)):
            begun = runner.start(inputs)
            streams.append(begun.stream)
            way.begun.append(replace(begun, stream=torch.empty(0)))
        return way

    def _again(self, runner: BlockRunner, ways: Sequence[Way], site: int) -> None:
        for way in ways:
            for i, batch in enumerate(way.begun):
                x = runner.batch_first(runner.run(batch, site, way.streams[i]))
                way.streams[i] = runner.batch_first(self._corrected(way.number, site, x))

    def _block(self, runner: BlockRunner, ways: Sequence[Way], site: int) -> None:
        """Runs a block, and corrects what comes out of it."""
        problems = []
        for way in ways:
            moments, bias = Moments(), Bias()
            for i, (batch, of_batch) in enumerate(zip(way.begun, way.targets, strict=True)):
                way.streams[i] = stream = runner.run(batch, site, way.streams[i])
                x, target = runner.batch_first(stream), of_batch[site]
                self._check_pair(way.task, site, x, target)
                bias.add(x, target)
                weights = self._weights(batch, x)
                if site == self._last:
                    weights = self._read_weights(runner, batch, stream, weights)
                u = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
                moments.add(u, u - target.to(u).flatten(0, 1), None if weights is None else weights.flatten())
            if moments.weight == 0:
                raise ValueError(f"row_weights of task {way.task!r} must leave tokens, got 0 for all of them")
            problems.append(moments.problem())
            check_finite(f"products of features of {self._at(way.task, site)}", problems[-1].gram)
            self.bias[0, way.number, site] = bias.mean
        found = solve(problems, [self._how.ridge] * len(ways), self._rank(site))
        for way, of_task in zip(ways, found, strict=True):
            self._put(way.number, site, of_task)
            bias = Bias()
            for i, of_batch in enumerate(way.targets):
                corrected = self._corrected(way.number, site, runner.batch_first(way.streams[i]))
                way.streams[i] = runner.batch_first(corrected)
                bias.add(corrected, of_batch[site])
            self.bias[1, way.number, site] = bias.mean

    def _final(self, targets: Mapping[str, OfBatches], finals: Sequence[Tensor]) -> None:
        """The same of the final representation."""
        site, rank = self._last + 1, self._rank(self._last + 1)
        wanted = [torch.cat([of_batch[-1] for of_batch in of_task]) for of_task in targets.values()]
        numbers = [self._adapters.tasks.index(task) for task in targets]
        problems, ridges = [], []
        for task, number, features, target in zip(targets, numbers, finals, wanted, strict=True):
            self._check_pair(task, site, features, target)
            x = features.to(self._adapters.down[site].device, torch.promote_types(features.dtype, torch.float32))
            ridge = self._how.final_ridge
            if ridge is None and self._run.sites.blocks and rank < len(x):
                ridge = self._how.ridge
            problem, ridge = of_few(x, x - target.to(x), ridge)
            problems.append(problem)
            ridges.append(ridge)
            self.bias[0, number, site] = Bias().add(x, target).mean
        found = solve(problems, ridges, rank)
        for number, features, target, of_task in zip(numbers, finals, wanted, found, strict=True):
            self._put(number, site, of_task)
            x = features.to(self._adapters.down[site].device, torch.promote_types(features.dtype, torch.float32))
            self.bias[1, number, site] = Bias().add(self._corrected(number, site, x), target).mean

    def _solved(self, tasks: Iterable[str], site: int) -> None:
        self._done.update(dict.fromkeys(tasks, site + 1))
        if self._interrupted is not None:
            state = {"adapters": self._adapters.state_dict(), "bias": self.bias, "done": self._done}
            self._interrupted.save(state)

    def _rank(self, site: int) -> int:
        return self._adapters.down[site].shape[1]

    def _put(self, number: int, site: int, solved: Map) -> None:
        adapters = self._adapters
        for factor, found in (
            (adapters.down[site], solved.down),
            (adapters.up[site], solved.up),
            (adapters.bias[site], solved.shift),
        ):
            factor[number] = found.to(factor)

    def _corrected(self, number: int, site: int, features: Tensor) -> Tensor:
        return self._adapters(site, features, slice(number, number + 1))

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

    def _check_pair(self, task: str, site: int, features: Tensor, targets: Tensor) -> None:
        check_finite(f"features of {self._at(task, site)}", features)
        for dim, what in ((-1, "width"), (1, "number of tokens")):
            if targets.shape[dim] != features.shape[dim]:
                raise ValueError(
                    f"targets of {self._at(task, site)} must have the {what} of the merged model, "
                    f"{features.shape[dim]}, got {targets.shape[dim]}"
                )

    def _at(self, task: str, site: int) -> str:
        return f"task {task!r} at site {self._run.sites.names[site]!r}"


class Bias:
    """mean |features - targets|, of tokens that of their means."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, x: Tensor, target: Tensor) -> Bias:
        distance = x.to(torch.promote_types(x.dtype, torch.float32)) - target.to(x.device)
        distance = distance.mean(dim=1) if distance.dim() == 3 else distance
        self._total += float(distance.abs().mean(dim=1).sum())
        self._count += len(x)
        return self

    @property
    def mean(self) -> float:
        return self._total / self._count
