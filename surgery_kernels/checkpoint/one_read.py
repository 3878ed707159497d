"""Whole-model thresholds without a read of their own, where a second one would come from the disk again.

Every tensor is merged by the thresholds that a sample tells, and its entries near them are kept aside, with what all
models hold there. At the end these tell the exact thresholds, and are merged once more into the shards. Only then is a
tensor done: a merge that is killed before goes on as if it had none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..merging.expected import Expected, Near, Sample, Settled, near, settle, taken
from ..merging.scope import Scope
from .infinities import Produced
from .loader import Loader
from .memory import Scratch
from .plan import MOST_NEAR, Plan
from .reading.read_ahead import ReadAhead, Span
from .steps import Step
from .writing.journal import Journal
from .writing.writer import Entries, Writer

CLUSTER = 1024  # neighbouring entries of a sample: a few pages, which a disk reads as fast as one
SAMPLE_TIMES = 4  # its size, in numel ** (2 / 3)
FEW = 1 << 16  # entries of a tensor that may be kept aside whatever their share


class OneRead:
    """A merge of all merged tensors of a plan by expected thresholds, and its correction."""

    def __init__(self, plan: Plan, loader: Loader, scratch: Scratch, writer: Writer, journal: Journal) -> None:
        self._steps = plan.merged
        self._loader, self._scratch, self._writer, self._journal = loader, scratch, writer, journal
        method = self._steps[0].method  # what decides is the same for all tensors
        assert method is not None
        self._offsets = list(accumulate((step.numel for step in self._steps), initial=0))
        self._present = method.present(len(self._steps[0].experts))
        self._ranks = method.ranks(self._offsets[-1], len(self._steps[0].experts))

    def run(self) -> bool:
        """False: nothing is done, and the thresholds have to be decided first; the model is not what a sample holds."""
        if not self._present:
            return False
        expected = Expected.of(self._sample(), self._ranks)
        assumed = {"thresholds": expected.middle, "cuts": [self._offsets[-1]] * len(self._ranks)}
        found: list[Near] = []
        entries: list[Scope] = []
        with ReadAhead(step.spans for step in self._steps) as ahead:
            for number, step in enumerate(self._steps):
                self._writer.wait_for_room()
                ahead.wait_for(number)
                scope = self._scope(step)
                try:
                    of_tensor = near(scope.of_experts(self._present), expected, MOST_NEAR * step.numel + FEW)
                except RuntimeError:  # the other way says what is wrong, or finds that nothing is
                    return False
                if of_tensor is None:
                    return False
                positions = self._aside([of_tensor.positions])[0]
                found.append(replace(of_tensor, positions=positions))
                base, *experts = self._aside(taken(scope, positions))
                entries.append(replace(scope, base=[base], experts=[experts], out=[]))
                self._merge(step, scope, assumed)
                self._writer.draft(step.name, scope.out[0].to(step.out_dtype))
        self._writer.wait_until_written()
        settled = self._settled(entries, found, expected)
        if settled is None:
            return False
        self._journal.decide(settled.decided)
        before = 0
        for step, of, scope in zip(self._steps, found, entries, strict=True):
            self._writer.wait_for_room()
            self._merge(step, scope, settled.among_near, before)
            values = scope.out[0].to(step.out_dtype)
            self._writer.amend(step.name, Entries(of.positions, values), Produced(step).check)
            before += len(of.positions)
        return True

    def _scope(self, step: Step) -> Scope:
        base, *experts = [self._loader.load(tensor, step) for tensor in step.inputs]
        return Scope([step.name], [base], [experts], [], {})

    def _merge(self, step: Step, scope: Scope, decided: object, offset: int = 0) -> None:
        """Fills `out` by limits whose cuts count from `offset` entries before the scope."""
        assert step.method is not None
        scope.out[:] = [self._loader.empty(replace(step, shape=tuple(scope.base[0].shape)))]
        step.method.merge(replace(scope, decided=decided, offset=offset))

    def _aside(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """In memory while that is little, else in a temporary file."""
        together = self._scratch.empty((len(tensors), len(tensors[0])), tensors[0].dtype)
        for row, tensor in zip(together, tensors, strict=True):
            row.copy_(tensor)
        return list(together)

    def _settled(self, entries: Sequence[Scope], found: Sequence[Near], expected: Expected) -> Settled | None:
        of_all = Scope(
            [name for scope in entries for name in scope.names],
            [base for scope in entries for base in scope.base],
            [experts for scope in entries for experts in scope.experts],
            [],
            {},
        )
        return settle(of_all.of_experts(self._present), found, expected, self._ranks, self._offsets)

    def _sample(self) -> Sample:
        places = self._places()
        size = places[-1][3]
        # what cannot be read is an error here; through a memory map it would kill the process
        with ReadAhead([[span for step, begin, end, _ in places for span in _spans(step, begin, end)]]) as ahead:
            ahead.wait_for(0)
        dtype = torch.promote_types(self._steps[0].dtype, torch.float32) if self._is_mixed else self._steps[0].dtype
        tensors = [torch.empty(size, dtype=dtype) for _ in range(1 + len(self._present))]
        for step, begin, end, last in places:
            inputs = [step.inputs[0], *(step.experts[t] for t in self._present)]
            for sample, tensor in zip(tensors, inputs, strict=True):
                flat = self._loader.load(tensor, step).reshape(-1)
                sample[last - (end - begin) : last] = flat[begin:end]
        ends = torch.tensor([last for *_, last in places])
        return Sample(tensors[0], tensors[1:], ends, self._offsets[-1])

    @property
    def _is_mixed(self) -> bool:
        return len({step.dtype for step in self._steps}) > 1

    def _places(self) -> list[tuple[Step, int, int, int]]:
        """Tensors, the entries of each that are in the sample, and how many these are up to there.

        Each lies at a random place of its stride.
        """
        numel = self._offsets[-1]
        count = max(2, round(SAMPLE_TIMES * numel ** (2 / 3)) // CLUSTER)
        random = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        at = ((torch.arange(count) + random) * (numel / count)).to(torch.int64).clamp(max=numel - 1)
        numbers = torch.searchsorted(torch.tensor(self._offsets[1:]), at, right=True)
        places, last = [], 0
        for position, number in zip(at.tolist(), numbers.tolist(), strict=True):
            step = self._steps[number]
            begin = max(0, min(position - self._offsets[number], step.numel - CLUSTER))
            end = min(begin + CLUSTER, step.numel)
            last += end - begin
            places.append((step, begin, end, last))
        return places


def _spans(step: Step, begin: int, end: int) -> list[Span]:
    """The bytes of some entries of all inputs."""
    infos = [tensor.info for tensor in step.inputs]
    return [
        Span(info.file, (info.offset or 0) + begin * info.dtype.itemsize, (end - begin) * info.dtype.itemsize)
        for info in infos
        if info.file is not None
    ]
