"""Calibration of the merged weights themselves: one model, no adapters, no gradients (FeatCal)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..modules.pools import Batches, Pool, pool_of
from ..modules.runner import BlockRunner, Started, read_weights, row_weights
from ..modules.sites import Sites, check_sites, find_sites
from ..modules.visits import Visit, Visits
from ..ops import arguments
from .experts import Expert, load_expert
from .features import check_finite
from .layers import LinearMoments, LinearSolver, NormSolver, TaskMoments, known_layers
from .progress import progress_bar
from .seeds import generator

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Calibrated:
    """A calibrated model, and what of it was solved for."""

    state: dict[str, Tensor]  # of the merged model, for `load_state_dict`
    solved: tuple[str, ...]  # names of layers, in the order they run in
    kept: tuple[str, ...]  # parameters in the blocks and behind them that stay the merged model's


@dataclass
class _Way:
    """One task's batches on their way through the blocks of both models."""

    task: str
    expert: nn.Module
    runner: BlockRunner  # of the expert
    begun: list[Started]
    expert_begun: list[Started]
    streams: list[Tensor]
    expert_streams: list[Tensor]


Pass = Callable[[_Way, int, Tensor], Tensor]


@torch.inference_mode(False)
def calibrate(
    merged: nn.Module,
    base: nn.Module | StateDict,
    experts: Mapping[str, Expert],
    batches: Mapping[str, Batches],
    *,
    lam: float = 0.05,
    anchor: float = 2.0,
    teacher: float = 0.3,
    unread_weight: float = 0.01,
    sites: Sites | None = None,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
    progress: bool | None = None,
) -> Calibrated:
    """Every linear layer and normalisation answers the merged model's inputs as the experts' layers answer theirs.

    Block after block, and at last what comes behind the blocks: each linear layer is the solution W of
    ``sum_t k_t E |W x_s - W_t x_t|^2 + lam |W - A|^2``, where x_s goes into it in the model calibrated so far,
    x_t = teacher * (what goes into the expert's) + (1 - teacher) * x_s, k_t = 1 / |E x_s x_s^T| and
    A = base + anchor * (merged - base); its bias follows. Scales and shifts of LayerNorm and RMSNorm are solved for
    channel by channel. Solved in float64. One model comes out: no task has to be known when it is used.

    Args:
        merged: Any module whose blocks can be called one by one; stays as it is.
        base: The pretrained model: a module or a state dict.
        experts: As of `fit`; all are held at a time.
        batches: As of `fit`; 8 to 256 samples of each task.
        lam: Greater than 0, the strength of the anchor; the published code has 0.05.
        anchor: How far the anchor lies from the base, in merges: 1 is the merged model, the published 2 twice as far.
        teacher: In [0, 1]: the share of the expert's own inputs in what its layers answer to.
        unread_weight: In [0, 1]: what a token counts in a layer of the last block or behind it, if the final
            representation does not depend on what that layer makes of it. Padding, by the attention mask, counts 0.
        sites: Where `find_sites` is wrong.
        batch_size: Samples in one forward pass.
        autocast: bfloat16 or float16 for the models.
        num_workers: Processes that read a dataset.
        progress: Bars on stderr, as of `fit`.

    Returns:
        The parameters, in the merged model's dtypes, and which layers they were solved for. What is before the blocks,
        convolutions, embeddings and the weights inside nn.MultiheadAttention stay the merged model's.

    Raises:
        ValueError, TypeError: an argument is outside its range, blocks cannot be called one by one, parameters are
            shared between layers, or features are not finite.

    Source: FeatCal (arXiv 2605.13030).
    """
    _check(lam, anchor, teacher, unread_weight, batch_size, experts, batches)
    sites = find_sites(merged, "v2") if sites is None else sites
    check_sites("merged", merged, sites)
    blocks = [merged.get_submodule(name) for name in sites.blocks]
    if not blocks:
        raise ValueError("sites must have at least one block, got 0")
    _check_untied(merged)
    model = copy.deepcopy(merged)
    run = _Calibration(model, _state(base), sites, lam, anchor, teacher, unread_weight)
    with ExitStack() as stack, torch.no_grad():
        run.runner = stack.enter_context(BlockRunner("merged", model, sites, autocast))
        pools = {task: pool_of(f"batches[{task!r}]", batches[task], num_workers) for task in experts}
        total = (len(blocks) + 2) * sum(map(len, pools.values()))
        bar = stack.enter_context(progress_bar(total, "calibration", "sample", progress))
        ways = []
        for task, pool in pools.items():
            expert = load_expert(task, experts[task], merged, sites)
            runner = stack.enter_context(BlockRunner(f"experts[{task!r}]", expert, sites, autocast))
            ways.append(_way(task, expert, run.runner, runner, pool, batch_size, bar))
        for block in range(len(blocks)):
            run.block(block, ways, bar)
        run.behind(ways, bar)
    solved = tuple(run.solved)
    under = {f"{name}.{parameter}" for name in solved for parameter in ("weight", "bias")}
    kept = [name for name in run.reached() if name not in under]
    return Calibrated({name: value.detach() for name, value in model.state_dict().items()}, solved, tuple(kept))


@dataclass(frozen=True)
class _Stage:
    """Layers that are solved for together, and the passes in which they are called: from a task, the number of a batch
    and what goes in to what comes out."""

    layers: Mapping[str, nn.Module]
    student: Pass
    expert: Pass
    final: Pass | None  # from what the student gives to its final representation; None: every row of a layer is read
    is_behind: bool = False  # the passes go through what is before the blocks, too

    def own(self, visits: list[Visit]) -> list[Visit]:
        """What is before the blocks does not follow from the stream: it has no gradient."""
        return [visit for visit in visits if visit.output.requires_grad] if self.is_behind else visits


class _Calibration:
    """The model as far as it is calibrated."""

    runner: BlockRunner

    def __init__(
        self,
        model: nn.Module,
        base: StateDict,
        sites: Sites,
        lam: float,
        anchor: float,
        teacher: float,
        unread_weight: float,
    ) -> None:
        self._model, self._base, self._sites = model, base, sites
        self._lam, self._anchor, self._teacher, self._unread = lam, anchor, teacher, unread_weight
        self.solved: list[str] = []
        self._behind: list[str] = []  # layers behind the blocks

    def block(self, block: int, ways: Sequence[_Way], bar: tqdm) -> None:
        """Solves for the layers of a block, and moves the streams behind it."""
        name = self._sites.blocks[block]

        def student(way: _Way, batch: int, stream: Tensor) -> Tensor:
            return self.runner.run(way.begun[batch], block, stream)

        stage = _Stage(
            layers=known_layers(self._model.get_submodule(name), name),
            student=student,
            expert=lambda way, batch, stream: way.runner.run(way.expert_begun[batch], block, stream),
            final=self._finish if block == len(self._sites.blocks) - 1 else None,
        )
        moved = self._run(stage, ways, bar)
        for way, expert_streams in zip(ways, moved, strict=True):
            way.expert_streams = expert_streams
            way.streams = [student(way, batch, stream) for batch, stream in enumerate(way.streams)]

    def behind(self, ways: Sequence[_Way], bar: tqdm) -> None:
        """The layers between the last block and the final representation."""
        inside = {id(m) for name in self._sites.blocks for m in self._model.get_submodule(name).modules()}
        stage = _Stage(
            layers={name: layer for name, layer in known_layers(self._model, "").items() if id(layer) not in inside},
            student=self._finish,
            expert=lambda way, batch, stream: way.runner.finish(way.expert_begun[batch], stream),
            final=lambda way, batch, final: final,
            is_behind=True,
        )
        before = len(self.solved)
        self._run(stage, ways, bar)
        self._behind = self.solved[before:]

    def reached(self) -> list[str]:
        """Parameters of the blocks and of the solved layers behind them."""
        prefixes = tuple(f"{name}." for name in (*self._sites.blocks, *self._behind))
        return [name for name, _ in self._model.named_parameters() if name.startswith(prefixes)]

    def _finish(self, way: _Way, batch: int, stream: Tensor) -> Tensor:
        return self.runner.finish(way.begun[batch], stream)

    def _run(self, stage: _Stage, ways: Sequence[_Way], bar: tqdm) -> list[list[Tensor]]:
        """Statistics of all tasks, then the solution; what the experts give, by task and batch."""
        solvers: dict[str, LinearSolver | NormSolver] = {}
        outputs: list[list[Tensor]] = []
        for way in ways:
            of_expert = {name: way.expert.get_submodule(name) for name in stage.layers}
            moments = TaskMoments()
            outputs.append([])
            with Visits(stage.layers) as mine, Visits(of_expert) as theirs:
                for batch, stream in enumerate(way.streams):
                    answers, output = self._answers(stage, theirs, way, batch)
                    visits, reads = self._visits(stage, mine, way, batch)
                    self._check(way.task, visits, answers)
                    mask = self._mask(way.begun[batch], stream)
                    moments.add(
                        stage.layers,
                        visits,
                        answers,
                        lambda number, visits=visits, reads=reads, mask=mask: self._weights(  # type: ignore[misc]
                            visits[number], reads[number], mask
                        ),
                    )
                    outputs[-1].append(output)
                    bar.update(len(_first(way.begun[batch])))
            for name, of_layer in moments.of.items():
                weight, bias = _parameters(of_expert[name])
                if isinstance(of_layer, LinearMoments):
                    linear = solvers.setdefault(name, LinearSolver())
                    assert isinstance(linear, LinearSolver)
                    linear.add(of_layer, self._teacher, weight, bias)
                else:
                    norm = solvers.setdefault(name, NormSolver())
                    assert isinstance(norm, NormSolver)
                    norm.add(of_layer, weight, bias)
        self._load(stage.layers, solvers)
        return outputs

    def _answers(self, stage: _Stage, visits: Visits, way: _Way, batch: int) -> tuple[list[Visit], Tensor]:
        """The calls of the expert's layers, and what the stage gives."""
        with visits.recording() as seen, torch.set_grad_enabled(stage.is_behind):
            leaf = way.expert_streams[batch].detach().requires_grad_(stage.is_behind)
            output = stage.expert(way, batch, leaf).detach()
        return stage.own(seen), output

    def _visits(self, stage: _Stage, visits: Visits, way: _Way, batch: int) -> tuple[list[Visit], list[Tensor | None]]:
        """The calls of the student's layers, and where it matters which of their rows are read."""
        if stage.final is None:
            with visits.recording() as seen:
                stage.student(way, batch, way.streams[batch])
            return seen, [None] * len(seen)
        with torch.enable_grad():
            leaf = way.streams[batch].detach().requires_grad_()
            with visits.recording() as seen:
                output = stage.student(way, batch, leaf)
            final, seen = stage.final(way, batch, output), stage.own(seen)
            # along one direction, for the sum of a normalised representation has no gradient at all
            direction = torch.randn(final.shape, generator=generator("read")).to(final)
            outputs = [visit.output for visit in seen]
            gradients = torch.autograd.grad((final * direction).sum(), outputs, allow_unused=True) if outputs else ()
        return seen, [
            torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device) if g is None else g.abs().amax(-1) > 0
            for x, g in zip(outputs, gradients, strict=True)
        ]

    def _mask(self, begun: Started, stream: Tensor) -> Tensor | None:
        """The weights of the stream's rows, in its layout."""
        mask = row_weights(begun.inputs, self.runner.batch_first(stream))
        return None if mask is None else self.runner.batch_first(mask).double()

    def _weights(self, visit: Visit, read: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Of the rows of a call; None: 1 each."""
        weights = None if read is None else read_weights(read, self._unread).flatten()
        if mask is None or visit.inputs.shape[:-1].numel() != mask.numel():  # pooled rows have no padding
            return weights
        return mask.flatten() if weights is None else weights * mask.flatten()

    def _check(self, task: str, visits: Sequence[Visit], answers: Sequence[Visit]) -> None:
        names = [visit.name for visit in visits]
        if names != [answer.name for answer in answers]:
            raise ValueError(f"experts[{task!r}] must call the layers of merged in their order, got another")
        for visit, answer in zip(visits, answers, strict=True):
            if visit.inputs.shape != answer.inputs.shape:
                raise ValueError(
                    f"inputs of {visit.name!r} must have the shape of the merged model's, {list(visit.inputs.shape)}, "
                    f"got {list(answer.inputs.shape)} for task {task!r}"
                )
            check_finite(f"inputs of {visit.name!r} in merged for task {task!r}", visit.inputs)
            check_finite(f"inputs of {visit.name!r} in experts[{task!r}]", answer.inputs)

    def _load(self, layers: Mapping[str, nn.Module], solvers: Mapping[str, LinearSolver | NormSolver]) -> None:
        for name, layer in layers.items():
            if name not in solvers:
                continue
            weight, bias = _parameters(layer)
            anchor_bias = None if bias is None else self._anchored(f"{name}.bias", bias)
            found = solvers[name].solve(self._lam, self._anchored(f"{name}.weight", weight), anchor_bias)
            if found is None:
                continue
            weight.copy_(found[0])
            if bias is not None and found[1] is not None:
                bias.copy_(found[1])
            self.solved.append(name)

    def _anchored(self, name: str, merged: Tensor) -> Tensor:
        if name not in self._base or self._base[name].shape != merged.shape:
            raise ValueError(f"base must have {name!r} of shape {tuple(merged.shape)}, got none")
        base = self._base[name].to(merged.device).double()
        return base + self._anchor * (merged.double() - base)


def _way(
    task: str, expert: nn.Module, student: BlockRunner, runner: BlockRunner, pool: Pool, batch_size: int, bar: tqdm
) -> _Way:
    order = torch.arange(len(pool)).split(batch_size)
    begun, of_expert = [], []
    for inputs in pool.stream(order):
        begun.append(student.start(inputs))
        of_expert.append(runner.start(inputs))
        bar.update(len(_first(begun[-1])))
    return _Way(task, expert, runner, begun, of_expert, [b.stream for b in begun], [b.stream for b in of_expert])


def _parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight = layer.weight
    bias = getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    return weight, bias


def _check_untied(model: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(parameter), name)
        if other != name:
            raise ValueError(f"merged must not share parameters between layers, got {other!r} that is {name!r} too")


def _first(begun: Started) -> Tensor:
    return begun.inputs if isinstance(begun.inputs, Tensor) else next(iter(begun.inputs.values()))


def _state(base: nn.Module | StateDict) -> StateDict:
    if isinstance(base, nn.Module):
        return base.state_dict()
    if not isinstance(base, Mapping):
        raise TypeError(f"base must be a module or a state dict, got {type(base).__name__}")
    return base


def _check(
    lam: float,
    anchor: float,
    teacher: float,
    unread_weight: float,
    batch_size: int,
    experts: Mapping[str, Expert],
    batches: Mapping[str, Batches],
) -> None:
    if not 0 < arguments.number("lam", lam) < math.inf:
        raise ValueError(f"lam must be finite and greater than 0, got {lam}")
    if not -math.inf < arguments.number("anchor", anchor) < math.inf:
        raise ValueError(f"anchor must be finite, got {anchor}")
    for name, share in {"teacher": teacher, "unread_weight": unread_weight}.items():
        if not 0 <= arguments.number(name, share) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    arguments.check_count("batch_size", batch_size)
    if not experts or set(experts) != set(batches):
        raise ValueError(
            f"batches must have samples for every task of experts, got {list(batches)} for {list(experts)}"
        )
