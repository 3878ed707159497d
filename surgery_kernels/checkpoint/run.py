"""Merging checkpoints: from memory-mapped tensors through the ops into preallocated shards, in bounded memory."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..merging.progress import progress_bar
from ..merging.scope import Scope
from ..recipes import Recipe, load_recipes
from .hashes import Hashes
from .infinities import Produced, shared, without
from .loader import Loader, factors_of
from .memory import Releasing, Scratch, given_back
from .one_read import OneRead
from .plan import Plan, plan_merge
from .reading.mapped_file import many_files_open
from .reading.read_ahead import ReadAhead
from .record import write_record
from .stages import stages
from .steps import Step
from .writing.companions import write_companions
from .writing.journal import Journal
from .writing.output import OutputFolder
from .writing.writer import Writer

DRAWS_AT_ONCE = 1 << 20

Told = Callable[[Step, Scope, Tensor], None]


def merge(
    recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str] | None,
    *,
    strict: bool = False,
    intermediate_dir: str | os.PathLike[str] | None = None,
    lora_merge_dtype: str | None = None,
    allow: Collection[str] = (),
    nonfinite: str = "error",
    random_seed: int | None = None,
    stream: str | None = None,
    merge_computed: bool = False,
    moe_layout: str | None = None,
    moe_decisions: str = "matrix",
    unsafe_truncate_embeddings: bool = False,
    resume: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: bool | None = None,
) -> None:
    """Merges the checkpoints that a recipe names into the new folder `out`.

    Tensors go one by one from memory maps through the kernels into the shards of the result, read ahead and written
    behind. Peak memory stays under 1 GiB and twice the largest tensor. The result is complete or not there: it is
    written to `<out>.partial`, which a killed merge leaves behind, and renamed at the end.

    Args:
        recipe: mergekit's YAML as a file, which may hold several documents, a mapping, or from `load_recipe`.
        out: Folder to make; None for documents that all have names.
        strict: Refuse what the recipe says without effect; else it is warned of.
        intermediate_dir: Folder of the results of documents that have names; None: they go when `out` is finished.
        lora_merge_dtype, allow, nonfinite, random_seed, stream, merge_computed, moe_layout, moe_decisions,
        unsafe_truncate_embeddings, max_shard_bytes: As in `plan_merge`.
        resume: Go on with the `<out>.partial` of the same merge, if there is one. The files come out the same.
        device: Where tensors are merged: "cpu", or "cuda" with or without an index.
        threads: Of the kernels on the CPU, at least 1; None: as torch has it.
        progress: A bar on stderr: True, False, or None for one that appears after two seconds.

    Raises:
        ValueError, TypeError, FileNotFoundError: something does not fit; before anything is written.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names tensor, model and count.
        OSError: something cannot be read or written, such as on a full disk. `resume` goes on from there.
    """
    recipes = [recipe] if isinstance(recipe, Recipe) else load_recipes(recipe, strict=strict)
    with closing(stages(recipes, out, intermediate_dir, resume=resume)) as merges:
        for stage in merges:
            with plan_merge(
                stage.recipe,
                results=stage.results,
                lora_merge_dtype=lora_merge_dtype,
                allow=allow,
                nonfinite=nonfinite,
                random_seed=random_seed,
                stream=stream,
                merge_computed=merge_computed,
                moe_layout=moe_layout,
                moe_decisions=moe_decisions,
                unsafe_truncate_embeddings=unsafe_truncate_embeddings,
                max_shard_bytes=max_shard_bytes,
            ) as plan:
                for notice in plan.notices:
                    warnings.warn(notice, stacklevel=2)
                if not stage.is_done(plan):
                    stage.begin(plan)
                    run(plan, stage.out, resume=stage.resume, device=device, threads=threads, progress=progress)


def run(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: bool | None = None,
    told: Told | None = None,
) -> None:
    """Carries out a plan; arguments and errors as in `merge`.

    told: Is called with every tensor that was merged: its step, its inputs with the merged tensor, and the same in the
        dtype of the file; a resumed merge goes through all tensors for it.
    """
    folder, where = check(plan, out, resume=resume, device=device)
    with limited_threads(threads), many_files_open(), folder.begun(plan.identity) as journal:
        if not folder.is_published(journal):
            _write_model(plan, folder, journal, where, progress, told)
            folder.publish()
        folder.discard()


def check(
    plan: Plan, out: str | os.PathLike[str], *, resume: bool = False, device: str = "cpu"
) -> tuple[OutputFolder, torch.device]:
    """What `run` asks of folder, disk and device before it writes anything; arguments and errors as there."""
    where = _check_device(device)
    folder = OutputFolder(out)
    folder.check(plan.layout.nbytes + plan.nbytes_scratch + plan.companions.nbytes, resume=resume)
    return folder, where


def _write_model(
    plan: Plan,
    folder: OutputFolder,
    journal: Journal,
    device: torch.device,
    progress: bool | None,
    told: Told | None,
) -> None:
    before = set(journal.done)
    steps = [step for step in plan.ordered if told or step.name not in before]
    scratch = Scratch(folder.partial)
    hashes = Hashes()
    loader = Loader(scratch, device, hashes.see)
    complete = False
    writer = Writer(folder.model, plan.layout, journal, hashes.outputs)
    try:
        releases = [source.release for source in plan.sources.values()]
        with Releasing([*releases, scratch.release]), progress_bar(_nbytes_through_ops(steps), progress):
            once = plan.reads_once and device.type == "cpu" and journal.decided is None and told is None
            if once and OneRead(plan, loader, scratch, writer, journal).run():
                steps = [step for step in steps if step.method is None]
            decided = _decided(plan, Loader(scratch), journal) if plan.recipe.scope == "model" else None
            offsets, draws = _offsets(plan), _Draws(plan)
            with ReadAhead(step.spans for step in steps) as ahead:
                for number, step in enumerate(steps):
                    writer.wait_for_room()
                    ahead.wait_for(number)
                    facts = {"decided": decided, "offset": offsets[step.name], "generator": draws.before(step)}
                    scope = _scope(step, loader, **facts)
                    look = Produced(step).check if plan.nonfinite == "error" and not step.is_exact else None
                    written = _merged(plan, step, scope, loader)
                    if step.name not in before:
                        writer.write(step.name, written, look)
                    if told and scope:
                        told(step, scope, written)
        complete = True
    finally:
        try:
            writer.close(complete=complete)
        finally:
            hashes.close(complete=complete)
    write_companions(folder.model, plan, folder.out.name)
    write_record(folder.model, plan, hashes)


def _merged(plan: Plan, step: Step, scope: Scope | None, loader: Loader) -> Tensor:
    """The tensor of one step, on the CPU and in the dtype it is written in."""
    if step.method is None or scope is None:
        return loader.load(step.first, step).to("cpu", step.out_dtype)
    scope.out.append(loader.empty(step))
    with _models_named(step):
        _merge(plan, step, scope, loader)
    return scope.out[0].to("cpu", step.out_dtype)


def _merge(plan: Plan, step: Step, scope: Scope, loader: Loader) -> None:
    assert step.method is not None
    before = None if scope.generator is None else scope.generator.get_state()
    try:
        step.method.merge(scope)
    except RuntimeError:
        found = shared(step) if plan.nonfinite == "error" else None
        if found is None:
            raise
        if scope.generator is not None and before is not None:
            scope.generator.set_state(before)
        step.method.merge(without(scope, [found], loader))
        found.put_back(scope.out[0])


def _scope(step: Step, loader: Loader, **facts: Any) -> Scope | None:
    """The inputs of one step, with room for its result; None where nothing is merged."""
    if step.method is None:
        return None
    base = [loader.load(step.first, step)] if step.has_base else []
    if base and step.method.takes_factors and (factors := factors_of(step)):
        return Scope([step.name], base, [base * len(step.experts)], [], {}, factors=[factors], **facts)
    return Scope([step.name], base, [[loader.load(expert, step) for expert in step.experts]], [], {}, **facts)


def _offsets(plan: Plan) -> dict[str, int]:
    """Of every merged tensor, the elements of the model before it."""
    counts = (step.numel if step.method is not None else 0 for step in plan.steps)
    return dict(zip((step.name for step in plan.steps), accumulate(counts, initial=0), strict=False))


def _decided(plan: Plan, loader: Loader, journal: Journal) -> Any:
    """What the method decides over the whole model, once per merge."""
    steps = plan.merged
    if steps and journal.decided is None:
        scopes = [scope for step in steps if (scope := _scope(step, loader))]  # nothing is read yet
        model = Scope(
            [step.name for step in steps],
            [tensor for scope in scopes for tensor in scope.base],
            [experts for scope in scopes for experts in scope.experts],
            [],
            {},
            factors=[of for scope in scopes for of in scope.factors or (None,)],
        )
        method = steps[0].method  # what it decides by is the same for all tensors
        assert method is not None
        # one call goes through all tensors: they are read as fast as may be, and none counts that could not be
        in_files = [
            tensor
            for step, scope in zip(steps, scopes, strict=True)
            for wanted, tensor in zip(step.inputs, [*scope.base, *scope.experts[0]], strict=True)
            if step.takes_as_it_is(wanted)
        ]
        with (
            _models_named(steps[0]),
            given_back(in_files),
            ReadAhead((step.spans for step in steps), math.inf) as ahead,
        ):
            try:
                decided = method.decide(model)
            except RuntimeError:
                found = [shared(step) if plan.nonfinite == "error" else None for step in steps]
                if not any(found):
                    raise
                # the copies lie in other memory, whose pages are not to be given back: those of the files still are
                decided = method.decide(without(model, found, loader))
            ahead.wait_for(len(steps) - 1)
        journal.decide(decided)
    return journal.decided


class _Draws:
    """The generator of a plan, which stands before every tensor where it would if all before it had been merged."""

    def __init__(self, plan: Plan) -> None:
        self._generator = plan.generator()
        self._steps = iter(plan.ordered)

    def before(self, step: Step) -> torch.Generator | None:
        """Steps must come in the plan's order; of those left out in between the numbers are passed over."""
        if self._generator is not None:
            for passed in self._steps:
                if passed is step:
                    break
                for begin in range(0, passed.num_draws, DRAWS_AT_ONCE):
                    torch.rand(min(DRAWS_AT_ONCE, passed.num_draws - begin), generator=self._generator)
        return self._generator


@contextmanager
def _models_named(step: Step) -> Iterator[None]:
    """The ops count experts; here they have names."""
    try:
        yield
    except RuntimeError as error:
        names = "; ".join(f"experts[{t}] is {expert.source.name}" for t, expert in enumerate(step.experts))
        raise RuntimeError(f"{error} ({names})") from error


def _nbytes_through_ops(steps: Sequence[Step]) -> int:
    return sum(
        step.method.reads * len(step.inputs) * step.numel * step.dtype.itemsize
        for step in steps
        if step.method is not None
    )


@contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    if threads is None:
        yield
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_device(device: str) -> torch.device:
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}") from None
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be there, got {device!r} with {torch.cuda.device_count()} CUDA devices")
    return where
