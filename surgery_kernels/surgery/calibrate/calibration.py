"""The walk through the blocks: what goes through layers, what is solved for, and where the streams go from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...modules.inputs import select
from ...modules.layer_visits import LayerVisits
from ...modules.layers import Layer, Part, known_layers
from ...modules.runner import BlockRunner
from ...modules.sites import Sites
from ...modules.ties import first_of_tied
from ...modules.visits import Visit
from ..features import check_finite
from ..seeds import generator
from .moments import LinearMoments, NormMoments, Rows, TaskMoments
from .row_weights import RowWeights
from .settings import Settings
from .solvers import LinearSolver, NormSolver
from .ways import Side, Way
from .writers import Writer, find_writers

StateDict = Mapping[str, Tensor]
Pass = Callable[[Side, int, Tensor], Tensor]  # a batch's number and what goes in to what comes out
Solvers = dict[str, LinearSolver | NormSolver]


@dataclass(frozen=True)
class Stage:
    """Layers that are solved for between two states of the streams, and the pass that calls them."""

    layers: Mapping[str, Layer]
    through: Pass
    final: Pass | None  # from what comes out to the final representation; None: every row of a layer is read
    block: int | None  # None: what comes behind the blocks, in a pass through what is before them too

    def own(self, visits: list[Visit]) -> list[Visit]:
        """What is before the blocks does not follow from the stream: it has no gradient."""
        return visits if self.block is not None else [visit for visit in visits if visit.output.requires_grad]


class Calibration:
    """A model as far as it is calibrated."""

    def __init__(
        self, model: nn.Module, runner: BlockRunner, base: StateDict, sites: Sites, settings: Settings
    ) -> None:
        self._model, self._runner, self._base, self._sites = model, runner, base, sites
        self._how = settings
        self.solved: list[str] = []
        self._behind: list[Part] = []

    def block(self, block: int, ways: Sequence[Way], bar: tqdm) -> list[Part]:
        """Solves for the layers of a block, moves the streams behind it, and says which parameters are new."""
        name = self._sites.blocks[block]

        def through(side: Side, batch: int, stream: Tensor) -> Tensor:
            return side.run(block, batch, stream)

        is_last = block == len(self._sites.blocks) - 1 and self._how.unread_weight != 1
        stage = Stage(
            layers=known_layers(self._model.get_submodule(name), name),
            through=through,
            final=self._finish if is_last else None,
            block=block,
        )
        solved = self._run(stage, ways)
        for way in ways:
            for batch in range(len(way)):
                way.student.streams[batch] = through(way.student, batch, way.student.streams[batch])
                bar.update(way.size(batch))
        return solved

    def behind(self, ways: Sequence[Way], bar: tqdm) -> list[Part]:
        """The layers between the last block and the final representation."""
        inside = {id(m) for name in self._sites.blocks for m in self._model.get_submodule(name).modules()}
        layers = known_layers(self._model, "")
        stage = Stage(
            layers={name: layer for name, layer in layers.items() if id(layer.module) not in inside},
            through=self._finish,
            final=lambda side, batch, final: final,
            block=None,
        )
        self._behind = self._run(stage, ways)
        for way in ways:
            for batch in range(len(way)):
                bar.update(way.size(batch))
        return self._behind

    def reached(self) -> list[str]:
        """Parameters of the blocks, and those behind them that are new."""
        prefixes = tuple(f"{name}." for name in self._sites.blocks)
        behind = {part.name for part in self._behind}
        return [name for name, _ in self._model.named_parameters() if name.startswith(prefixes) or name in behind]

    def _finish(self, side: Side, batch: int, stream: Tensor) -> Tensor:
        return side.finish(batch, stream)

    def _run(self, stage: Stage, ways: Sequence[Way]) -> list[Part]:
        """The parameters that are new. What the experts give lies in their streams, of which the student's are as they
        were."""
        owners = first_of_tied(self._model, stage.layers)
        stage = replace(stage, layers={name: stage.layers[name] for name in owners})
        writers, groups = self._look(stage, ways[0])
        solved: list[Part] = []
        for number, group in enumerate(groups):
            solvers = self._solvers(stage, group, owners, writers, ways, is_last=number == len(groups) - 1)
            solved += self._load(stage.layers, solvers)
        return solved

    def _look(self, stage: Stage, way: Way) -> tuple[dict[str, Writer], list[list[str]]]:
        """From one sample: which layers add to the stream, and which are solved for together."""
        names = list(stage.layers)
        in_order = self._how.order == "layer"
        has_writers = self._how.residual and stage.block is not None
        if not (in_order or has_writers):
            return {}, [names]
        side, runner = way.student, way.student.runner
        one = runner.start(select(side.begun[0].inputs, torch.zeros(1, dtype=torch.int64)))
        stream = runner.batch_first(runner.batch_first(side.streams[0])[:1])
        alone = Side(side.model, runner, [one], side.streams)
        with LayerVisits(side.model, stage.layers) as visits, torch.enable_grad(), visits.recording() as seen:
            output = stage.through(alone, 0, stream.detach().requires_grad_())
        seen = stage.own(seen)
        writers: dict[str, Writer] = {}
        if has_writers:
            writers = find_writers(seen, output, stage.layers)
            if not writers:
                raise ValueError(
                    f"residual must be False where no layer adds to the stream, got True for "
                    f"{self._sites.blocks[stage.block or 0]!r}"
                )
        groups: list[list[str]] = []
        before: Tensor | None = None
        for visit in seen if in_order else []:
            if any(visit.name in group for group in groups):
                continue
            if before is not None and visit.inputs.data_ptr() == before.data_ptr():
                groups[-1].append(visit.name)
            else:
                groups.append([visit.name])
            before = visit.inputs
        return writers, groups if in_order and groups else [names]

    def _solvers(
        self,
        stage: Stage,
        group: Sequence[str],
        owners: Mapping[str, str],
        writers: Mapping[str, Writer],
        ways: Sequence[Way],
        *,
        is_last: bool,
    ) -> Solvers:
        """With the statistics of all tasks."""
        solvers: Solvers = {}
        for way in ways:
            moments = TaskMoments(stage.layers, self._model.get_parameter, writers)
            with (
                way.expert.holding(len(self._sites.blocks) if stage.block is None else stage.block),
                LayerVisits(self._model, stage.layers) as mine,
                LayerVisits(way.expert.model, stage.layers) as theirs,
            ):
                for batch in range(len(way)):
                    moments.add(self._calls(stage, way, batch, mine, theirs, writers, group, keep=is_last))
                for name in list(moments.of):
                    of_layer = moments.of.pop(name)  # not held beside what becomes of it in the solver
                    parts = [part.of(way.expert.model.get_parameter) for part in stage.layers[name].parts]
                    self._add(solvers, owners[name], of_layer, parts[0], parts[1] if len(parts) > 1 else None)
        return solvers

    def _add(
        self, solvers: Solvers, owner: str, moments: LinearMoments | NormMoments, weight: Tensor, bias: Tensor | None
    ) -> None:
        teacher, residual = self._how.teacher, self._how.residual
        if isinstance(moments, LinearMoments):
            linear = solvers.setdefault(owner, LinearSolver(joint=residual))
            assert isinstance(linear, LinearSolver)
            linear.add(moments, teacher, weight, bias)
        else:
            norm = solvers.setdefault(owner, NormSolver(residual=residual))
            assert isinstance(norm, NormSolver)
            norm.add(moments, teacher, weight, bias)

    def _calls(
        self,
        stage: Stage,
        way: Way,
        batch: int,
        mine: LayerVisits,
        theirs: LayerVisits,
        writers: Mapping[str, Writer],
        group: Sequence[str],
        *,
        keep: bool,
    ) -> list[Rows]:
        """The calls of a group of layers in both models; `keep`: what the expert's pass gives becomes its stream."""
        answers, of_expert = self._answers(stage, way, batch, theirs)
        visits, reads, output = self._visits(stage, way, batch, mine)
        stream = way.student.streams[batch]
        self._check(stage, way.task, visits, answers, stream)
        if keep and stage.block is not None:
            way.expert.streams[batch] = of_expert
        weights = RowWeights.of_batch(self._runner, way.student.begun[batch], stream, self._how.unread_weight)
        calls = []
        finite: set[int] = set()  # layers may have inputs in common
        for visit, answer, read in zip(visits, answers, reads, strict=True):
            if visit.name not in group:
                continue
            whose = {f"merged for task {way.task!r}": visit.inputs, f"experts[{way.task!r}]": answer.inputs}
            for model, inputs in whose.items():
                if id(inputs) not in finite:
                    check_finite(f"inputs of {visit.name!r} in {model}", inputs)
                    finite.add(id(inputs))
            drift = None
            if writer := writers.get(visit.name):
                drift = writer.before(answer, answers, of_expert) - writer.before(visit, visits, output)
            calls.append(Rows(visit, answer, weights.of(visit, read), drift))
        return calls

    def _answers(self, stage: Stage, way: Way, batch: int, visits: LayerVisits) -> tuple[list[Visit], Tensor]:
        """The calls of the expert's layers, and what the stage gives."""
        is_behind = stage.block is None
        with visits.recording() as seen, torch.set_grad_enabled(is_behind):
            leaf = way.expert.streams[batch].detach().requires_grad_(is_behind)
            output = stage.through(way.expert, batch, leaf).detach()
        return stage.own(seen), output

    def _visits(
        self, stage: Stage, way: Way, batch: int, visits: LayerVisits
    ) -> tuple[list[Visit], list[Tensor | None], Tensor]:
        """The calls of the student's layers, which rows are read where that matters, and what the stage gives."""
        if stage.final is None:
            with visits.recording() as seen:
                output = stage.through(way.student, batch, way.student.streams[batch])
            return seen, [None] * len(seen), output
        with torch.enable_grad():
            leaf = way.student.streams[batch].detach().requires_grad_()
            with visits.recording() as seen:
                output = stage.through(way.student, batch, leaf)
            final, seen = stage.final(way.student, batch, output), stage.own(seen)
            # along one direction, for the sum of a normalised representation has no gradient at all
            direction = torch.randn(final.shape, generator=generator("read")).to(final)
            outputs = [visit.output for visit in seen]
            gradients = torch.autograd.grad((final * direction).sum(), outputs, allow_unused=True) if outputs else ()
        reads: list[Tensor | None] = []
        for visit, gradient in zip(seen, gradients, strict=True):
            rows = stage.layers[visit.name].outputs(visit.output if gradient is None else gradient)
            reads.append(torch.zeros_like(rows[..., 0], dtype=torch.bool) if gradient is None else _read(rows))
        return seen, reads, output.detach()

    def _check(
        self, stage: Stage, task: str, visits: Sequence[Visit], answers: Sequence[Visit], stream: Tensor
    ) -> None:
        names = [visit.name for visit in visits]
        if names != [answer.name for answer in answers]:
            raise ValueError(f"experts[{task!r}] must call the layers of merged in their order, got another")
        tokens = stream.shape[:-1].numel()
        for visit, answer in zip(visits, answers, strict=True):
            shape = visit.inputs.shape
            if stage.block is not None and len(shape) == 2 and shape[0] not in (tokens, *stream.shape[:2]):
                raise ValueError(
                    f"{visit.name!r} must see every token, not those that a router sends to it, "
                    f"got {shape[0]} of {tokens}"
                )
            if shape != answer.inputs.shape:
                raise ValueError(
                    f"inputs of {visit.name!r} must have the shape of the merged model's, {list(shape)}, "
                    f"got {list(answer.inputs.shape)} for task {task!r}"
                )

    def _load(self, layers: Mapping[str, Layer], solvers: Solvers) -> Iterator[Part]:
        for name in list(solvers):
            solver = solvers.pop(name)
            parts = layers[name].parts
            of_model = [part.of(self._model.get_parameter) for part in parts]
            anchors = [self._anchored(part, merged) for part, merged in zip(parts, of_model, strict=True)]
            found = solver.solve(self._how.lam, anchors[0], anchors[1] if len(anchors) > 1 else None)
            if found is None:
                continue
            for part, merged, new in zip(parts, of_model, found, strict=False):
                assert new is not None
                merged.copy_(new)
                yield part
            self.solved.append(name)

    def _anchored(self, part: Part, merged: Tensor) -> Tensor:
        if self._how.anchor == 1:
            return merged.double()
        stored = self._base.get(part.name)
        if stored is None or part.view(stored).shape != merged.shape:
            raise ValueError(f"base must have {part.name!r} of shape {tuple(merged.shape)}, got none")
        base = part.view(stored).to(merged.device).double()
        return base + self._how.anchor * (merged.double() - base)


def _read(gradients: Tensor) -> Tensor:
    return gradients.abs().amax(-1) > 0
