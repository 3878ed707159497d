"""Two models of other initialisation in one: matched, merged as far as a width allows, and regressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..modules.device import device_of
from ..modules.frozen import frozen
from ..modules.inputs import Inputs, run, to_device
from ..modules.pools import Batches, pool_of
from ..ops import arguments
from .activations import match_activations
from .assignment import Matching, check_alike, state_of
from .build import head_state, merged_state, widened
from .least_squares import ORDERS, solve_layers
from .partial import Ratio, plan_of
from .statistics import take_statistics
from .symmetries import SAMPLES, find_symmetries, outputs_of
from .weights import match_weights

MATCHES = ("activations", "weights")


@dataclass(frozen=True)
class Merged:
    """One model of two."""

    model: nn.Module  # with the first's heads
    heads: tuple[dict[str, nn.Module], dict[str, nn.Module]]  # of the first and of the second, by name
    matching: Matching
    widths: dict[str, int]  # how many units each group has in the model
    solved: tuple[str, ...]  # layers that least squares have found

    def use_heads(self, which: int) -> nn.Module:
        """The model, which from now on has the heads of the first (0) or the second (1)."""
        for name, head in self.heads[which].items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, head)
        return self.model


def pleas(
    first: nn.Module,
    second: nn.Module,
    batches: Batches,
    *,
    ratio: Ratio = 0.0,
    budget: float | None = None,
    match: str | Matching = "activations",
    similarity: str = "distance",
    heads: Sequence[str] = (),
    least_squares: bool = True,
    order: str = "model",
    reset_statistics: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Merged:
    """One model from two of one architecture that share no initialisation: PLeaS.

    Units of the second are matched to the first's. In each group the pairs least alike stay apart: the group grows by
    one unit for each. Outputs of a layer that are both models' are the mean of theirs; the others read their own
    model's units and the merged ones. Then every linear layer and convolution is solved for: ``min |X W^T + b - Y|^2``,
    where X are the inputs that both models' layers get, merged as their units are, and Y are their answers merged
    alike, with a ridge of 1e-6 towards the weights before. At last batch norms take their statistics from the inputs.

    Args:
        first, second: Modules that `find_symmetries` can trace, alike but for `heads`; they stay as they are.
        batches: Unlabeled inputs of both models' tasks in any form that `fit` takes; kept in memory, run through both
            models two times or more.
        ratio: In [0, 1], for all groups that can grow, or for some by name: pairs whose similarity is below its
            quantile of this ratio stay apart. 0: the model is as wide as one of the two; 1: all stay apart, and what
            comes out is the mean of both models' outputs.
        budget: 1 or greater, in place of `ratio`: how many parameters the model may have, those of one model being 1.
            The pairs most unlike (|x - y|^2 / (|x|^2 + |y|^2)) in the whole model stay apart, as many as fit.
        match: "activations" (`match_activations`), "weights" (`match_weights`), or a matching.
        similarity: As of `match_activations`.
        heads: Names of modules that each model keeps: classifiers of other classes. They are solved for too.
        least_squares: False: nothing is solved for.
        order: "model": X are both models' own inputs for all layers at once, as in the paper. "layer": one layer after
            the other, X what goes into it in the merged model so far, which makes up for what the layers before it
            lack; a pass through three models for each (two where batch norms take statistics).
        reset_statistics: Of batch norms; False: they are merged as biases are.
        seed: Of "weights".
        batch_size: Samples in one pass.
        num_workers: Processes that read a dataset.

    Returns:
        The model, a copy of the first whose parameters may have other shapes; in the first's dtypes.

    Raises:
        ValueError, TypeError: the models cannot be traced, differ outside of heads or have other symmetries, an
            argument is outside its range, features are not finite, or the model's own code fixes the width of a group
            that was to grow.
        ImportError: scipy is not installed.

    Source: PLeaS (arXiv 2407.02447). Its ratios follow from a quadratic program, ours are given or follow from the
        budget; it takes steps of Adam towards the solution; and with ratio 1 its code merges one pair of each group.
        The order "layer" is ours.
    """
    arguments.check_count("batch_size", batch_size)
    arguments.check_one_of("order", order, ORDERS)
    if isinstance(match, str):
        arguments.check_one_of("match", match, MATCHES)
    pool = pool_of("batches", batches, num_workers)
    few = next(iter(pool.stream([torch.arange(min(SAMPLES, len(pool)))])))
    symmetries = find_symmetries(first, few, heads=heads)
    states = state_of(first), state_of(second)
    check_alike(symmetries, *states)
    others = find_symmetries(second, few, heads=heads)
    if (others.groups, others.owner_outside_heads) != (symmetries.groups, symmetries.owner_outside_heads):
        raise ValueError("second must have the symmetries of first, got others: the models differ in code or ties")
    if match == "activations":
        matching = match_activations(symmetries, first, second, pool, similarity=similarity, batch_size=batch_size)
    elif match == "weights":
        matching = match_weights(symmetries, first, second, seed=seed)
    else:
        assert isinstance(match, Matching)
        matching = match
        for group in symmetries.groups:
            if group.name not in matching.permutations:
                raise ValueError(f"match must have permutations of all groups, got none of {group.name!r}")
    plan = plan_of(symmetries, matching, ratio=ratio, budget=budget, parameters=dict(first.named_parameters()))
    merged = merged_state(plan, *states)
    of_heads = head_state(plan, states[0], 0), head_state(plan, states[1], 1)
    if any(plan.widths[group.name] > group.size for group in symmetries.groups):
        _check_runs(widened(first, {**merged, **of_heads[0]}), first, few)
    solved: list[str] = []
    if least_squares:
        solved = solve_layers(
            plan, (first, second), merged, of_heads, pool, batch_size, order=order, statistics=reset_statistics
        )
    model = widened(first, {**merged, **of_heads[0]})
    if reset_statistics:
        take_statistics(model, pool, batch_size)
    own = {name: model.get_submodule(name) for name in heads}
    wide = widened(second, of_heads[1])
    theirs = {name: wide.get_submodule(name) for name in heads}
    return Merged(model, (own, theirs), matching, plan.widths, tuple(solved))


def _check_runs(wide: nn.Module, first: nn.Module, inputs: Inputs) -> None:
    inputs = to_device(inputs, device_of(first))
    with frozen(wide), frozen(first), torch.no_grad():
        expected = [x.shape for x in outputs_of(run(first, inputs))]
        try:
            found = [x.shape for x in outputs_of(run(wide, inputs))]
        except (RuntimeError, AssertionError, ValueError) as error:
            found, why = [], str(error).strip().partition("\n")[0]
        else:
            why = f"outputs {[tuple(shape) for shape in found]}"
    if found != expected:
        raise ValueError(f"first must run with wider layers for a ratio above 0, got {why}: its code has their widths")
