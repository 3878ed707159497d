"""Calibration of models in memory (FeatCal)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...merging.progress import counting_bar
from ...modules.inputs import batch_size as size_of
from ...modules.pools import Batches, Pool, pool_of
from ...modules.runner import BlockRunner, Started
from ...modules.sites import Sites, check_sites, find_sites
from ...modules.ties import check_ties
from ...ops import arguments
from ..experts import Expert, load_expert
from ..storage.streams import Streams
from .calibration import Calibration, StateDict
from .settings import Settings
from .ways import Side, Way


@dataclass(frozen=True)
class Calibrated:
    """A calibrated model, and what of it was solved for."""

    state: dict[str, Tensor]  # of the merged model, for `load_state_dict`
    solved: tuple[str, ...]  # names of layers, in the order they run in
    kept: tuple[str, ...]  # parameters in the blocks and behind them that stay the merged model's


@torch.inference_mode(False)
def calibrate(
    merged: nn.Module,
    base: nn.Module | StateDict | None,
    experts: Mapping[str, Expert],
    batches: Mapping[str, Batches],
    *,
    lam: float | None = None,
    anchor: float | None = None,
    teacher: float | None = None,
    residual: bool = False,
    order: str | None = None,
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
        base: The pretrained model: a module or a state dict; may be None where the anchor is the merged model.
        experts: As of `fit`; all are held at a time.
        batches: As of `fit`; 8 to 256 samples of each task.
        lam: Greater than 0, the strength of the anchor. None: the published code's 0.05; 1e-3 with `residual`.
        anchor: How far the anchor lies from the base, in merges: 1 is the merged model. None: the published 2, twice as
            far; 1 with `residual`.
        teacher: In [0, 1]: the share of the expert's own inputs in what its layers answer to. None: the published 0.3;
            1 with `residual`.
        residual: Layers that add to the stream of a block answer so that the sum is the expert's: what their answer is
            added to has drifted away from it, and they make up for that. Weights and biases are then solved for at
            once, and normalisations answer as the expert's do. Which layers add is found from gradients.
        order: "block": all layers of a block are solved for at once; "layer": one after the other, each for inputs that
            the new ones before it make, for a pass through the block each. None: "block"; "layer" with `residual`.
        unread_weight: In [0, 1]: what a token counts in a layer of the last block or behind it, if the final
            representation does not depend on what that layer makes of it. Padding, by the attention mask, counts 0.
        sites: Where `find_sites` is wrong.
        batch_size: Samples in one forward pass.
        autocast: bfloat16 or float16 for the models.
        num_workers: Processes that read a dataset.
        progress: Bars on stderr, as of `fit`.

    Returns:
        The parameters, in the merged model's dtypes, and which layers they were solved for: linear layers, the
        projections of nn.MultiheadAttention, convolutions without groups, and normalisations. A layer that runs in
        several places of a block, or shares its parameters with others of it, answers in all of them as well as one
        can. What is before the blocks, embeddings, and what shares parameters with them stay the merged model's.

    Raises:
        ValueError, TypeError: an argument is outside its range, blocks cannot be called one by one or share parameters,
            no layer adds to the stream though `residual` says so, a layer sees only some of the tokens (a mixture of
            experts), or features are not finite.

    Source: FeatCal (arXiv 2605.13030); `residual` and `order` are ours.
    """
    how = Settings.of(
        lam=lam, anchor=anchor, teacher=teacher, unread_weight=unread_weight, residual=residual, order=order
    )
    arguments.check_count("batch_size", batch_size)
    sites = checked_sites(merged, sites, experts, batches)
    model = copy.deepcopy(merged)
    with ExitStack() as stack, torch.no_grad():
        runner = stack.enter_context(BlockRunner("merged", model, sites, autocast))
        calibration = Calibration(model, runner, _state(base, how), sites, how)
        pools = {task: pool_of(f"batches[{task!r}]", batches[task], num_workers) for task in experts}
        total = (len(sites.blocks) + 2) * sum(map(len, pools.values()))
        bar = stack.enter_context(counting_bar(total, "calibration", "sample", progress))
        ways = []
        for task, pool in pools.items():
            expert = load_expert(task, experts[task], merged, sites)
            of_expert = stack.enter_context(BlockRunner(f"experts[{task!r}]", expert, sites, autocast))
            ways.append(way_of(task, pool, (model, runner), (expert, of_expert), batch_size, bar))
        solved = []
        for block in range(len(sites.blocks)):
            solved += calibration.block(block, ways, bar)
        solved += calibration.behind(ways, bar)
    names = {part.name for part in solved}
    kept = tuple(name for name in calibration.reached() if name not in names)
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return Calibrated(state, tuple(calibration.solved), kept)


def checked_sites(
    merged: nn.Module, sites: Sites | None, experts: Mapping[str, Expert], batches: Mapping[str, Batches]
) -> Sites:
    """The blocks of the merged model; raises where they, or the tasks, are not fit for a walk through them."""
    if not experts or set(experts) != set(batches):
        raise ValueError(
            f"batches must have samples for every task of experts, got {list(batches)} for {list(experts)}"
        )
    sites = find_sites(merged, "v2") if sites is None else sites
    check_sites("merged", merged, sites)
    if not sites.blocks:
        raise ValueError("sites must have at least one block, got 0")
    check_ties(merged, sites)
    return sites


Runs = tuple[nn.Module, BlockRunner]


def way_of(task: str, pool: Pool, student: Runs, expert: Runs, batch_size: int, bar: tqdm) -> Way:
    """With all batches before the first block."""
    begun: dict[BlockRunner, list[Started]] = {student[1]: [], expert[1]: []}
    streams = {runner: Streams(None) for runner in begun}
    for inputs in pool.stream(torch.arange(len(pool)).split(batch_size)):
        for runner, batches in begun.items():
            started = runner.start(inputs)
            streams[runner].append(started.stream)
            batches.append(replace(started, stream=torch.empty(0)))  # which is not kept behind the first block
        bar.update(size_of(inputs))
    return Way(task, *(Side(model, runner, begun[runner], streams[runner]) for model, runner in (student, expert)))


def _state(base: nn.Module | StateDict | None, how: Settings) -> StateDict:
    if isinstance(base, nn.Module):
        return base.state_dict()
    if base is None and how.anchor == 1:
        return {}
    if not isinstance(base, Mapping):
        raise TypeError(f"base must be a module or a state dict, got {type(base).__name__}")
    return base
