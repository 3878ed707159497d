"""RegMean++: RegMean block after block, on what the blocks merged so far give."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ...merging import merge_state_dicts
from ...merging.progress import counting_bar
from ...modules.layer_visits import LayerVisits
from ...modules.layers import Layer, flat, known_layers
from ...modules.pools import Batches, pool_of
from ...modules.runner import BlockRunner
from ...modules.sites import Sites
from ...ops import arguments, gram_cross
from ..experts import Expert, load_expert
from .in_memory import checked_sites, way_of
from .row_weights import RowWeights
from .ways import Way


@torch.inference_mode(False)
def regmean_plus_plus(
    merged: nn.Module,
    experts: Mapping[str, Expert],
    batches: Mapping[str, Batches],
    *,
    off_diagonal: float = 0.9,
    sites: Sites | None = None,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    num_workers: int = 0,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """RegMean of every block, with the Gram matrices of what goes into the experts' layers when the experts' blocks run
    on the tokens of the blocks merged so far.

    The walk of `calibrate` without an anchor: an expert's layer is to be answered on its own inputs, and tasks weigh as
    their inputs do. What is not a linear layer of a block stays the merged model's: in the paper, the experts' mean.

    Args:
        merged: As of `calibrate`; the paper starts from ``merge_state_dicts(method="average")``.
        off_diagonal: As of RegMean.
        experts, batches, sites, batch_size, autocast, num_workers, progress: As of `calibrate`.

    Returns:
        The merged model's state dict.

    Raises:
        ValueError, TypeError: as of `calibrate` and RegMean.

    Source: RegMean++ (arXiv 2508.03121).
    """
    arguments.check_count("batch_size", batch_size)
    sites = checked_sites(merged, sites, experts, batches)
    model = copy.deepcopy(merged)
    with ExitStack() as stack, torch.no_grad():
        runner = stack.enter_context(BlockRunner("merged", model, sites, autocast))
        pools = {task: pool_of(f"batches[{task!r}]", batches[task], num_workers) for task in experts}
        total = (len(sites.blocks) + 1) * sum(map(len, pools.values()))
        bar = stack.enter_context(counting_bar(total, "RegMean++", "sample", progress))
        ways = []
        for task, pool in pools.items():
            expert = load_expert(task, experts[task], merged, sites)
            of_expert = stack.enter_context(BlockRunner(f"experts[{task!r}]", expert, sites, autocast))
            ways.append(way_of(task, pool, (model, runner), (expert, of_expert), batch_size, bar))
        for block, name in enumerate(sites.blocks):
            layers = known_layers(model.get_submodule(name), name)
            layers = {name: layer for name, layer in layers.items() if not layer.is_norm}
            _merge(model, layers, ways, [_grams(way, layers, block) for way in ways], off_diagonal)
            for way in ways:
                for batch in range(len(way)):
                    way.student.streams[batch] = way.student.run(block, batch, way.student.streams[batch])
                    bar.update(way.size(batch))
    return {name: value.detach() for name, value in model.state_dict().items()}


def _grams(way: Way, layers: Mapping[str, Layer], block: int) -> dict[str, Tensor]:
    """``mean_row x^T x`` of what goes into each layer of the expert's block."""
    grams: dict[str, Tensor] = {}
    rows: dict[str, float] = {}
    with LayerVisits(way.expert.model, layers) as visits:
        for batch in range(len(way)):
            stream = way.student.streams[batch]
            with visits.recording() as seen:
                way.expert.run(block, batch, stream)
            weights = RowWeights.of_batch(way.student.runner, way.student.begun[batch], stream)
            for visit in seen:
                x, of_rows = flat(layers[visit.name].rows(visit.inputs)), weights.of(visit)
                gram = gram_cross(x[None], weights=None if of_rows is None else of_rows[None]).gram[0].double()
                grams[visit.name] = grams[visit.name] + gram if visit.name in grams else gram
                rows[visit.name] = rows.get(visit.name, 0) + float(len(x) if of_rows is None else of_rows.sum())
    return {name: gram / max(rows[name], 1) for name, gram in grams.items()}


def _merge(
    model: nn.Module,
    layers: Mapping[str, Layer],
    ways: Sequence[Way],
    grams: Sequence[Mapping[str, Tensor]],
    off_diagonal: float,
) -> None:
    for name in grams[0]:
        part = layers[name].weight
        merged = part.of(model.get_parameter)
        states = [{name: part.of(way.expert.model.get_parameter)} for way in ways]
        of_layer = [{name: of_task[name]} for of_task in grams]
        found = merge_state_dicts({name: merged}, states, method="regmean", grams=of_layer, off_diagonal=off_diagonal)
        merged.copy_(found[name])
