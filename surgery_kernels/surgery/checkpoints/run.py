"""A calibration carried out: blocks of all models read from disk as they are needed, the result written behind."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...checkpoint.memory import give_back_free_memory
from ...checkpoint.reading.mapped_file import many_files_open
from ...checkpoint.reading.opening import open_checkpoint
from ...checkpoint.reading.source import Source
from ...checkpoint.run import check as check_merge
from ...checkpoint.run import limited_threads
from ...checkpoint.run import run as run_merge
from ...checkpoint.stages import Stage
from ...checkpoint.writing.journal import Journal
from ...checkpoint.writing.layout import lay_out
from ...checkpoint.writing.output import OutputFolder
from ...checkpoint.writing.writer import Writer
from ...merging.progress import counting_bar
from ...modules.runner import BlockRunner, Started
from ...recipes import Recipe
from ..calibrate.calibration import Calibration
from ..calibrate.settings import Settings
from ..calibrate.ways import Side, Way
from ..storage.streams import Streams
from .companions import write_companions
from .data import Inputs
from .language_model import LanguageModel
from .perplexity import perplexity
from .plan import CalibrationPlan, plan_calibration
from .streams import KeptStreams, Stations

Perplexities = dict[str, dict[str, float]]  # "before", "after" and "expert" by expert


@torch.inference_mode(False)
def calibrate_checkpoint(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    merged: str | os.PathLike[str] | None = None,
    lam: float | None = None,
    anchor: float | None = None,
    teacher: float | None = None,
    residual: bool = False,
    order: str | None = None,
    max_length: int = 512,
    batch_size: int = 8,
    max_shard_bytes: int = 5 * 10**9,
    resume: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool | None = None,
) -> Perplexities:
    """Merges language models by a recipe and calibrates the result, from disk to disk, into the new folder `out`.

    What `calibrate` does, with a block of each model in memory at a time: the merged one's, and one expert's after the
    other. The tokens between two blocks lie beside `out` while it runs; every token of a text counts the same, padding
    nothing. Embeddings and the head stay the merged model's.

    Args:
        recipe: As of `checkpoint.merge`, one document of whole models, all of one class of transformers.
        data: Lines ``{"model": ..., "text": ...}`` of JSON: texts of each expert, by its name in the recipe.
        out: Folder to make.
        merged: Folder of a model that the recipe was merged into before; None: it is merged now, and goes again.
        lam, anchor, teacher, residual, order: As of `calibrate`.
        max_length: Tokens of a text, the rest of which is left out.
        batch_size: Texts in one forward pass.
        max_shard_bytes, device, threads: As of `checkpoint.merge`.
        resume: Go on with the `<out>.partial` of the same calibration, behind the last block that is done.
        progress: Bars on stderr, as of `fit`.

    Returns:
        Perplexities on the texts of each expert, which the calibration saw: of the merged model before and after it,
        and of the expert.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: something does not fit; before anything is written.
        OSError: something cannot be read or written. `resume` goes on from there.
    """
    how = Settings.of(lam=lam, anchor=anchor, teacher=teacher, unread_weight=1.0, residual=residual, order=order)
    with plan_calibration(
        recipe,
        data,
        how,
        merged=merged,
        max_length=max_length,
        batch_size=batch_size,
        max_shard_bytes=max_shard_bytes,
    ) as plan:
        return run(plan, out, resume=resume, device=device, threads=threads, progress=progress)


def run(
    plan: CalibrationPlan,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool | None = None,
) -> Perplexities:
    """Carries out a plan; arguments and errors as of `calibrate_checkpoint`."""
    folder, where = check(plan, out, resume=resume, device=device)
    with limited_threads(threads), many_files_open(), torch.no_grad(), folder.begun(plan.identity) as journal:
        if not folder.is_published(journal):
            merged = plan.merged or _merge(plan, folder, device, progress)
            with closing(open_checkpoint(merged)) as source:
                _Run(plan, source, folder, journal, where, progress).go()
            folder.publish()
        found: Perplexities = journal.decided["perplexities"]
        folder.discard()
    return found


def check(
    plan: CalibrationPlan, out: str | os.PathLike[str], *, resume: bool, device: str
) -> tuple[OutputFolder, torch.device]:
    """What `run` asks of folder, disk and device before it writes anything."""
    folder, where = check_merge(plan.merge, out, resume=resume, device=device)
    folder.check(plan.nbytes, resume=resume)
    return folder, where


def _merge(plan: CalibrationPlan, folder: OutputFolder, device: str, progress: bool | None) -> Path:
    """Where the merged model lies, beside what becomes of it."""
    stage = Stage(replace(plan.merge.recipe, name="merged"), folder.intermediates / "merged", {}, resume=True)
    if not stage.is_done(plan.merge):
        stage.begin(plan.merge)
        run_merge(plan.merge, stage.out, resume=True, device=device, progress=progress)
        for source in plan.merge.sources.values():
            source.release()
        give_back_free_memory()
    return stage.out


class _Run:
    """A walk through the blocks that may have begun earlier."""

    def __init__(
        self,
        plan: CalibrationPlan,
        source: Source,
        folder: OutputFolder,
        journal: Journal,
        device: torch.device,
        progress: bool | None,
    ) -> None:
        self._plan, self._source, self._folder, self._journal, self._device = plan, source, folder, journal, device
        self._progress = progress
        self._student = LanguageModel(source, plan.config)
        self._student.load(plan.dtype, device, own=True)
        self._num_blocks = len(self._student.sites.blocks)
        self._state: dict[str, Any] = journal.decided or {"blocks": 0, "perplexities": {}}
        tensors = {name: (info.dtype, info.shape) for name, info in source.tensors.items()}
        self._layout = lay_out(tensors, plan.max_shard_bytes, source.anatomy.stems)
        self._kept: list[KeptStreams] = []  # of each way the merged model's, then the expert's
        self._stations = Stations(folder.partial / "streams", self._state["blocks"])

    def go(self) -> None:
        """Writes the model."""
        samples = sum(of_expert.num_texts for of_expert in self._plan.batches.values())
        complete = False
        writer = Writer(self._folder.model, self._layout, self._journal)
        try:
            with ExitStack() as stack:
                left = self._num_blocks - self._stations.passed + 1
                bar = stack.enter_context(counting_bar(left * samples, "calibration", "text", self._progress))
                runner = self._runner(stack)
                ways = [self._way(stack, runner, number, name) for number, name in enumerate(self._plan.batches)]
                base = _Base(self._plan.base, self._plan.base_names)
                sites = self._student.sites
                calibration = Calibration(self._student.backbone, runner, base, sites, self._plan.how)
                if "before" not in self._state["perplexities"]:
                    self._begin(ways)
                while self._stations.passed < self._num_blocks:
                    self._block(calibration, ways, writer, bar)
                self._finish(calibration, ways, writer, bar)
            complete = True
        finally:
            writer.close(complete=complete)
        write_companions(self._folder.model, self._plan, self._source, self._layout, self._state["perplexities"])

    def _runner(self, stack: ExitStack) -> BlockRunner:
        """The merged model's. What it finds out is found out here, for the experts too."""
        runner = stack.enter_context(BlockRunner("the merged model", self._student.backbone, self._student.sites))
        with self._student.on_demand():
            runner.start(next(iter(self._plan.batches.values())).batches[0])
        return runner

    def _way(self, stack: ExitStack, runner: BlockRunner, number: int, name: str) -> Way:
        batches, expert = self._plan.batches[name], self._plan.models[name]
        expert.load(self._plan.dtype, self._device)
        of_expert = stack.enter_context(BlockRunner(name, expert.backbone, expert.sites))
        of_expert.knows(runner)
        sides = []
        for who, model, of_model in (("merged", self._student, runner), ("expert", expert, of_expert)):
            streams = KeptStreams(self._stations, f"{number}-{who}", len(batches.batches), self._device)
            self._kept.append(streams)
            sides.append(Side(model.backbone, of_model, Calls(of_model, batches.batches), streams, model.holding))
        return Way(name, *sides)

    def _begin(self, ways: Sequence[Way]) -> None:
        """The tokens before the first block, and how good the merged model is as it is."""
        self._stations.begin(self._stations.here)
        with ExitStack() as stack:
            merged = []
            sides = [side for way in ways for side in (way.student, way.expert)]
            for side, kept in zip(sides, self._kept, strict=True):
                for batch in range(len(kept)):
                    kept.put(self._stations.here, batch, side.begun[batch].stream)
            for way in ways:
                merged.append(stack.enter_context(Streams(self._stations.here)))
                for batch in range(len(way)):
                    merged[-1].append(way.student.begun[batch].stream)
            for block in range(self._num_blocks):
                with self._student.holding(block):
                    for way, streams in zip(ways, merged, strict=True):
                        for batch in range(len(way)):
                            streams[batch] = way.student.run(block, batch, streams[batch])
            self._measure("before", ways, merged)
        self._stations.settle(self._stations.here)
        self._journal.decide(self._state)

    def _block(self, calibration: Calibration, ways: Sequence[Way], writer: Writer, bar: tqdm) -> None:
        block = self._stations.passed
        self._stations.begin(self._stations.next)
        with self._student.holding(block, own=True):
            calibration.block(block, ways, bar)
            if self._plan.base is not None:
                self._plan.base.release()  # the anchors' part of it
            prefix = f"{self._student.sites.blocks[block]}."
            self._write(writer, [name for name in self._student.names if name.startswith(prefix)])
        writer.wait_until_written()
        self._stations.settle(self._stations.next)
        self._state["blocks"] = block + 1
        self._journal.decide(self._state)
        self._stations.advance()

    def _finish(self, calibration: Calibration, ways: Sequence[Way], writer: Writer, bar: tqdm) -> None:
        """What is behind the blocks, and everything that stays the merged model's."""
        solved = calibration.behind(ways, bar)
        self._measure("after", ways, [way.student.streams for way in ways])
        self._measure("expert", ways, [way.expert.streams for way in ways])
        names = list(dict.fromkeys(part.name for part in solved))
        self._write(writer, names)
        written = {*self._journal.done, *(self._student.names[name] for name in names)}
        for name in self._source.tensors:
            if name not in written:
                writer.wait_for_room()
                writer.write(name, self._source.tensor(name))
        writer.wait_until_written()
        self._journal.decide(self._state)

    def _write(self, writer: Writer, names: Sequence[str]) -> None:
        """Parameters of the backbone, new ones or not."""
        for name in names:
            stored = self._student.names[name]
            tensor = self._student.tensor(name).to("cpu", self._source.tensors[stored].dtype).contiguous()
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise RuntimeError(f"{stored!r} must be finite once it is calibrated, got NaN or infinity")
            writer.write(stored, tensor)

    def _measure(self, what: str, ways: Sequence[Way], streams: Sequence[Any]) -> None:
        for way, of_way in zip(ways, streams, strict=True):
            is_expert = what == "expert"
            model = self._plan.models[way.task] if is_expert else self._student
            side = way.expert if is_expert else way.student
            found = perplexity(model, side.runner, side.begun, of_way)
            model.source.release()  # the head is as large as several blocks
            self._state["perplexities"].setdefault(what, {})[way.task] = found


class Calls(Sequence[Started]):
    """How blocks are called, found out anew for every batch: masks and positions may be larger than the tokens."""

    def __init__(self, runner: BlockRunner, inputs: Sequence[Inputs]) -> None:
        self._runner, self._inputs = runner, inputs
        self._last: tuple[int, Started] | None = None

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, batch: Any) -> Any:
        if self._last is None or self._last[0] != batch:
            self._last = (batch, self._runner.start(self._inputs[batch]))
        return self._last[1]


class _Base(Mapping[str, Tensor]):
    """Tensors of a checkpoint by the names that parameters have in a model."""

    def __init__(self, source: Source | None, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def __getitem__(self, name: str) -> Tensor:
        if self._source is None:
            raise KeyError(name)
        return self._source.tensor(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
