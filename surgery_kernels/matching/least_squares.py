"""Layers of the merged model that answer as both models' layers do: three small solves each, from Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.layers import flat
from ..modules.pools import Pool
from ..modules.ties import first_of_tied
from ..ops import gram_cross
from .build import widened
from .flows import Flows, Linear, Visits, linear_layers
from .partial import Plan, Units
from .statistics import take_statistics

ORDERS = ("model", "layer")
RIDGE = 1e-6  # of the mean square of what a weight multiplies
MOST_BYTES = 1 << 30  # of sums that are held at a time

Models = tuple[nn.Module, nn.Module]
Tensors = dict[str, Tensor]


@torch.no_grad()
def solve_layers(
    plan: Plan,
    models: Models,
    merged: Tensors,
    heads: tuple[Tensors, Tensors],
    pool: Pool,
    batch_size: int,
    *,
    order: str = "model",
    statistics: bool = True,
) -> list[str]:
    """``min |X W^T + b - Y|^2 + ridge |W - W_0|^2``, in place: X are both models' inputs of a layer, merged as their
    units are, Y their layers' answers alike, and W_0 is what the layer is in the merged model.

    Answers that are one model's read only the inputs that are its own or both's.

    Args:
        order: "layer": one after the other, and X is what goes into a layer in the merged model so far.
        statistics: In that: whether its batch norms take theirs from the pool.

    Returns:
        The names of the layers that are called.
    """
    layers = linear_layers(models[0])
    owners = first_of_tied(models[0], {name: linear.layer for name, linear in layers.items()})
    regressions: dict[str, list[_Regression]] = {name: [] for name in owners if owners[name] == name}
    for name, of_layer in regressions.items():
        linear = layers[name]
        holders = enumerate(heads) if plan.symmetries.in_heads(linear.weight) else [(None, merged)]
        of_layer += [_Regression(plan, linear, models, tensors, which) for which, tensors in holders]
    solved: list[str] = []
    parts = _parts(regressions) if order == "model" else _in_order(models[0], layers, owners, pool)
    for together in parts:
        running: list[nn.Module] = list(models)
        if order == "layer":
            running.append(widened(models[0], {**merged, **heads[0]}))
            if statistics:
                take_statistics(running[-1], pool, batch_size)
        called = {name: layers[name] for name, owner in owners.items() if owner in together}
        with Flows(running, called) as flows:
            for batch in flows(pool, batch_size):
                for visits in batch:
                    for regression in regressions[owners[visits[0].name]]:
                        regression.add(layers[visits[0].name], visits, models)
        for name in together:
            called_once = [regression.solve() for regression in regressions[name]]
            solved += [name] if any(called_once) else []
    return solved


def _parts(regressions: Mapping[str, Sequence[_Regression]]) -> Iterator[list[str]]:
    """Layers whose sums fit into memory together."""
    together: list[str] = []
    held = 0
    for name, of_layer in regressions.items():
        size = sum(regression.num_bytes for regression in of_layer)
        if together and held + size > MOST_BYTES:
            yield together
            together, held = [], 0
        together.append(name)
        held += size
    if together:
        yield together


def _in_order(
    model: nn.Module, layers: Mapping[str, Linear], owners: Mapping[str, str], pool: Pool
) -> Iterator[list[str]]:
    """Layers as they are called, those together that are given the same."""
    with Flows([model], {name: layers[name] for name in owners}) as flows:
        seen = [visits[0] for visits in next(flows(pool, 1))]
    known: set[str] = set()
    groups: list[list[str]] = []
    before = None
    for visit in seen:
        if (owner := owners[visit.name]) in known:
            continue
        known.add(owner)
        if visit.inputs.data_ptr() == before:
            groups[-1].append(owner)
        else:
            groups.append([owner])
        before = visit.inputs.data_ptr()
    yield from groups


class _Regression:
    """Of one layer; of a head, for the model `which` that it belongs to."""

    def __init__(self, plan: Plan, linear: Linear, models: Models, tensors: Tensors, which: int | None) -> None:
        self._name = linear.name
        self._weight = linear.layer.weight.of(tensors.__getitem__)  # [out, in * kernel], in the tensor's own memory
        self._bias = None if linear.layer.bias is None else linear.layer.bias.of(tensors.__getitem__)
        shape = models[which or 0].get_parameter(linear.weight).shape
        self._inputs = plan.axis(linear.weight, linear.in_dim, shape[linear.in_dim])
        outputs = plan.axis(linear.weight, linear.out_dim, shape[linear.out_dim])
        outputs = outputs if linear.rows is None else outputs.narrow(linear.rows)
        self._outputs = outputs if which is None else outputs.of_one(which)
        self._sums: list[Tensor] = []  # x^T x, x^T e, sum of x, sum of e; e is what the answers lack  # float64
        self._count = 0

    @property
    def num_bytes(self) -> int:
        out, columns = self._weight.shape
        return 8 * columns * (columns + out)

    def add(self, linear: Linear, visits: Visits, models: Models) -> None:
        """`linear`: this layer, or one that shares its weight; a third visit is of the merged model."""
        features = [linear.features(visit.inputs) for visit in visits]
        answers = [linear.answers(visit, model) for visit, model in zip(visits, models, strict=False)]
        x = flat(linear.columns(features[2] if len(features) > 2 else _combined(self._inputs, features)))
        error = flat(_combined(self._outputs, answers)) - x @ self._weight.to(x).T
        if self._bias is not None:
            error -= self._bias.to(x)
        products = gram_cross(x[None], error[None], dtype=torch.float64)  # else rounding outweighs the ridge
        sums = [part[0] for part in products if part is not None]
        self._sums = [a.add_(b) for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._count += len(x)

    def solve(self) -> bool:
        """Whether anything went through the layer."""
        if not self._count:
            return False
        if not all(part.isfinite().all() for part in self._sums):
            raise ValueError(f"models must be finite at layer {self._name!r}, got NaN or infinity")
        kernel = self._weight.shape[1] // len(self._inputs.first)
        of_input = [of.repeat_interleave(kernel) for of in (self._inputs.of_first, self._inputs.of_second)]
        of_first, of_second = self._outputs.of_first, self._outputs.of_second
        for rows, columns in (
            (of_first & of_second, of_input[0] | of_input[1]),
            (of_first & ~of_second, of_input[0]),
            (of_second & ~of_first, of_input[1]),
        ):
            if rows.any() and columns.any():
                device = self._weight.device
                self._solve(rows.nonzero()[:, 0].to(device), columns.nonzero()[:, 0].to(device))
        self._sums = []
        return True

    def _solve(self, rows: Tensor, columns: Tensor) -> None:
        gram, cross, x_sum, e_sum = self._sums
        gram, cross = gram[columns][:, columns], cross[columns][:, rows]
        ridge = RIDGE * float(gram.trace()) / len(gram)
        x_mean, e_mean = x_sum[columns] / self._count, e_sum[rows] / self._count
        if self._bias is not None:
            gram.sub_(torch.outer(x_mean, x_mean), alpha=self._count)
            cross.sub_(torch.outer(x_mean, e_mean), alpha=self._count)
        change = torch.zeros_like(cross)
        if ridge > 0:
            gram.diagonal().add_(ridge)
            change = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
        self._weight[rows[:, None], columns] += change.T.to(self._weight)
        if self._bias is not None:
            self._bias[rows] += (e_mean - x_mean @ change).to(self._bias)


def _combined(units: Units, features: Sequence[Tensor]) -> Tensor:
    """Features of both models, [..., size], as the merged model has them.  # [..., width]"""
    total: Any = 0
    for x, places, share in zip(features, (units.first, units.second), units.shares, strict=True):
        if bool((places >= 0).any()):
            total = total + x.index_select(-1, places.clamp(min=0).to(x.device)) * share.to(x)
    return total
